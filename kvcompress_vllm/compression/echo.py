# SPDX-License-Identifier: Apache-2.0
"""Echo scores of what was decoded, from the observation ring. Letters as in ``cache/layout.py``.

Those of prompts are written in the attention forward (``integration/worker/attention.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.compression.batch import Rank, padded_rows
from kvcompress_vllm.records.plan import Heard
from kvcompress_vllm.scheduling.segments import DECODED, SEGMENT


class Rotation(NamedTuple):
    """Arguments of ``ops.echo_scores`` for one layer."""

    angles: Tensor
    """``[n, 2]`` fp32, cosine and sine by pair; n = 0: the layer does not rotate."""
    interleaved: bool


def score_heard(
    rank: Rank, rotations: Sequence[Rotation], num_sinks: int, heard: Sequence[Heard]
) -> None:
    """Store the echo scores of decoded tokens, before a compression moves their keys.

    Args:
        rotations: by layer.
        heard: neither crosses a multiple of :data:`SEGMENT`.
    """
    state, device = rank.state, rank.pages.device
    if not heard or state.echo is None:
        return
    window = state.window
    rows = padded_rows([item.blocks for item in heard], device)
    seq_lens = to_device([item.end for item in heard], torch.int32, device)
    state_slots = state.state_slots(rows)
    segments = to_device(
        [
            [row, item.first, item.end, item.observe_slot * window + item.first % window]
            for row, item in enumerate(heard)
        ],
        torch.int32,
        device,
    )
    longest = max(item.end - item.first for item in heard)
    for layer, rotation in enumerate(rotations):
        ops.echo_scores(
            state.ring[layer].flatten(0, 1),
            rank.pages,
            rows,
            seq_lens,
            state_slots,
            *state.tables,
            segments,
            rotation.angles,
            layer,
            DECODED if longest <= DECODED else SEGMENT,
            num_sinks,
            rotation.interleaved,
            rank.group.scale,
            state.echo,
            **state.logits(layer),
        )
