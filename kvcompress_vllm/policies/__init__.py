# SPDX-License-Identifier: Apache-2.0
"""Policies by name. A policy turns what is known of every key into a score; higher means keep.

Other packages add policies through the entry-point group ``kvcompress_vllm.policies``: the name of
the entry point is the policy's name, and it loads a subclass of :class:`Policy`. Nothing of them is
imported until a configuration names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from kvcompress_vllm.config.rules import refusal
from kvcompress_vllm.policies.adakv import AdaKV
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy
from kvcompress_vllm.policies.cake import Cake
from kvcompress_vllm.policies.diverse import Diverse
from kvcompress_vllm.policies.expected_attention import ExpectedAttention
from kvcompress_vllm.policies.h2o import H2O
from kvcompress_vllm.policies.keydiff import KeyDiff
from kvcompress_vllm.policies.knorm import KNorm
from kvcompress_vllm.policies.kv_compress import KVCompress
from kvcompress_vllm.policies.mean_attention import MeanAttention
from kvcompress_vllm.policies.pyramidkv import PyramidKV
from kvcompress_vllm.policies.random_keys import RandomKeys
from kvcompress_vllm.policies.roco import RoCo
from kvcompress_vllm.policies.scissorhands import Scissorhands
from kvcompress_vllm.policies.snapkv import SnapKV
from kvcompress_vllm.policies.streaming import Streaming
from kvcompress_vllm.policies.tova import Tova

ENTRY_POINTS = "kvcompress_vllm.policies"
BUILT_IN: dict[str, type[Policy]] = {
    "kv_compress": KVCompress,
    "diverse": Diverse,
    "roco": RoCo,
    "cake": Cake,
    "scissorhands": Scissorhands,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "h2o": H2O,
    "tova": Tova,
    "mean_attention": MeanAttention,
    "keydiff": KeyDiff,
    "knorm": KNorm,
    "expected_attention": ExpectedAttention,
    "streaming": Streaming,
    "random": RandomKeys,
}


def names() -> tuple[str, ...]:
    """The accepted policy names: ours, then those of other installed packages."""
    others = {entry.name for entry in metadata.entry_points(group=ENTRY_POINTS)}
    return (*BUILT_IN, *sorted(others - BUILT_IN.keys()))


def default(mass: bool) -> str:
    """The policy where none is named; ``mass``: for a budget that is a share of its scores."""
    return "kv_compress" if mass else "diverse"


def observing_all() -> tuple[str, ...]:
    """Those of ours that judge by all queries."""
    return tuple(name for name, policy in BUILT_IN.items() if policy.observes_all)


def find(name: str) -> type[Policy]:
    """The class of a policy. A name of ours cannot be taken by another package.

    Raises:
        ValueError: the name is unknown, or its entry point does not load a :class:`Policy`.
    """
    if not isinstance(name, str):
        raise refusal("policy", name, f"one of {', '.join(names())}")
    if name in BUILT_IN:
        return BUILT_IN[name]
    for entry in metadata.entry_points(group=ENTRY_POINTS, name=name):
        try:
            policy = entry.load()
        except Exception as error:  # anything can go wrong in another package's import
            raise ValueError(
                f"kv_compress: policy={name!r} cannot be loaded from {entry.value}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise ValueError(
                f"kv_compress: policy={name!r} from {entry.value} is no subclass of "
                "kvcompress_vllm.policies.Policy"
            )
        return policy
    raise refusal("policy", name, f"one of {', '.join(names())}")


def create(name: str, pool: int, options: Mapping[str, Any]) -> Policy:
    """Build a policy.

    Args:
        name: one of :func:`names`.
        pool: width of the pooling over neighbouring tokens.
        options: the policy's own options, by name.

    Raises:
        ValueError: the name or an option is unknown, or a value is not accepted.
    """
    policy = find(name)
    known = policy.options()
    for key, value in options.items():
        if key not in known:
            accepted = f"its options are {', '.join(known)}" if known else "it has none"
            raise ValueError(
                f"kv_compress: unknown policy_options.{key} for policy={name!r}; {accepted}"
            )
        if not known[key].metadata["accepts"](value):
            raise refusal(f"policy_options.{key}", value, known[key].metadata["accepted"])
    return policy(pool=pool, **options)


__all__ = [
    "BUILT_IN",
    "ENTRY_POINTS",
    "Defaults",
    "Evidence",
    "Policy",
    "create",
    "find",
    "names",
    "observing_all",
]
