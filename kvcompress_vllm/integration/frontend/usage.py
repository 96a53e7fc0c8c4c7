# SPDX-License-Identifier: Apache-2.0
"""What compression did to a request, in its output: ``RequestOutput.kv_compress`` and ``usage``.

The scheduler sends it in ``EngineCoreOutput.kv_transfer_params``, which no KV connector needs: they
are refused. It comes with the next token rather than with the last one, because vLLM's front end
ends a request itself where it finds a stop string.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import RequestState

from kvcompress_vllm.reporting.usage import CompressionUsage, Counts, UsageLog

FIELD = "kv_compress"
_PATCHED = "_kv_compress_patched"
_USAGE_ONLY = '"choices":[]'
"""In the one chunk of a stream that carries nothing but the usage. Generated text cannot look like
it: JSON would escape its quotes."""


def send(log: UsageLog, outputs: Iterable[EngineCoreOutput]) -> None:
    """Put what there is to tell about these requests into their outputs."""
    for output in outputs:
        counts = log.take(output.request_id)
        if counts is not None:
            output.kv_transfer_params = {FIELD: counts}


def install() -> None:
    """Give every ``RequestOutput`` of this process a ``kv_compress``; idempotent.

    All outputs of a request share one :class:`CompressionUsage`, so that those which vLLM merges
    while nobody reads them stay right.
    """
    if getattr(RequestState, _PATCHED, False):
        return
    setattr(RequestState, _PATCHED, True)
    stock = RequestState.make_request_output

    @functools.wraps(stock)
    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        owner = self if self.parent_req is None else self.parent_req
        usage = getattr(owner, FIELD, None)
        if usage is None:
            usage = owner.kv_compress = CompressionUsage()
        if kv_transfer_params is not None and FIELD in kv_transfer_params:
            new = Counts(*kv_transfer_params[FIELD])
            usage.add(new, getattr(self, "_kv_compress_counts", Counts()))
            self._kv_compress_counts, kv_transfer_params = new, None
        output = stock(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params,
            *args, **kwargs,
        )  # fmt: skip
        if output is not None:
            output.kv_compress = usage  # type: ignore[union-attr]
        return output

    RequestState.make_request_output = make_request_output  # type: ignore[method-assign]


def report_in_usage(chat: Any, completion: Any) -> None:
    """Have the ``usage`` of these servings say it; wraps methods of these instances only.

    Args:
        chat: vLLM's ``OpenAIServingChat``, or None.
        completion: vLLM's ``OpenAIServingCompletion``, or None.
    """
    if chat is not None:
        chat.chat_completion_full_generator = _chat_full(chat.chat_completion_full_generator)
        chat.chat_completion_stream_generator = _chat_stream(chat.chat_completion_stream_generator)
    if completion is not None:
        completion.request_output_to_completion_response = _completion_full(
            completion.request_output_to_completion_response
        )
        completion.completion_stream_generator = _completion_stream(
            completion.completion_stream_generator
        )


def total(outputs: Iterable[Any]) -> dict[str, int]:
    """Summed over the prompts of an HTTP request; zeros for outputs that tell nothing."""
    usage = CompressionUsage()
    for output in outputs:
        found = getattr(output, FIELD, None)
        if found is not None:
            usage.add(Counts(**asdict(found)))
    return asdict(usage)


def _chat_full(stock: Any) -> Any:
    @functools.wraps(stock)
    async def chat_completion_full_generator(
        request: Any, result_generator: AsyncGenerator[Any, None], *args: Any, **kwargs: Any
    ) -> Any:
        seen: dict[int, Any] = {}
        response = await stock(request, _watch(result_generator, seen), *args, **kwargs)
        _set(response, seen)
        return response

    return chat_completion_full_generator


def _chat_stream(stock: Any) -> Any:
    @functools.wraps(stock)
    async def chat_completion_stream_generator(
        request: Any, result_generator: AsyncGenerator[Any, None], *args: Any, **kwargs: Any
    ) -> AsyncIterator[str]:
        seen: dict[int, Any] = {}
        chunks = stock(request, _watch(result_generator, seen), *args, **kwargs)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _with_usage(chunk, seen)

    return chat_completion_stream_generator


def _completion_full(stock: Any) -> Any:
    @functools.wraps(stock)
    def request_output_to_completion_response(
        final_res_batch: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        response = stock(final_res_batch, *args, **kwargs)
        _set(response, dict(enumerate(final_res_batch)))
        return response

    return request_output_to_completion_response


def _completion_stream(stock: Any) -> Any:
    @functools.wraps(stock)
    async def completion_stream_generator(
        request: Any,
        engine_inputs: Any,
        result_generator: AsyncGenerator[Any, None],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        seen: dict[int, Any] = {}
        results = _watch_prompts(result_generator, seen)
        chunks = stock(request, engine_inputs, results, *args, **kwargs)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _with_usage(chunk, seen)

    return completion_stream_generator


async def _watch(results: AsyncGenerator[Any, None], seen: dict[int, Any]) -> AsyncIterator[Any]:
    async with aclosing(results):
        async for result in results:
            seen[0] = result
            yield result


async def _watch_prompts(
    results: AsyncGenerator[Any, None], seen: dict[int, Any]
) -> AsyncIterator[Any]:
    async with aclosing(results):
        async for index, result in results:
            seen[index] = result
            yield index, result


def _set(response: Any, seen: dict[int, Any]) -> None:
    usage = getattr(response, "usage", None)
    if usage is not None:  # an error has none
        usage.kv_compress = total(seen.values())


def _with_usage(chunk: str, seen: dict[int, Any]) -> str:
    if _USAGE_ONLY not in chunk:
        return chunk
    message = json.loads(chunk.removeprefix("data: "))
    message["usage"][FIELD] = total(seen.values())
    return f"data: {json.dumps(message, ensure_ascii=False, separators=(',', ':'))}\n\n"
