# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the JSON of an HTTP request, before vLLM reads it into its protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.integration.frontend.wish import (
    KEYS,
    SWITCH,
    XARGS,
    meant,
    misspelt,
    parse,
    shown_key,
)

KEEP_NO_XARGS = ("/generative_scoring", "/cohere/v2/chat")
"""Ends of the paths of routes that read a body with ``vllm_xargs`` and hand them on to nobody."""


def check_body(
    body: Mapping[str, Any], config: KVCompressConfig | None = None, path: str = ""
) -> None:
    """Refuse in the JSON of an HTTP request what vLLM would drop or change before we see it.

    Fields that it does not know are ignored, and in ``vllm_xargs`` it turns true into 1.

    Args:
        config: of the server; None: not known.
        path: of the route.

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
    ours = [key for key in KEYS if key in given]
    if ours and path.endswith(KEEP_NO_XARGS):
        raise ValueError(
            f"{ours[0]} is not accepted by {path}, where vLLM drops vllm_xargs; it must be left out"
        )
    if body.get("use_beam_search"):
        _beams(given, ours, config)


def _beams(given: Mapping[Any, Any], ours: Sequence[str], config: KVCompressConfig | None) -> None:
    """vLLM hands no ``vllm_xargs`` to the requests that it makes of beams: of one token each, which
    end before they would be compressed, unless that happens within the prompt."""
    budgets = [key for key in ours if key != SWITCH]
    if budgets:
        raise ValueError(
            f"{budgets[0]} is not accepted with use_beam_search; it must be left out: beams are "
            "not compressed as requests ask"
        )
    if config is None or SWITCH not in ours or given[SWITCH]:
        return
    options = ("context_stride", "prefill_peak_tokens")
    why = [f"{name}={getattr(config, name)}" for name in options if getattr(config, name)]
    if why or config.share == "auto":
        raise ValueError(
            f"{SWITCH}=false is not accepted with use_beam_search by a server with "
            f"{why[0] if why else 'share=auto'}, which compresses the prompts of beams; one of "
            "both must be left out"
        )


def _misplaced(given: Mapping[Any, Any], where: str, right: str) -> None:
    key = next((key for key in KEYS if key in given), None) or misspelt(given)
    if key is not None:
        known = "" if key in KEYS else f"; {meant(key)}"
        raise ValueError(
            f"{shown_key(key)} in {where} is not accepted; it must be in {right}{known}"
        )
