# SPDX-License-Identifier: Apache-2.0
"""Whether the engine can do what a request asks for, and how its budget reaches the engine.

What it asks for is in ``wish.py``. Checked in the front end, where a bad value is the client's
error (HTTP 400); an exception in the engine core would end it for everybody.
"""

from __future__ import annotations

from typing import Any

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.config.rules import shown
from kvcompress_vllm.integration.engine.kv_cache import most_needed
from kvcompress_vllm.integration.frontend.wish import (
    CONTEXT,
    EXACT,
    KEYS,
    PREFIX,
    STRIDE,
    request_wish,
)
from kvcompress_vllm.integration.sizing import draft_tokens
from kvcompress_vllm.integration.start.attention_kinds import has_others
from kvcompress_vllm.integration.start.refusals import exact_problem, unshared
from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.scheduling.limits import Limits
from kvcompress_vllm.scheduling.need import blocks_needed
from kvcompress_vllm.scheduling.replay import ROOM, may_repeat
from kvcompress_vllm.scheduling.sizes import Sizes


def check_token_ids(request: Any) -> None:
    """Refuse negative token ids, which would end the engine: vLLM refuses them in the bodies of its
    routes, and looks only at the largest id of a prompt that comes otherwise.

    Args:
        request: vLLM's ``EngineCoreRequest``.

    Raises:
        ValueError: naming the first of them.
    """
    ids = request.prompt_token_ids
    # Beside images vLLM made the ids, and models may have some of their own there.
    if not ids or getattr(request, "mm_features", None) or min(ids) >= 0:
        return
    real = getattr(request, "prompt_is_token_ids", None)  # False where an embedding stands
    for index, token in enumerate(ids):
        if token < 0 and (not real or real[index]):
            raise ValueError(
                f"kv_compress: token id {shown(token)} is not accepted, the prompt's number "
                f"{index}; it must be an integer >= 0"
            )


def check_length(
    config: KVCompressConfig, vllm_config: Any, request: Any, budget: RequestBudget
) -> None:
    """Refuse a request that could not finish even alone in an empty pool: all others would wait
    behind it. Where ``prefill_peak_tokens`` is set, the KV cache need not hold the longest request.

    Args:
        request: vLLM's ``EngineCoreRequest``.
        budget: what :func:`check_request` returned.

    Raises:
        ValueError: with the blocks that it could take and those that there are for one.
    """
    params = request.sampling_params
    if params is None:
        return
    longest, prompt = vllm_config.model_config.max_model_len, _prompt_tokens(request)
    length = min(longest, prompt + (params.max_tokens or longest))
    cache = vllm_config.cache_config
    sizes = Sizes(budget, Limits.of(config, cache.block_size, longest))
    drafts = draft_tokens(vllm_config)
    needed = blocks_needed(sizes, config.window, length, drafts)
    # The front end of several engines knows the sum of their blocks only; and what layers with a
    # window need beside it, the scheduler knows.
    blocks = getattr(cache, "num_gpu_blocks", None)
    if (
        blocks
        and vllm_config.parallel_config.data_parallel_size == 1
        and not has_others(vllm_config)
    ):
        most = blocks - 1  # the null block is nobody's
    else:  # what vLLM made sure of when it started
        most = most_needed(config, cache.block_size, longest, drafts)
    if needed > most:
        raise ValueError(
            f"kv_compress: a prompt of {prompt} tokens and an output of {length - prompt} may take "
            f"{needed} blocks of {cache.block_size} tokens as this request wants to keep them; "
            f"with prefill_peak_tokens={config.prefill_peak_tokens} a request has {most}"
        )


def check_context(config: KVCompressConfig, request: Any) -> None:
    """Refuse a context that is not within the prompt, or too short to be compressed.

    Args:
        request: vLLM's ``EngineCoreRequest``.

    Raises:
        ValueError: naming the length that it must have.
    """
    wish = request_wish(getattr(request, "sampling_params", None))
    if wish is None or wish.context_tokens is None:
        return
    prompt, least = _prompt_tokens(request), config.min_prompt_tokens
    if prompt < least:
        raise ValueError(
            f"{CONTEXT}={wish.context_tokens} is not accepted; it must be left out: the prompt has "
            f"{prompt} tokens, and none below min_prompt_tokens={least} is compressed"
        )
    if not least <= wish.context_tokens <= prompt:
        raise ValueError(
            f"{CONTEXT}={wish.context_tokens} is not accepted; it must be an integer >= {least} "
            f"(min_prompt_tokens) and <= {prompt}, the tokens of the prompt"
        )


def check_sharing(vllm_config: Any, request: Any, budget: RequestBudget) -> None:
    """Refuse contexts that nobody could share, and one that cannot be repeated though its request
    or the server wants that.

    Args:
        request: vLLM's ``EngineCoreRequest``.
        budget: what :func:`check_request` returned.

    Raises:
        ValueError: naming why, and the way out.
    """
    alone = unshared(vllm_config)
    if budget.context_stride and alone is not None:
        raise ValueError(f"{STRIDE}={budget.context_stride} is not accepted: {alone}; leave it out")
    if budget.context_tokens and stalls_alone(vllm_config, budget):
        raise ValueError(
            f"{CONTEXT}={budget.context_tokens} is not accepted with a mass on several pipeline "
            "stages; leave it out, or give a ratio"
        )
    if not budget.exact:
        return
    longest, problem = vllm_config.model_config.max_model_len, exact_problem(vllm_config)
    if problem is None and not may_repeat(budget.context_tokens or 0, longest):
        problem = f"{CONTEXT}={budget.context_tokens} must be at most {longest - ROOM}"
    if problem is None and has_embeddings(request):
        problem = "the prompt has embeddings, and what is repeated must be tokens"
    if problem is None and getattr(request, "mm_features", None):
        problem = "the prompt has images or the like, and what is repeated must be text"
    if problem is not None:
        raise ValueError(f"{EXACT}=kvzip is not accepted: {problem}; {EXACT}=off is")


def stalls_alone(vllm_config: Any, budget: RequestBudget) -> bool:
    """Whether a compression in the middle of a prompt would wait for what no step brings.

    How much a mass keeps is known once the workers have scored the keys. Of several pipeline stages
    the last hears from the others only with tokens, and such a request computes none meanwhile.
    """
    stages: int = vllm_config.parallel_config.pipeline_parallel_size
    return budget.mass is not None and stages > 1


def has_embeddings(request: Any) -> bool:
    """Whether a prompt, or parts of it, are embeddings; in the second case vLLM has token ids for
    all of it, which say nothing in the places of these."""
    return request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None


def _prompt_tokens(request: Any) -> int:
    """Tokens of a prompt; one of embeddings has a row for each."""
    given = request.prompt_token_ids
    if given is None:
        given = getattr(request, "prompt_embeds", None)
    return 0 if given is None else len(given)


def check_request(config: KVCompressConfig, params: Any, resumable: bool) -> RequestBudget:
    """Refuse what a request must not ask of an engine that compresses.

    Returns:
        The budget that it gets.

    Raises:
        ValueError: naming what is wrong and what is accepted.
    """
    budget = resolve(config, request_wish(params), f"{PREFIX}_")
    if resumable:
        raise ValueError("kv_compress: resumable (streaming input) requests are not supported")
    return budget


RESOLVED = f"{PREFIX}_resolved"
"""Under which the budget travels to the engine; not for clients."""


def send_budget(budget: RequestBudget, params: Any) -> None:
    """Put a checked request's budget into its own ``SamplingParams``, instead of what it asked for.

    A request that asked for nothing needs none: the engine knows the configured budget.

    Args:
        budget: what :func:`check_request` returned.
    """
    given = getattr(params, "extra_args", None) or {}
    others = {key: value for key, value in given.items() if key not in KEYS}
    if len(others) < len(given):
        params.extra_args = {**others, RESOLVED: budget.to_plain()}


def received_budget(config: KVCompressConfig, params: Any) -> RequestBudget | None:
    """In the engine: the budget of a request; None: the configured one.

    Raises:
        ValueError: it asks for something and did not pass the front end, which would have refused
            it.
    """
    given = getattr(params, "extra_args", None)
    if not given:
        return None
    if RESOLVED in given:
        return RequestBudget.from_plain(given[RESOLVED])
    wish = request_wish(params)
    return None if wish is None else resolve(config, wish, f"{PREFIX}_")
