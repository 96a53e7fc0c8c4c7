# SPDX-License-Identifier: Apache-2.0
"""From the configuration and what a request asked for to its budget: done once, and here only."""

from __future__ import annotations

from kvcompress_vllm import policies
from kvcompress_vllm.config.combinations import check_mass
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.rules import shown
from kvcompress_vllm.records.budget import RequestBudget, Wish

EXPECTED_RATIO = 4.0
"""Keys per kept key of a mass budget, until one is known."""
HIGHEST_RATIO = 16.0
"""Keys per kept key of a mass budget, where the operator sets no ``max_ratio``. Scores say what the
observed queries looked at; the more is dropped for it, the more that guess must be right."""


def resolve(config: KVCompressConfig, wish: Wish | None = None, prefix: str = "") -> RequestBudget:
    """The budget of a request.

    The operator's ``min_ratio`` and ``max_ratio`` bound what requests ask for. A mass is of the
    scores of the server's policy or, where those have none, of those of the default policy of
    masses; a mass of 1 keeps everything.

    Args:
        wish: what it asked for; its values are accepted ones.
        prefix: of the keys in error messages.

    Raises:
        ValueError: the server does not allow the policy, or does not know it, or a mass is asked of
            a policy that has none.
    """
    wish = wish or Wish()
    asked = not (wish.ratio is wish.budget_tokens is wish.mass is None)
    source = wish if asked else config
    ratio, tokens, mass = source.ratio, source.budget_tokens, source.mass
    policy = config.policy if wish.policy is None else wish.policy
    if policy != config.policy:
        _check_policy(config, policy, f"{prefix}policy")
    if mass is not None and not policies.find(policy).additive:
        if wish.policy is not None:
            check_mass(policy, f"{prefix}mass" if asked else "mass", mass)
        policy = policies.default(mass=True)
    own, kind = config.with_policy(policy), policies.find(policy)
    m = config.page_format.blocks_per_page
    least, most = config.min_ratio or 1.0, config.max_ratio
    if mass is not None:
        most = most or max(least, HIGHEST_RATIO * m)
        ratio = 1.0 if mass == 1 else min(most, max(least, EXPECTED_RATIO * m))
    elif not asked:
        least, most = 1.0, None
    observes_all = config.query_stride > 0 and kind.observes_all
    stride = wish.context_stride or config.context_stride or 0
    if wish.context_tokens is not None or mass is not None:
        stride = 0  # of a mass, what is kept is not known from tokens alone
    if wish.context_stride is not None:
        _check_stride(config, wish, prefix, mass)
    exact = (wish.exact or config.exact) != "off" and config.reads_echo(policy)
    if wish.exact not in (None, "off"):
        _check_exact(config, wish, policy, prefix)
    return RequestBudget(
        policy=policy,
        ratio=ratio,
        budget_tokens=tokens,
        mass=None if mass == 1 else mass,
        least_ratio=least,
        most_ratio=most,
        # Who names so few tokens means it.
        fewest_tokens=0 if tokens is not None else config.min_budget_tokens,
        min_prompt_tokens=config.min_prompt_tokens,
        sinks=own.sinks,
        recent=own.recent,
        min_tokens_per_head=own.min_tokens_per_head,
        protect=wish.protect,
        context_tokens=wish.context_tokens,
        query_stride=config.query_stride if observes_all else 0,
        history=kind.history if observes_all else None,
        blocks_per_page=m,
        context_stride=stride,
        exact=exact and wish.context_tokens is not None,
    )


def _check_stride(config: KVCompressConfig, wish: Wish, prefix: str, mass: float | None) -> None:
    asked = f"{prefix}context_stride={wish.context_stride}"
    if wish.context_tokens is not None:
        raise ValueError(f"{asked} and {prefix}context_tokens={wish.context_tokens} exclude each "
                         "other")  # fmt: skip
    for name, value in (("mass", mass), ("prefill_peak_tokens", config.prefill_peak_tokens)):
        if value is not None:
            raise ValueError(f"{asked} is not accepted with {name}={value}")


def _check_exact(config: KVCompressConfig, wish: Wish, policy: str, prefix: str) -> None:
    asked = f"{prefix}exact={wish.exact}"
    if wish.context_tokens is None:
        raise ValueError(f"{asked} needs {prefix}context_tokens: what is repeated is a context")
    if not config.reads_echo(policy):
        raise ValueError(f"{asked} needs a policy that reads echo scores; {policy!r} does not")
    for name in ("share", "prefill_peak_tokens"):
        if getattr(config, name) not in ("context", "auto", None):
            raise ValueError(
                f"{asked} is not accepted; this server has {name}={getattr(config, name)}"
            )


def _check_policy(config: KVCompressConfig, policy: str, key: str) -> None:
    allowed = config.allowed_policies()
    if policy not in allowed:
        only = "" if len(allowed) > 1 else " only (allow_policies=false)"
        raise ValueError(
            f"{key}={shown(policy)} is not accepted; this server uses "
            f"{', '.join(map(repr, allowed))}{only}"
        )
