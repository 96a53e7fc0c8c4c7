# SPDX-License-Identifier: Apache-2.0
"""What a single request may ask for, in ``vllm_xargs`` (HTTP) or ``SamplingParams.extra_args``.

    kv_compress                true or false: false keeps everything
    kv_compress_ratio          like the option ratio
    kv_compress_budget_tokens  like the option budget_tokens
    kv_compress_mass           like the option mass
    kv_compress_policy         like the option policy, where allow_policies is set
    kv_compress_context_tokens compress once so many tokens of the prompt are computed; what follows
                               (a question) reads the compressed context
    kv_compress_protect        token positions that are never evicted: "0:120" or "0:120,300:340",
                               ends excluded, counted from the start of the prompt

Within the operator's limits ``min_ratio`` and ``max_ratio``. Checked in the front end, where a bad
value is the client's error (HTTP 400); an exception in the engine core would end it for everybody.
"""

from __future__ import annotations

import re
from typing import Any

from kvcompress_vllm.config.options import OPTIONS, KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.config.rules import integer, shown
from kvcompress_vllm.integration.engine.kv_cache import most_needed
from kvcompress_vllm.records.budget import KEEP_ALL, RequestBudget, Wish
from kvcompress_vllm.scheduling.need import blocks_needed
from kvcompress_vllm.scheduling.sizes import Limits, Sizes

PREFIX = "kv_compress"
SWITCH, RATIO = PREFIX, f"{PREFIX}_ratio"
BUDGET, POLICY = f"{PREFIX}_budget_tokens", f"{PREFIX}_policy"
MASS = f"{PREFIX}_mass"
CONTEXT, PROTECT = f"{PREFIX}_context_tokens", f"{PREFIX}_protect"
KEYS = (SWITCH, RATIO, BUDGET, MASS, POLICY, CONTEXT, PROTECT)
MOST_RANGES = 64
"""Protected ranges of a request; each takes a little work at every compression."""


def request_wish(params: Any) -> Wish | None:
    """What a request asked for; None: nothing, all is as configured.

    Args:
        params: its ``SamplingParams``, or None.

    Raises:
        ValueError: an unknown key, a bad value, or keys that exclude each other.
    """
    given = getattr(params, "extra_args", None)
    if not given:
        return None
    asked = {key: value for key, value in given.items() if key.startswith(PREFIX)}
    for key, value in asked.items():
        if key not in KEYS:
            raise ValueError(f"unknown {key}={shown(value)}; the keys are {', '.join(KEYS)}")
    if not asked:
        return None
    switch = asked.pop(SWITCH, True)
    # vLLM's protocol turns JSON's true and false into 1 and 0.
    if switch not in (0, 1):
        raise ValueError(f"{SWITCH}={shown(switch)} is not accepted; it must be true or false")
    if asked and not switch:
        listed = ", ".join(f"{key}={shown(value)}" for key, value in asked.items())
        raise ValueError(f"{listed} needs {SWITCH}=true")
    budgets = [f"{key}={shown(asked[key])}" for key in (RATIO, BUDGET, MASS) if key in asked]
    if len(budgets) > 1:
        raise ValueError(f"{' and '.join(budgets)} exclude each other")
    protect = _ranges(asked.pop(PROTECT, ""))
    context = asked.pop(CONTEXT, None)
    if context is not None and not _POSITIVE[1](context):
        raise ValueError(f"{CONTEXT}={shown(context)} is not accepted; it must be {_POSITIVE[0]}")
    for key, value in asked.items():
        option = OPTIONS[key.removeprefix(f"{PREFIX}_")]
        if not option.metadata["accepts"](value):
            raise ValueError(
                f"{key}={shown(value)} is not accepted; it must be {option.metadata['accepted']}"
            )
    if not switch:
        return KEEP_ALL
    ratio = asked.get(RATIO)
    ratio = None if ratio is None else float(ratio)
    wish = Wish(ratio, asked.get(BUDGET), asked.get(POLICY), context, protect, asked.get(MASS))
    return None if wish == Wish() else wish


_POSITIVE = integer(1)


def _ranges(given: Any) -> tuple[tuple[int, int], ...]:
    """Protected positions: ascending, and where they touch or overlap one."""
    texts = given if isinstance(given, list | tuple) else [given]
    ranges: list[tuple[int, int]] = []
    for text in texts:
        for part in filter(None, text.split(",") if isinstance(text, str) else [None]):
            found = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", part)
            if found is None or int(found[1]) >= int(found[2]):
                raise _bad_ranges(given)
            ranges.append((int(found[1]), int(found[2])))
        if not isinstance(text, str):
            raise _bad_ranges(given)
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    if len(merged) > MOST_RANGES:
        raise _bad_ranges(given)
    return tuple(merged)


def _bad_ranges(given: Any) -> ValueError:
    return ValueError(
        f"{PROTECT}={shown(given)} is not accepted; it must be at most {MOST_RANGES} ranges "
        'start:end of token positions, start < end, such as "0:120,300:340"'
    )


def check_length(config: KVCompressConfig, vllm_config: Any, request: Any) -> None:
    """Refuse a request that could not finish even alone in an empty pool: all others would wait
    behind it. Where ``prefill_peak_tokens`` is set, the KV cache need not hold the longest request.

    Args:
        request: vLLM's ``EngineCoreRequest``.

    Raises:
        ValueError: with the blocks that it could take and those that there are for one.
    """
    params = request.sampling_params
    if params is None:
        return
    budget = resolve(config, request_wish(params))
    longest, prompt = vllm_config.model_config.max_model_len, _prompt_tokens(request)
    length = min(longest, prompt + (params.max_tokens or longest))
    cache = vllm_config.cache_config
    sizes = Sizes(budget, Limits.of(config, cache.block_size, longest))
    needed = blocks_needed(sizes, config.window, length)
    # What vLLM made sure of when it started. The front end of several engines knows the sum of
    # their blocks only.
    most = most_needed(config, cache.block_size, longest)
    blocks = getattr(cache, "num_gpu_blocks", None)
    if blocks and vllm_config.parallel_config.data_parallel_size == 1:
        most = blocks - 1  # the null block is nobody's
    if needed > most:
        raise ValueError(
            f"kv_compress: a prompt of {prompt} tokens and an output of {length - prompt} may take "
            f"{needed} blocks of {cache.block_size} tokens as this request wants to keep them; "
            f"with prefill_peak_tokens={config.prefill_peak_tokens} a request has {most}"
        )


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


def send_budget(config: KVCompressConfig, params: Any) -> None:
    """Put a checked request's budget into its own ``SamplingParams``, instead of what it asked for.

    A request that asked for nothing needs none: the engine knows the configured budget.
    """
    wish = request_wish(params)
    if wish is None:
        return
    others = {key: value for key, value in params.extra_args.items() if key not in KEYS}
    params.extra_args = {**others, RESOLVED: resolve(config, wish).to_plain()}


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
