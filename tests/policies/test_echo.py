# SPDX-License-Identifier: Apache-2.0
"""Echo keeps the keys that a literal implementation keeps, whatever scores are stored.

How echo scores come about: tests/ops/test_echo_scores.py.
"""

from __future__ import annotations

import pytest
import torch

from kvcompress_vllm import ops
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.policies import Evidence
from kvcompress_vllm.policies.echo import Echo
from tests.policies import literal
from tests.policies.prompts import setting
from tests.policies.test_parity import assert_same_choice
from tests.test_compressor import SLOTS, B, D, G, H, L, Paged, W, scaled

OPTIONS = [
    {},
    {"value_norms": False},
    {"norm": "L1"},
    {"weight": 0.25},
    {"weight": 0.0},
    {"value_norms": False, "norm": "L1", "weight": 0.5},
    {"value_norms": False, "weight": 0.0},
]


class Echoing(Paged):
    """A request whose keys have echo scores, ``[n, L * H, 2 * D + 1]`` as the last of each."""

    def __init__(self, config: KVCompressConfig) -> None:
        super().__init__(config)
        self.state.echo = torch.full((200 * SLOTS, B), float("nan"))
        self.vectors = torch.empty(0, SLOTS, 2 * D + 1)

    def append(self, vectors: torch.Tensor) -> None:
        assert self.state.echo is not None
        for vector in vectors:
            super().append(vector[None, :, : 2 * D])
            page = self.row[-1] * SLOTS + torch.arange(SLOTS)
            self.state.echo[page, (self.num_tokens - 1) % B] = vector[:, 2 * D]
        self.vectors = torch.cat([self.vectors, vectors])

    def grow(self, num_new: int) -> torch.Tensor:
        """Append tokens, few of which are asked for, or echo; returns the last queries ``[W, L * H,
        G, D]``."""
        new = torch.randn(num_new, SLOTS, 2 * D + 1) * torch.linspace(0.5, 3, SLOTS)[:, None]
        new[..., D : 2 * D] *= torch.rand(num_new, SLOTS, 1) * 4
        new[..., -1] = torch.rand(num_new, SLOTS) ** 6
        self.append(new)
        return torch.randn(W, SLOTS, G, D)

    def choose(
        self, queries: torch.Tensor, kept: int
    ) -> tuple[list[list[int]], literal.Attention, torch.Tensor]:
        """Compress; what was kept of which keys, and their echo scores."""
        before = torch.stack([self._held(i) for i in range(SLOTS)]).unflatten(0, (L, H)).double()
        every = torch.zeros(L, H, G, before.shape[2], D).double()
        every[:, :, :, -W:] = queries.permute(1, 2, 0, 3).unflatten(0, (L, H))
        self.compressor.record = {}
        self.compress(queries, kept)
        keys, values, stored = before.split([D, D, 1], -1)
        chosen = [keys.tolist() for keys in self.compressor.record["r"]]
        return chosen, literal.causal(every, keys, values), stored[..., 0]

    def _held(self, index: int) -> torch.Tensor:
        """``[n, 2 * D + 1]``: what a head holds, with the scores that it was given at first."""
        every, held = self.vectors[:, index], self.keys(index)
        place = [int(every[:, : 2 * D].eq(key).all(-1).nonzero()[0]) for key in held]
        return every[place]


def config_of(allocator: str, options: dict, **others) -> KVCompressConfig:
    return KVCompressConfig.from_dict(
        {"policy": "echo", "allocator": allocator, "policy_options": options, **others}
    )


def test_what_it_prefers() -> None:
    config = KVCompressConfig.from_dict({"policy": "echo"})
    assert (config.allocator, config.window, config.pool, config.recent) == ("global", 8, 15, 16)


@pytest.mark.parametrize("allocator", ["global", "layer", "uniform"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kept_keys(options: dict, allocator: str) -> None:
    torch.manual_seed(4)
    for num_tokens, kept, pool in [(333, 6, 15), (160, 3, 1)]:
        config = config_of(allocator, options, pool=pool)
        request = Echoing(config)
        chosen, a, stored = request.choose(request.grow(num_tokens), kept)
        s = setting(config, a.length)
        s.kept = kept
        scores = literal.echo(a, s, stored, **options)
        wanted = literal.kept_keys(a, s, scores, allocator)
        assert_same_choice(chosen, wanted, scores.flatten(0, 1))


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_kept_again(options: dict) -> None:
    """Heads of one length, so that the literal scores apply; echo scores move with their keys."""
    torch.manual_seed(5)
    config = config_of("uniform", options)
    request = Echoing(config)
    for num_new, kept in [(333, 6), (90, 5), (250, 7)]:
        queries = request.grow(num_new)
        chosen, a, stored = request.choose(queries, kept)
        s = setting(config, a.length)
        s.kept, s.pool = kept, scaled(s.pool, a.length // B / (request.num_tokens // B))
        scores = literal.echo(a, s, stored, **options)
        wanted = literal.kept_keys(a, s, scores, "uniform")
        assert_same_choice(chosen, wanted, scores.flatten(0, 1))


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
    assert Echo(pool=1).score(known).equal(window.square())


def test_only_what_it_reads_is_measured() -> None:
    assert Echo().channels == (ops.MAXIMUM, ops.VALUE_NORM, ops.ECHO)
    assert Echo(value_norms=False).channels == (ops.MAXIMUM, ops.ECHO)
    assert Echo(weight=0.0).channels == (ops.VALUE_NORM, ops.ECHO)
    assert Echo(weight=0.0, value_norms=False).channels == (ops.ECHO,)
