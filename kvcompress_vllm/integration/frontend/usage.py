# SPDX-License-Identifier: Apache-2.0
"""What compression did to a request, in its output: ``RequestOutput.kv_compress``, its metrics, and
``usage``.

The scheduler sends it in ``EngineCoreOutput.kv_transfer_params``, which no KV connector needs: they
are refused. It comes with the next token rather than with the last one, because vLLM's front end
ends a request itself where it finds a stop string.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.metrics.stats import RequestStateStats

from kvcompress_vllm.reporting.usage import CompressionUsage, Counts, UsageLog

FIELD = "kv_compress"
_PATCHED = "_kv_compress_patched"
_COUNTS = "_kv_compress_counts"
_USAGE_ONLY = '"choices":[]'
"""In the one chunk of a stream that carries nothing but the usage. Generated text cannot look like
it: JSON would escape its quotes."""


@dataclass
class RequestStats(RequestStateStats):
    """``RequestOutput.metrics``, of which Ray Data makes a column."""

    kv_compress: CompressionUsage | None = None


def send(log: UsageLog, outputs: Iterable[EngineCoreOutput]) -> None:
    """Put what there is to tell about these requests into their outputs."""
    for output in outputs:
        counts = log.take(output.request_id)
        if counts is not None:
            output.kv_transfer_params = {FIELD: counts}


def install() -> None:
    """Give every ``RequestOutput`` of this process a ``kv_compress``, and its metrics; idempotent.

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
            usage.add(new, sequence_counts(self))
            setattr(self, _COUNTS, new)
            kv_transfer_params = None
        if self.stats is not None and not isinstance(self.stats, RequestStats):
            self.stats = RequestStats(**vars(self.stats), kv_compress=usage)
        output = stock(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params,
            *args, **kwargs,
        )  # fmt: skip
        if output is not None:
            output.kv_compress = usage  # type: ignore[union-attr]
        return output

    RequestState.make_request_output = make_request_output  # type: ignore[method-assign]


def sequence_counts(state: RequestState) -> Counts:
    """Of one sequence, as far as its engine has told; zeros where it was never compressed."""
    return getattr(state, _COUNTS, Counts())


def report_in_usage(state: Any) -> None:
    """Have the ``usage`` of a server's responses say it; wraps methods of its servings only.

    Args:
        state: vLLM's ``State``; servings and methods that it lacks are left out.
    """
    for name, method, wrap in _WRAPPED:
        serving = getattr(state, name, None)
        stock = getattr(serving, method, None)
        if stock is not None:
            setattr(serving, method, wrap(stock))


def total(outputs: Iterable[Any]) -> dict[str, int]:
    """Summed over the prompts of an HTTP request; zeros for outputs that tell nothing."""
    usage = CompressionUsage()
    for output in outputs:
        found = getattr(output, FIELD, None)
        if found is not None:
            usage.add(Counts(**asdict(found)))
    return asdict(usage)


def _full(stock: Any) -> Any:
    @functools.wraps(stock)
    async def full_generator(
        request: Any, result_generator: AsyncGenerator[Any, None], *args: Any, **kwargs: Any
    ) -> Any:
        seen: dict[Any, Any] = {}
        response = await stock(request, _watch(result_generator, seen), *args, **kwargs)
        _set(response, seen)
        return response

    return full_generator


def _stream(stock: Any) -> Any:
    @functools.wraps(stock)
    async def stream_generator(
        request: Any, result_generator: AsyncGenerator[Any, None], *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        seen: dict[Any, Any] = {}
        chunks = stock(request, _watch(result_generator, seen), *args, **kwargs)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _with_usage(chunk, seen)

    return stream_generator


def _batch_full(stock: Any) -> Any:
    @functools.wraps(stock)
    async def chat_completion_full_generator_batch(
        request: Any, generators: list[AsyncGenerator[Any, None]], *args: Any, **kwargs: Any
    ) -> Any:
        seen: dict[Any, Any] = {}
        watched = [_watch(results, seen, key) for key, results in enumerate(generators)]
        response = await stock(request, watched, *args, **kwargs)
        _set(response, seen)
        return response

    return chat_completion_full_generator_batch


def _messages_full(stock: Any) -> Any:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicUsage

    class Usage(AnthropicUsage):
        kv_compress: dict[str, int]

    class Response(AnthropicMessagesResponse):
        usage: Usage | None = None

    Response.model_rebuild(_types_namespace={"Usage": Usage, "Any": Any})

    @functools.wraps(stock)
    def messages_full_converter(generator: Any) -> Any:
        response, found = stock(generator), getattr(generator.usage, FIELD, None)
        if found is None or response.usage is None:
            return response
        # Pydantic writes no more fields than a type declares, so it takes types of our own.
        fields = {name: getattr(response, name) for name in type(response).model_fields}
        usage = Usage(**dict(response.usage), kv_compress=found)
        return Response.model_construct(**{**fields, "usage": usage})

    return messages_full_converter


def _messages_stream(stock: Any) -> Any:
    @functools.wraps(stock)
    async def message_stream_converter(
        generator: AsyncGenerator[Any, None],
    ) -> AsyncIterator[str]:
        found: list[Any] = []

        async def chunks() -> AsyncIterator[Any]:
            async with aclosing(generator):
                async for chunk in generator:
                    if not isinstance(chunk, str):
                        if _carries_usage_only(chunk):
                            found[:] = [getattr(chunk.usage, FIELD, None)]
                    elif _USAGE_ONLY in chunk:
                        found[:] = [json.loads(chunk.removeprefix("data: "))["usage"].get(FIELD)]
                    yield chunk

        events = stock(chunks())
        async with aclosing(events):
            async for event in events:
                head, _, data = event.partition("\ndata: ")
                if head != "event: message_delta" or not found:
                    yield event
                    continue
                message = json.loads(data)
                message["usage"][FIELD] = found[0]
                yield f"{head}\ndata: {_dumped(message)}\n\n"

    return message_stream_converter


def _turns(stock: Any) -> Any:
    """Each turn of a response that calls tools is a request to the engine."""

    @functools.wraps(stock)
    def _generate_with_builtin_tools(*args: Any, context: Any, **kwargs: Any) -> Any:
        seen: dict[Any, Any] = {}
        context._kv_compress_seen, append = seen, context.append_output

        def append_output(output: Any) -> None:
            seen[getattr(output, "request_id", None)] = output
            append(output)

        context.append_output = append_output
        return stock(*args, context=context, **kwargs)

    return _generate_with_builtin_tools


def _responses_full(stock: Any) -> Any:
    @functools.wraps(stock)
    async def responses_full_generator(
        request: Any, sampling_params: Any, result_generator: Any, context: Any, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        response = await stock(request, sampling_params, result_generator, context, *args, **kwargs)
        _set(response, getattr(context, "_kv_compress_seen", {}))
        return response

    return responses_full_generator


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
        seen: dict[Any, Any] = {}
        results = _watch_prompts(result_generator, seen)
        chunks = stock(request, engine_inputs, results, *args, **kwargs)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _with_usage(chunk, seen)

    return completion_stream_generator


async def _watch(
    results: AsyncGenerator[Any, None], seen: dict[Any, Any], key: int = 0
) -> AsyncIterator[Any]:
    async with aclosing(results):
        async for result in results:
            seen[key] = result
            yield result


async def _watch_prompts(
    results: AsyncGenerator[Any, None], seen: dict[Any, Any]
) -> AsyncIterator[Any]:
    async with aclosing(results):
        async for index, result in results:
            seen[index] = result
            yield index, result


def _set(response: Any, seen: dict[Any, Any]) -> None:
    usage = getattr(response, "usage", None)
    if usage is not None:  # an error has none
        usage.kv_compress = total(seen.values())


def _with_usage(chunk: Any, seen: dict[Any, Any]) -> Any:
    if not isinstance(chunk, str):
        if _carries_usage_only(chunk):
            _set(chunk, seen)
        return chunk
    if _USAGE_ONLY not in chunk:
        return chunk
    message = json.loads(chunk.removeprefix("data: "))
    message["usage"][FIELD] = total(seen.values())
    return f"data: {_dumped(message)}\n\n"


def _carries_usage_only(chunk: Any) -> bool:
    """Of a chunk that vLLM has not yet made text of; an error has no choices, either."""
    return getattr(chunk, "choices", None) == [] and chunk.usage is not None


def _dumped(message: Any) -> str:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":"))


_WRAPPED = (
    ("openai_serving_completion", "request_output_to_completion_response", _completion_full),
    ("openai_serving_completion", "completion_stream_generator", _completion_stream),
    ("openai_serving_chat", "chat_completion_full_generator", _full),
    ("openai_serving_chat", "chat_completion_stream_generator", _stream),
    ("openai_serving_chat_batch", "chat_completion_full_generator_batch", _batch_full),
    ("openai_serving_responses", "_generate_with_builtin_tools", _turns),
    ("openai_serving_responses", "responses_full_generator", _responses_full),
    # Chat completions beneath, which their converters make messages of.
    ("anthropic_serving_messages", "chat_completion_full_generator", _full),
    ("anthropic_serving_messages", "chat_completion_stream_generator", _stream),
    # From vLLM 0.33 on the latter's chunks are events of messages already; these are made from it.
    ("anthropic_serving_messages", "chat_completion_stream_generator_raw", _stream),
    ("anthropic_serving_messages", "messages_full_converter", _messages_full),
    ("anthropic_serving_messages", "message_stream_converter", _messages_stream),
    ("serving_tokens", "serve_tokens_full_generator", _full),
    ("serving_tokens", "serve_tokens_stream_generator", _stream),
)
"""Serving in vLLM's ``State``, its method, and what to make of it."""
