# SPDX-License-Identifier: Apache-2.0
"""``/kv-compress/contexts``: compress a document or a system prompt before anybody asks about it.

    POST    a prompt, or messages as for a chat; what requests with the same beginning and the same
            options then take instead of computing it
    GET     all that are held: sizes and names, no text
    DELETE  all, or the one that is named

Behind the server's API key, where it has one.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter, ValidationError
from vllm import SamplingParams
from vllm.entrypoints.serve.tokenize.protocol import TokenizeRequest
from vllm.sampling_params import RequestOutputKind

from kvcompress_vllm.config.rules import shown
from kvcompress_vllm.integration.engine.utilities import DROP, LIST
from kvcompress_vllm.integration.frontend import checks
from kvcompress_vllm.integration.frontend.access import authorized
from kvcompress_vllm.integration.frontend.wish import CONTEXT, XARGS
from kvcompress_vllm.integration.start.flags import resolved_config

PATH = "/kv-compress/contexts"
SALT = "cache_salt"
NOT_HELD = (
    "the context is not held: --no-enable-prefix-caching is given, its policy judges by all "
    "queries, there is nothing to gain, or all slots for contexts are in use"
)
BODY = TypeAdapter[Any](TokenizeRequest)
"""Kept: pydantic reads parts of a message (tool calls) later, and panics if its adapter is gone."""
router = APIRouter(tags=["kv-compress"], dependencies=[Depends(authorized)])


@router.post(PATH, dependencies=[Depends(checks.checked_body)])
async def add(request: Request) -> JSONResponse:
    """Compress a context, unless it is held, and say how large it is."""
    body = await request.json() if await request.body() else None
    if not isinstance(body, dict):
        raise checks.BadRequestError(f"{shown(body)} is not accepted; it must be a JSON object")
    asked = body.pop(XARGS, None)
    if not isinstance(asked, dict | None):  # pairs would make one, too
        raise checks.BadRequestError(
            f"{XARGS}={shown(asked)} is not accepted; it must be an object of kv_compress options"
        )
    salt = body.pop(SALT, None)
    if salt is not None and not (isinstance(salt, str) and salt):
        raise checks.BadRequestError(f"{SALT}={shown(salt)} is not accepted; it must be a text")
    tokens, lora = await _tokens(request, body)
    client = request.app.state.engine_client
    prompt, params = _request(client, tokens, asked or {})
    if salt is not None:
        prompt[SALT] = salt
    engines = _engines(client.vllm_config.parallel_config)
    for rank in range(engines):
        name, final = f"kv-compress-context-{uuid.uuid4().hex}", None
        with checks.bad_request():
            async for output in client.generate(
                prompt,
                params.clone(),
                name,
                lora_request=lora,
                data_parallel_rank=rank if engines > 1 else None,
            ):
                final = output
        if final is None or final.outputs[0].finish_reason == "error":
            raise HTTPException(500, "kv_compress: the context could not be compressed")
        if rank == 0:
            first = name
    held = await client.engine_core.call_utility_async(LIST, first)
    if not held:
        raise HTTPException(409, f"kv_compress: {NOT_HELD}")
    return JSONResponse(held[0])


@router.get(PATH)
async def contexts(request: Request) -> JSONResponse:
    """What is held, least recently used first; of several engines what the first one holds."""
    client = request.app.state.engine_client
    return JSONResponse({"contexts": await client.engine_core.call_utility_async(LIST, None)})


@router.delete(PATH)
async def drop_all(request: Request) -> JSONResponse:
    """Offer none of them any more. Requests that use one keep it until they end."""
    client = request.app.state.engine_client
    return JSONResponse({"dropped": await client.engine_core.call_utility_async(DROP, None)})


@router.delete(f"{PATH}/{{name}}")
async def drop(request: Request, name: str) -> JSONResponse:
    """As ``drop_all``, of one."""
    client = request.app.state.engine_client
    if not await client.engine_core.call_utility_async(DROP, name):
        raise HTTPException(404, f"kv_compress: no context {shown(name)} is held")
    return JSONResponse({"dropped": 1})


def _engines(parallel: Any) -> int:
    """Engines of this server: with a load balancer outside, others have the rest."""
    everywhere: int = parallel.data_parallel_size
    local: int = getattr(parallel, "data_parallel_size_local", everywhere)
    return local if getattr(parallel, "local_engines_only", False) else everywhere


async def _tokens(request: Request, body: dict[str, Any]) -> tuple[list[int], Any]:
    """Token ids of a prompt or of messages, as vLLM's own routes make them, and the LoRA adapter
    that ``model`` names.

    Raises:
        BadRequestError: naming what is accepted.
    """
    state = request.app.state
    ids = body.get("prompt")
    if isinstance(ids, list):
        if not ids or not all(type(token) is int and token >= 0 for token in ids):
            raise checks.BadRequestError(
                f"prompt={shown(ids)} is not accepted; it must be a text or a list of token ids, "
                "integers >= 0"
            )
        body = {**body, "prompt": ""}  # for the model's name
    _check_messages(body.get("messages"))
    try:
        asked: Any = BODY.validate_python(body)
    except ValidationError:
        raise checks.BadRequestError(
            f"{', '.join(map(shown, body)) or 'nothing'} is not accepted; give a prompt (a text or "
            "token ids) or messages, and as you like model, cache_salt and vllm_xargs"
        ) from None
    unknown = body.keys() - type(asked).model_fields.keys()
    if unknown:
        raise checks.BadRequestError(
            f"{shown(min(unknown))} is not accepted; the fields are "
            f"{', '.join([*type(asked).model_fields, SALT, XARGS])}"
        )
    if "messages" in body and "add_generation_prompt" not in body:
        asked.add_generation_prompt = False  # a user's turn follows
    try:
        answer = await state.serving_tokenization.create_tokenize(asked, request)
    except (LookupError, AttributeError) as error:  # of what a template reads, say
        raise checks.BadRequestError(
            f"{', '.join(map(shown, body))} is not accepted; vLLM cannot render it: "
            f"{type(error).__name__}: {shown(str(error))}"
        ) from error
    if not hasattr(answer, "tokens"):
        raise HTTPException(answer.error.code, answer.error.message)
    lora = state.serving_tokenization._maybe_get_adapters(asked)
    return ids if isinstance(ids, list) else answer.tokens, lora


def _check_messages(messages: Any) -> None:
    """Refuse what is not text; vLLM's protocol lets parts without any through.

    Raises:
        BadRequestError: naming what is accepted.
    """
    if messages is None:
        return
    listed = isinstance(messages, list) and len(messages) > 0
    if not listed or not all(isinstance(each, dict) for each in messages):
        raise checks.BadRequestError(
            f"messages={shown(messages)} is not accepted; it must be a list of at least one message"
        )
    for message in messages:
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part.get("type") != "text":
                raise checks.BadRequestError("messages are not accepted; they must be text only")


def _request(
    client: Any, tokens: list[int], asked: dict[str, Any]
) -> tuple[dict[str, Any], SamplingParams]:
    """What has a context packed: a prompt of it and one more token, which reads it packed.

    Raises:
        BadRequestError: the prompt is too short, or the context is not within it.
    """
    config, cache = resolved_config(client.vllm_config), client.vllm_config.cache_config
    assert config is not None
    n, size = asked.get(CONTEXT), cache.block_size
    n = len(tokens) if n is None else n
    whole = n // size * size if type(n) is int and size <= n <= len(tokens) else 0
    asked = {**asked, CONTEXT: whole or n}
    least = max(config.min_prompt_tokens, size)
    if len(tokens) < least:
        raise checks.BadRequestError(
            f"a prompt of {len(tokens)} tokens is not accepted; it must have at least {least} "
            "(min_prompt_tokens, and a block)"
        )
    if type(n) is int and n > len(tokens):
        raise checks.BadRequestError(
            f"{CONTEXT}={shown(n)} is not accepted; the prompt has {len(tokens)} tokens"
        )
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        extra_args=asked,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    if whole >= least:
        # One token more: of a prompt that ends there the last one would be computed anew.
        tokens = [*tokens[:whole], tokens[min(whole, len(tokens) - 1)]]
    return {"prompt_token_ids": tokens}, params
