# SPDX-License-Identifier: Apache-2.0
"""Options of the policy itself, which are written ``policy_options.NAME`` or as a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

POLICY_OPTIONS = "policy_options"


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """``policy_options.NAME`` moved into the mapping ``policy_options``."""
    prefix = f"{POLICY_OPTIONS}."
    plain: dict[str, Any] = {}
    dotted: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(key, str) and key.startswith(prefix):
            dotted[key[len(prefix) :]] = value
        else:
            plain[key] = value
    if dotted and isinstance(plain.get(POLICY_OPTIONS, {}), Mapping):
        plain[POLICY_OPTIONS] = {**plain.get(POLICY_OPTIONS, {}), **dotted}
    return plain
