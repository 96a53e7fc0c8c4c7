# SPDX-License-Identifier: Apache-2.0
"""What a single request may ask for, in ``vllm_xargs`` (HTTP) or ``SamplingParams.extra_args``.

    kv_compress                true or false: false keeps everything
    kv_compress_ratio          like the option ratio
    kv_compress_budget_tokens  like the option budget_tokens

Within the operator's limits ``min_ratio`` and ``max_ratio``. Checked in the front end, where a bad
value is the client's error (HTTP 400); an exception in the engine core would end it for everybody.
"""

from __future__ import annotations

from typing import Any

from kvcompress_vllm.budget import KEEP_ALL, Budget
from kvcompress_vllm.config import OPTIONS

PREFIX = "kv_compress"
SWITCH, RATIO, BUDGET = PREFIX, f"{PREFIX}_ratio", f"{PREFIX}_budget_tokens"


def request_budget(params: Any) -> Budget | None:
    """The budget that a request asked for; None: the configured one.

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
        if key not in (SWITCH, RATIO, BUDGET):
            raise ValueError(f"unknown {key}={value!r}; the keys are {SWITCH}, {RATIO}, {BUDGET}")
    if not asked:
        return None
    switch = asked.pop(SWITCH, True)
    # vLLM's protocol turns JSON's true and false into 1 and 0.
    if switch not in (0, 1):
        raise ValueError(f"{SWITCH}={switch!r} is not accepted; it must be true or false")
    if len(asked) == 2 or (asked and not switch):
        raise ValueError(
            f"{', '.join(f'{key}={value!r}' for key, value in asked.items())} "
            f"{'exclude each other' if switch else f'needs {SWITCH}=true'}"
        )
    for key, value in asked.items():
        option = OPTIONS[key.removeprefix(f"{PREFIX}_")]
        if not option.metadata["accepts"](value):
            raise ValueError(
                f"{key}={value!r} is not accepted; it must be {option.metadata['accepted']}"
            )
    if not switch:
        return KEEP_ALL
    if RATIO in asked:
        return Budget(ratio=float(asked[RATIO]))
    return Budget(budget_tokens=asked[BUDGET]) if BUDGET in asked else None


def check_request(params: Any, resumable: bool) -> None:
    """Refuse what a request must not ask of an engine that compresses.

    Raises:
        ValueError: naming what is wrong and what is accepted.
    """
    request_budget(params)
    if resumable:
        raise ValueError("kv_compress: resumable (streaming input) requests are not supported")
