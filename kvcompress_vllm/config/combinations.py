# SPDX-License-Identifier: Apache-2.0
"""What options must not be combined with, and names that must be known."""

from __future__ import annotations

from typing import Any

from kvcompress_vllm import policies
from kvcompress_vllm.config.rules import refusal


def check_limits(
    least: float | None, ratio: float | None, most: float | None, hint: str = ""
) -> None:
    """Refuse a ratio outside the operator's own limits.

    Args:
        least: the option ``min_ratio``.
        most: the option ``max_ratio``.
        hint: where the ratio comes from.

    Raises:
        ValueError: naming both.
    """
    if least is not None and ratio is not None and least > ratio:
        raise refusal("min_ratio", least, f"at most ratio={ratio:g}{hint}")
    if most is not None and ratio is not None and most < ratio:
        raise refusal("max_ratio", most, f"at least ratio={ratio:g}{hint}")
    if least is not None and most is not None and most < least:
        raise refusal("max_ratio", most, f"at least min_ratio={least:g}")


def check_shares(shares: str, allocator: str, window: int) -> None:
    """Refuse shares that would change nothing.

    Raises:
        ValueError: naming what they cannot be combined with.
    """
    for name in policies.shares.named(shares) or ():
        part = policies.shares.find(name)
        needed = ("layer",) if part.of_heads else ("layer", "uniform")
        if allocator not in needed:
            raise ValueError(
                f"kv_compress: shares={shares!r} cannot be combined with "
                f"allocator={allocator!r}: {name!r} needs {' or '.join(needed)}"
            )
        if part.window is not None and window < 2:
            raise ValueError(
                f"kv_compress: shares={shares!r} cannot be combined with "
                f"window={window!r}: {name!r} compares at least 2 queries"
            )


def check_mass(policy: str, key: str, mass: float) -> None:
    """Refuse a mass of scores that do not add up to one.

    Args:
        key: under which the mass was given.

    Raises:
        ValueError: the policy's scores depend on the budget, which a mass is to decide.
    """
    if not policies.find(policy).additive:
        raise ValueError(
            f"kv_compress: {key}={mass!r} needs a policy whose scores do not depend on how much is "
            f"kept, such as {policies.default(mass=True)!r}; those of {policy!r} do"
        )


def check_exact(config: Any) -> None:
    """Refuse scores of a real repetition where nothing would be judged by them.

    Args:
        config: a ``KVCompressConfig``.

    Raises:
        ValueError: naming what they cannot be combined with.
    """
    if config.exact == "off":
        return
    if not config.stores_echo:
        raise ValueError(
            f"kv_compress: exact={config.exact!r} needs a policy that reads echo scores, such as "
            f"'echo'; policy={config.policy!r} does not"
        )
    if config.share == "off":
        raise ValueError(
            f"kv_compress: exact={config.exact!r} cannot be combined with share='off': it is for "
            "contexts that requests share"
        )
    if config.prefill_peak_tokens is not None:
        raise ValueError(
            f"kv_compress: exact={config.exact!r} cannot be combined with "
            f"prefill_peak_tokens={config.prefill_peak_tokens!r}: what is repeated must be whole"
        )


def check_stride(config: Any) -> None:
    """Refuse compressions at every multiple where those would not depend on tokens alone.

    Args:
        config: a ``KVCompressConfig``.

    Raises:
        ValueError: naming what they cannot be combined with.
    """
    for name in ("mass", "prefill_peak_tokens"):
        if config.context_stride is not None and getattr(config, name) is not None:
            raise ValueError(
                f"kv_compress: context_stride={config.context_stride!r} cannot be combined with "
                f"{name}={getattr(config, name)!r}"
            )


def named_policies(value: Any) -> Any:
    """``allow_policies`` as a tuple of names where it names some."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split("+")]
    if not isinstance(value, list | tuple):
        return value
    for name in value:
        if name not in policies.names():
            accepted = f"true, false or some of {', '.join(policies.names())}, joined by +"
            raise refusal("allow_policies", name, accepted)
    return tuple(dict.fromkeys(value))
