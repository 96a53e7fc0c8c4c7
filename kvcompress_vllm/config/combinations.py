# SPDX-License-Identifier: Apache-2.0
"""What options must not be combined with, and names that must be known."""

from __future__ import annotations

from typing import Any

from kvcompress_vllm import policies
from kvcompress_vllm.config.rules import refusal

BUDGETS = ("ratio", "budget_tokens", "mass")
"""How much is kept; exclude each other."""


def check_budgets(config: Any) -> None:
    """Refuse more than one way to say how much is kept.

    Args:
        config: a ``KVCompressConfig``.

    Raises:
        ValueError: naming those that are given.
    """
    given = [f"{name}={getattr(config, name)!r}" for name in BUDGETS if getattr(config, name)]
    if len(given) > 1:
        raise ValueError(f"kv_compress: {' and '.join(given)} exclude each other; give exactly one")


def check_combinations(config: Any, hint: str = "") -> None:
    """Refuse options that do not go together.

    Args:
        config: a ``KVCompressConfig``; each of its options is accepted by itself.
        hint: where its ratio comes from.

    Raises:
        ValueError: naming both sides.
    """
    _check_limits(config.min_ratio, config.ratio, config.max_ratio, hint)
    _check_query_stride(config)
    _check_shares(config.shares, config.allocator, config.window)
    _check_exact(config)
    _check_stride(config)


def _check_limits(least: float | None, ratio: float | None, most: float | None, hint: str) -> None:
    """Refuse a ratio outside the operator's own limits, ``min_ratio`` and ``max_ratio``."""
    if least is not None and ratio is not None and least > ratio:
        raise refusal("min_ratio", least, f"at most ratio={ratio:g}{hint}")
    if most is not None and ratio is not None and most < ratio:
        raise refusal("max_ratio", most, f"at least ratio={ratio:g}{hint}")
    if least is not None and most is not None and most < least:
        raise refusal("max_ratio", most, f"at least min_ratio={least:g}")


def _check_query_stride(config: Any) -> None:
    """Refuse observation of all queries where no policy would judge by them."""
    observes_all = policies.find(config.policy).observes_all
    if config.query_stride and not (observes_all or config.allow_policies):
        raise ValueError(
            f"kv_compress: query_stride={config.query_stride!r} is for policies that judge by all "
            f"queries ({', '.join(policies.observing_all())}); {config.policy!r} does not"
        )


def _check_shares(shares: str, allocator: str, window: int) -> None:
    """Refuse shares that would change nothing."""
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


def _check_exact(config: Any) -> None:
    """Refuse scores of a real repetition where nothing would be judged by them."""
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


def _check_stride(config: Any) -> None:
    """Refuse compressions at every multiple where those would not depend on tokens alone."""
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
