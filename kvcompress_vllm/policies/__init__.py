# SPDX-License-Identifier: Apache-2.0
"""Policies by name. A policy turns the statistics of every key into a score; higher means keep."""

from __future__ import annotations

from kvcompress_vllm.policies.base import Policy
from kvcompress_vllm.policies.kv_compress import KVCompress

_POLICIES: dict[str, type[Policy]] = {"kv_compress": KVCompress}


def names() -> tuple[str, ...]:
    """The accepted policy names."""
    return tuple(_POLICIES)


def create(name: str, pool: int) -> Policy:
    """Build a policy.

    Args:
        name: one of :func:`names`.
        pool: width of the pooling over neighbouring tokens.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in _POLICIES:
        raise ValueError(
            f"kv_compress: policy={name!r} is not accepted; it must be one of "
            f"{', '.join(_POLICIES)}"
        )
    return _POLICIES[name](pool)


__all__ = ["Policy", "create", "names"]
