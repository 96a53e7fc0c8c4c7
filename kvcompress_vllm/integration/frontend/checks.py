# SPDX-License-Identifier: Apache-2.0
"""Where requests are checked, so that a bad one is HTTP 400 before its response begins.

Three places, each as early as what it needs is known:

    the JSON of the body    misspelt and misplaced keys, true where a number belongs: vLLM drops or
                            changes them when it reads the body into its protocol
    ``AsyncLLM.generate``   all else. vLLM calls it before it answers, but checks nothing until the
                            first token is asked for, when a stream is already HTTP 200
    ``process_inputs``      (in ``plugin.py``) once more, for all who do not come by HTTP
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from pydantic import TypeAdapter, ValidationError
from vllm import envs
from vllm.exceptions import VLLMValidationError

from kvcompress_vllm.integration.frontend import requests
from kvcompress_vllm.integration.frontend.body import check_body
from kvcompress_vllm.integration.frontend.wish import XARGS
from kvcompress_vllm.integration.start.flags import resolved_config

_PATCHED = "_kv_compress_patched"


class BadRequestError(VLLMValidationError, ValueError):
    """HTTP 400 on every vLLM; from 0.27 on a plain ValueError of ``process_inputs`` is HTTP 500."""


@contextmanager
def bad_request() -> Iterator[None]:
    """A ValueError inside becomes a :class:`BadRequestError` with the same message."""
    try:
        yield
    except VLLMValidationError:
        raise
    except ValueError as error:
        raise BadRequestError(str(error)) from error


def refuse_rust_frontend() -> None:
    """Refuse vLLM's front end in Rust, which runs no plugin.

    Raises:
        ValueError: naming the variable to unset.
    """
    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        raise ValueError(
            "kv_compress: VLLM_USE_RUST_FRONTEND=1 is not supported: vLLM's Rust front end loads "
            "no plugins, so that requests would go unchecked and without metrics; unset it, or "
            "serve without --kv-compress"
        )


def install() -> None:
    """Check in ``AsyncLLM.generate`` at its call; idempotent."""
    from vllm.v1.engine.async_llm import AsyncLLM

    if getattr(AsyncLLM, _PATCHED, False):
        return
    setattr(AsyncLLM, _PATCHED, True)
    stock = AsyncLLM.generate

    @functools.wraps(stock)
    def generate(
        self: Any, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        check(self.vllm_config, prompt, sampling_params)
        return stock(self, prompt, sampling_params, request_id, *args, **kwargs)

    AsyncLLM.generate = generate  # type: ignore[method-assign]


def check(vllm_config: Any, prompt: Any, params: Any) -> None:
    """Refuse what ``process_inputs`` will refuse of a request.

    Args:
        prompt: as ``AsyncLLM.generate`` takes it; its length is known once it is rendered.

    Raises:
        BadRequestError: naming what is wrong and what is accepted.
    """
    config = resolved_config(vllm_config)
    if config is None:
        return
    with bad_request():
        budget = requests.check_request(config, params, resumable=False)
        ids = embeds = None
        if isinstance(prompt, dict):
            ids, embeds = prompt.get("prompt_token_ids"), prompt.get("prompt_embeds")
        if ids is not None or embeds is not None:
            rendered = SimpleNamespace(
                sampling_params=params,
                prompt_token_ids=ids,
                prompt_embeds=embeds,
                mm_features=prompt.get("mm_kwargs"),
            )
            requests.check_length(config, vllm_config, rendered, budget)
            requests.check_context(config, rendered)
            requests.check_sharing(vllm_config, rendered, budget)


def check_bodies(app: FastAPI) -> None:
    """Have every route that takes JSON check the body first."""
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    app.dependency_overrides[validate_json_request] = checked_body


def check_at_call(responses: Any) -> None:
    """The one serving that calls ``generate`` inside its stream: check where it makes the stream.

    Args:
        responses: vLLM's ``OpenAIServingResponses``.
    """
    stock = getattr(responses, "_generate_with_builtin_tools", None)
    if stock is None:  # a release that checks earlier, or by another name: see compat/hooks
        return

    @functools.wraps(stock)
    def _generate_with_builtin_tools(*args: Any, **kwargs: Any) -> Any:
        check(
            responses.engine_client.vllm_config, kwargs["engine_input"], kwargs["sampling_params"]
        )
        return stock(*args, **kwargs)

    responses._generate_with_builtin_tools = _generate_with_builtin_tools


def check_batches(chat: Any) -> None:
    """Check the bodies of ``vllm run-batch``, which come by no route.

    Args:
        chat: vLLM's ``OpenAIServingChat``.
    """
    stock = chat.create_chat_completion
    config = resolved_config(chat.engine_client.vllm_config)

    @functools.wraps(stock)
    async def create_chat_completion(request: Any, raw_request: Any = None) -> Any:
        if raw_request is None:
            body = {**(request.model_extra or {}), XARGS: request.vllm_xargs}
            body["use_beam_search"] = getattr(request, "use_beam_search", False)
            with bad_request():
                check_body(body, config)
        return await stock(request, raw_request)

    chat.create_chat_completion = create_chat_completion


def pass_xargs(messages: Any) -> None:
    """Let ``/v1/messages`` take ``vllm_xargs``, which its protocol does not know.

    Args:
        messages: vLLM's ``AnthropicServingMessages``; it answers through its chat serving.
    """
    stock = messages.create_chat_completion

    @functools.wraps(stock)
    async def create_chat_completion(request: Any, raw_request: Any = None) -> Any:
        body = await raw_request.json() if raw_request is not None else {}
        given = body.get(XARGS)
        if given is not None:
            field = type(request).model_fields[XARGS]
            try:
                request.vllm_xargs = TypeAdapter(field.annotation).validate_python(given)
            except ValidationError:  # names every item of what may be large
                return messages.create_error_response(
                    BadRequestError(
                        "vllm_xargs is not accepted; it must be an object of strings, numbers and "
                        "lists of them"
                    )
                )
        try:
            return await stock(request, raw_request)
        except BadRequestError as error:  # the route would make HTTP 500 of it
            return messages.create_error_response(error)

    messages.create_chat_completion = create_chat_completion


async def checked_body(raw_request: Request) -> None:
    """A route's dependency: vLLM's own check of a JSON body, and ours."""
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    await validate_json_request(raw_request)
    # FastAPI has read and parsed it, and the request keeps it.
    body = await raw_request.json() if await raw_request.body() else None
    if isinstance(body, dict):
        client = getattr(raw_request.app.state, "engine_client", None)
        config = None if client is None else resolved_config(client.vllm_config)
        with bad_request():
            check_body(body, config, raw_request["path"])
