# SPDX-License-Identifier: Apache-2.0
"""Policies. A policy turns what is known of every key into a score; higher means keep.

Importing this package loads none of them, and no PyTorch; see ``registry.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcompress_vllm.policies import shares
from kvcompress_vllm.policies.registry import (
    BUILT_IN,
    ENTRY_POINTS,
    create,
    default,
    find,
    names,
    observing_all,
    options_of,
    others,
    shares_of,
)

if TYPE_CHECKING:
    from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


def __getattr__(name: str) -> Any:
    if name in ("Defaults", "Evidence", "Policy"):
        from kvcompress_vllm.policies import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BUILT_IN",
    "ENTRY_POINTS",
    "Defaults",
    "Evidence",
    "Policy",
    "create",
    "default",
    "find",
    "names",
    "observing_all",
    "options_of",
    "others",
    "shares",
    "shares_of",
]
