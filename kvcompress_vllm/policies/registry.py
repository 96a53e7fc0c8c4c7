# SPDX-License-Identifier: Apache-2.0
"""Policies by name: ours, and those of other installed packages. Loads none before it is named.

Other packages add policies through the entry-point group ``kvcompress_vllm.policies``: the name of
the entry point is the policy's name, and it loads a subclass of :class:`Policy`. What is installed
is read once per process, and what was loaded, or could not be, is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from kvcompress_vllm.config.rules import refusal
from kvcompress_vllm.ops.channels import ATTENTION_CHANNELS, CHANNELS, channel_mask
from kvcompress_vllm.policies import shares

if TYPE_CHECKING:
    from kvcompress_vllm.policies.base import Policy
    from kvcompress_vllm.policies.shares.base import Shares

ENTRY_POINTS = "kvcompress_vllm.policies"
BUILT_IN: dict[str, str] = {
    "kv_compress": "kv_compress:KVCompress",
    "diverse": "diverse:Diverse",
    "echo": "echo:Echo",
    "roco": "roco:RoCo",
    "cake": "cake:Cake",
    "scissorhands": "scissorhands:Scissorhands",
    "snapkv": "snapkv:SnapKV",
    "pyramidkv": "pyramidkv:PyramidKV",
    "adakv": "adakv:AdaKV",
    "h2o": "h2o:H2O",
    "tova": "tova:Tova",
    "mean_attention": "mean_attention:MeanAttention",
    "keydiff": "keydiff:KeyDiff",
    "knorm": "knorm:KNorm",
    "expected_attention": "expected_attention:ExpectedAttention",
    "streaming": "streaming:Streaming",
    "random": "random_keys:RandomKeys",
}
"""``module:class`` in this folder, by name."""

MOST_SUMMED = 3
"""Channels of the attention that accumulated statistics have room for (``cache/state.py``)."""


def names() -> tuple[str, ...]:
    """The accepted policy names: ours, then those of other installed packages."""
    return (*BUILT_IN, *others())


def others() -> tuple[str, ...]:
    """Names of the policies of other installed packages."""
    return tuple(sorted(_installed().keys() - BUILT_IN.keys()))


def default(mass: bool) -> str:
    """The policy where none is named; ``mass``: for a budget that is a share of its scores."""
    return "kv_compress" if mass else "echo"


def observing_all() -> tuple[str, ...]:
    """Those of ours that judge by all queries."""
    return tuple(name for name in BUILT_IN if find(name).observes_all)


def find(name: str) -> type[Policy]:
    """The class of a policy. A name of ours cannot be taken by another package.

    Raises:
        ValueError: the name is unknown, or its entry point does not load a :class:`Policy`.
    """
    if not isinstance(name, str) or (name not in BUILT_IN and name not in _installed()):
        raise refusal("policy", name, f"one of {', '.join(names())}")
    found = _load(name)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def create(name: str, pool: int, options: Mapping[str, Any], share: str = shares.AUTO) -> Policy:
    """Build a policy.

    Args:
        name: one of :func:`names`.
        pool: width of the pooling over neighbouring tokens.
        options: the options of the policy and of its shares, by name.
        share: how layers and heads share, as the option ``shares``.

    Raises:
        ValueError: the name or an option is unknown, a value is not accepted, the shares do not go
            with the policy, or the policy of another package cannot be built or asks for channels
            that there are not.
    """
    policy, chosen = find(name), shares_of(name, share)
    known = options_of(name, share)
    for key, value in options.items():
        if key not in known:
            accepted = f"its options are {', '.join(known)}" if known else "it has none"
            given = "" if share == shares.AUTO else f" with shares={share!r}"
            raise ValueError(
                f"kv_compress: unknown policy_options.{key} for policy={name!r}{given}; {accepted}"
            )
        if not known[key].metadata["accepts"](value):
            raise refusal(f"policy_options.{key}", value, known[key].metadata["accepted"])
    own = policy.options()
    try:
        built = policy(pool=pool, **{key: options[key] for key in options if key in own})
    except Exception as error:  # its __post_init__, or a method that it leaves abstract
        raise ValueError(
            f"kv_compress: policy={name!r} cannot be built: {type(error).__name__}: {error}"
        ) from error
    check_channels(name, built)
    if share == shares.AUTO and not chosen:
        return built  # those of another package bring their own
    from kvcompress_vllm.policies.combined import Combined

    parts: dict[bool, Shares] = {}
    for part in map(shares.find, chosen):
        parts[part.of_heads] = part(**{k: options[k] for k in options if k in part.options()})
    return Combined(pool=pool, scorer=built, layers=parts.get(False), heads=parts.get(True))


def shares_of(name: str, share: str) -> tuple[str, ...]:
    """Names of the shares that go with a policy.

    Raises:
        ValueError: they are unknown, or need what the policy does not observe.
    """
    policy, chosen = find(name), shares.named(share)
    if chosen is None:
        return policy.own_shares
    for part in chosen:
        if policy.observes_all and channel_mask(shares.find(part).channels) & ATTENTION_CHANNELS:
            raise ValueError(
                f"kv_compress: shares={share!r} cannot be combined with policy={name!r}: "
                f"{part!r} looks at the attention of the last queries, and {name!r} at all"
            )
    return chosen


def options_of(name: str, share: str = shares.AUTO) -> dict[str, Any]:
    """What ``policy_options`` may set of a policy and its shares, by name."""
    known = find(name).options()
    for part in shares_of(name, share):
        known.update(shares.find(part).options())
    return known


def check_channels(name: str, policy: Policy) -> None:
    """Refuse channels that do not exist, twice the same, or too many to be summed up.

    Raises:
        ValueError: naming policy and channels.
    """
    channels = policy.channels
    known = range(len(CHANNELS))
    if len(set(channels)) != len(channels) or any(channel not in known for channel in channels):
        raise ValueError(
            f"kv_compress: policy={name!r} has channels={channels!r}; they must be some of "
            f"kvcompress_vllm.ops.{', '.join(CHANNELS)}, each once"
        )
    summed = (channel_mask(channels) & ATTENTION_CHANNELS).bit_count()
    if policy.observes_all and summed > MOST_SUMMED:
        raise ValueError(
            f"kv_compress: policy={name!r} judges by all queries with {summed} channels of the "
            f"attention; there is room for {MOST_SUMMED}"
        )


@cache
def _installed() -> Mapping[str, metadata.EntryPoint]:
    """Entry points of other packages, by name; of two of one name the first."""
    entries = list(metadata.entry_points(group=ENTRY_POINTS))
    return {entry.name: entry for entry in reversed(entries)}


@cache
def _load(name: str) -> type[Policy] | str:
    """The class; or why it cannot be loaded."""
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        found: type[Policy] = getattr(
            import_module(f"kvcompress_vllm.policies.{module}"), attribute
        )
        return found
    from kvcompress_vllm.policies.base import Policy

    entry = _installed()[name]
    try:
        policy = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anything can go wrong in another package, sys.exit included
        return (
            f"kv_compress: policy={name!r} cannot be loaded from {entry.value}: "
            f"{type(error).__name__}: {error}"
        )
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        return (
            f"kv_compress: policy={name!r} from {entry.value} is no subclass of "
            "kvcompress_vllm.policies.Policy"
        )
    return policy
