# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the JSON of an HTTP request, before vLLM reads it into its protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompress_vllm.integration.frontend.wish import (
    KEYS,
    SWITCH,
    XARGS,
    meant,
    misspelt,
    parse,
    shown_key,
)


def check_body(body: Mapping[str, Any]) -> None:
    """Refuse in the JSON of an HTTP request what vLLM would drop or change before we see it.

    Fields that it does not know are ignored, and in ``vllm_xargs`` it turns true into 1.

    Raises:
        ValueError: naming the key and where it belongs, or what its value must be.
    """
    tokens_in = "token_ids" in body  # /inference/v1/generate
    right = "sampling_params.extra_args" if tokens_in else XARGS
    _misplaced(body, "the body", right)
    # What the Python client has arguments for, sent as it stands.
    for name in ("extra_body", "extra_args", "sampling_params"):
        inner = body.get(name)
        if isinstance(inner, Mapping):
            _misplaced(inner, name, right)
            if isinstance(inner.get(XARGS), Mapping):
                _misplaced(inner[XARGS], f"{name}.{XARGS}", right)
    given = body.get(XARGS)
    if not isinstance(given, Mapping):
        return
    if tokens_in:
        _misplaced(given, XARGS, right)
    parse(given)
    budgets = [key for key in KEYS if key in given and key != SWITCH]
    if body.get("use_beam_search") and budgets:
        raise ValueError(
            f"{budgets[0]} is not accepted with use_beam_search; it must be left out: beams are "
            "never compressed"
        )


def _misplaced(given: Mapping[Any, Any], where: str, right: str) -> None:
    key = next((key for key in KEYS if key in given), None) or misspelt(given)
    if key is not None:
        known = "" if key in KEYS else f"; {meant(key)}"
        raise ValueError(
            f"{shown_key(key)} in {where} is not accepted; it must be in {right}{known}"
        )
