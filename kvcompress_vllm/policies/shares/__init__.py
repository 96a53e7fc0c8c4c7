# SPDX-License-Identifier: Apache-2.0
"""Shares by name: how a budget is divided between layers, and between the heads of one.

They combine with any policy's scores: ``policy=diverse,shares=cake+adakv``. One file per paper.
Nothing is loaded before it is named.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from kvcompress_vllm.config.rules import refusal

if TYPE_CHECKING:
    from kvcompress_vllm.policies.shares.base import Shares

BUILT_IN = {
    "cake": "cake:CakeLayers",
    "pyramidkv": "pyramidkv:PyramidLayers",
    "scissorhands": "scissorhands:LaterLayers",
    "adakv": "adakv:AdaHeads",
}
"""``module:class`` in this folder, by name."""
AUTO, NONE = "auto", "none"
ACCEPTED = (
    f"{AUTO} (the policy's own), {NONE}, or of {', '.join(BUILT_IN)} one for layers, one for "
    "heads, or both joined by +"
)


@cache
def find(name: str) -> type[Shares]:
    """The class of shares of this name, which is one of :data:`BUILT_IN`."""
    module, attribute = BUILT_IN[name].split(":")
    found: type[Shares] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return found


def named(text: str) -> tuple[str, ...] | None:
    """The names in an option's value; None: the policy's own.

    Raises:
        ValueError: an unknown name, or two that divide the same.
    """
    if text == AUTO:
        return None
    if text == NONE:
        return ()
    names = tuple(name.strip() for name in text.split("+"))
    if any(name not in BUILT_IN for name in names):
        raise refusal("shares", text, ACCEPTED)
    if len({find(name).of_heads for name in names}) < len(names):
        raise refusal("shares", text, ACCEPTED)
    return names
