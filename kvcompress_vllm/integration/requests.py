# SPDX-License-Identifier: Apache-2.0
"""What a single request may ask for, in ``vllm_xargs`` (HTTP) or ``SamplingParams.extra_args``.

    kv_compress                true or false: false keeps everything
    kv_compress_ratio          like the option ratio
    kv_compress_budget_tokens  like the option budget_tokens
    kv_compress_policy         like the option policy, where allow_policies is set

Within the operator's limits ``min_ratio`` and ``max_ratio``. Checked in the front end, where a bad
value is the client's error (HTTP 400); an exception in the engine core would end it for everybody.
"""

from __future__ import annotations

from typing import Any

from kvcompress_vllm.budget import KEEP_ALL, Wish
from kvcompress_vllm.config import OPTIONS, KVCompressConfig

PREFIX = "kv_compress"
SWITCH, RATIO = PREFIX, f"{PREFIX}_ratio"
BUDGET, POLICY = f"{PREFIX}_budget_tokens", f"{PREFIX}_policy"
KEYS = (SWITCH, RATIO, BUDGET, POLICY)


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
            raise ValueError(f"unknown {key}={value!r}; the keys are {', '.join(KEYS)}")
    if not asked:
        return None
    switch = asked.pop(SWITCH, True)
    # vLLM's protocol turns JSON's true and false into 1 and 0.
    if switch not in (0, 1):
        raise ValueError(f"{SWITCH}={switch!r} is not accepted; it must be true or false")
    if {RATIO, BUDGET} <= asked.keys() or (asked and not switch):
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
    ratio = asked.get(RATIO)
    wish = Wish(None if ratio is None else float(ratio), asked.get(BUDGET), asked.get(POLICY))
    return None if wish == Wish() else wish


def check_request(config: KVCompressConfig, params: Any, resumable: bool) -> None:
    """Refuse what a request must not ask of an engine that compresses.

    Raises:
        ValueError: naming what is wrong and what is accepted.
    """
    wish = request_wish(params)
    if wish is not None and wish.policy not in (None, config.policy):
        if not config.allow_policies:
            raise ValueError(
                f"{POLICY}={wish.policy!r} is not accepted; this server uses {config.policy!r} "
                "only (allow_policies=false)"
            )
        config.with_policy(wish.policy)
    if resumable:
        raise ValueError("kv_compress: resumable (streaming input) requests are not supported")
