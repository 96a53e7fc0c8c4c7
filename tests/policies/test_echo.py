# SPDX-License-Identifier: Apache-2.0
"""What echo scores are multiplied by. What Echo keeps in all: test_parity.py."""

from __future__ import annotations

import torch

from kvcompress_vllm import ops
from kvcompress_vllm.policies import Evidence
from kvcompress_vllm.policies.echo import Echo


def evidence(absent: torch.Tensor | None, **statistics: torch.Tensor) -> Evidence:
    """Two heads of ten columns, of which the first key and the last two are shielded."""
    return Evidence(
        layers=1, heads=2, group=1, num_keys=10, num_kept=5, seq_len=12, num_queries=4,
        num_sinks=1, num_recent=2, scale=1.0, device=torch.device("cpu"), absent=absent,
        statistics={getattr(ops, name): of_keys for name, of_keys in statistics.items()},
    )  # fmt: skip


def test_only_keys_that_are_there_and_open_make_the_mean() -> None:
    absent = torch.tensor([[True] * 3 + [False] * 7, [False] * 10])
    norms = torch.full((2, 10), 2.0)
    norms[0, :4], norms[1, 0], norms[:, 8:] = 1e6, 1e6, 1e6  # not there, or shielded
    norms[1, 3] = 13.0  # of 4 + 7 open keys: their mean is 3
    echo = torch.full((2, 10), 0.3).masked_fill(absent, 0)
    scores = Echo(weight=0.0).score(evidence(absent, ECHO=echo, VALUE_NORM=norms))
    torch.testing.assert_close(scores[0, 4:8], torch.full((4,), 0.2))
    torch.testing.assert_close(scores[1, 1:8], torch.tensor([0.2, 0.2, 1.3] + [0.2] * 4))


def test_values_without_length_leave_the_last_queries() -> None:
    nothing, window = torch.zeros(2, 10), torch.rand(2, 10)
    known = evidence(None, ECHO=torch.rand(2, 10), VALUE_NORM=nothing, MAXIMUM=window)
    assert Echo(pool=1, norm="L2", weight=1.0).score(known).equal(window.square())


def test_only_what_it_reads_is_measured() -> None:
    assert Echo().channels == (ops.MAXIMUM, ops.VALUE_NORM, ops.ECHO)
    assert Echo(value_norms=False).channels == (ops.MAXIMUM, ops.ECHO)
    assert Echo(weight=0.0).channels == (ops.VALUE_NORM, ops.ECHO)
    assert Echo(weight=0.0, value_norms=False).channels == (ops.ECHO,)
