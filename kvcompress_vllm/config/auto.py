# SPDX-License-Identifier: Apache-2.0
"""What ``auto`` stands for: what the policy prefers, and the shares that go with it."""

from __future__ import annotations

from typing import Any

from kvcompress_vllm import policies
from kvcompress_vllm.config.rules import Rule, refusal

AUTO = "auto"
GENERAL: dict[str, Any] = {
    "window": 8, "recent": 16, "pool": 15, "allocator": "global", "query_stride": 0,
}  # fmt: skip
"""What ``auto`` stands for where the policy names nothing else."""
PREFERRED_PAGES = "fp8"
"""What ``page_dtype`` is where the cache can have it: at equal memory it keeps more answers than 16
bits, at every ratio; docs/quality.md."""


def or_auto(rule: Rule) -> Rule:
    """The rule, or ``auto``."""
    accepted, accepts = rule
    return f"{accepted}, or {AUTO}", lambda value: value == AUTO or accepts(value)


def preferred(policy: type[policies.Policy], share: Any) -> dict[str, Any]:
    """What ``auto`` stands for with these scores and shares."""
    defaults = {k: v for k, v in vars(policy.defaults).items() if v is not None}
    parts = [policies.shares.find(name) for name in _named(share)]
    if parts:
        # Under `global` nothing is shared, and heads that do not compete have no shares either.
        of_heads = any(part.of_heads for part in parts)
        uniform = defaults.get("allocator") == "uniform" and not of_heads
        defaults["allocator"] = "uniform" if uniform else "layer"
        windows = [part.window for part in parts if part.window is not None]
        defaults["window"] = max([defaults.get("window", GENERAL["window"]), *windows])
    return defaults


def _named(share: Any) -> tuple[str, ...]:
    if not isinstance(share, str):
        raise refusal("shares", share, policies.shares.ACCEPTED)
    return policies.shares.named(share) or ()
