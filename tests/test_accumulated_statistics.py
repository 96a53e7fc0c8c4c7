# SPDX-License-Identifier: Apache-2.0
"""Policies that judge by all queries: what is summed up chunk by chunk and over compressions.

The literal side keeps, for every head, the attention that each key ever got from an observed query,
one query after the other. The planner decides what is observed, as in the engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from kvcompress_vllm import ops
from kvcompress_vllm.cache import layout
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.policies.h2o import H2O
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Compression, Observation
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from tests.policies.installed import install

L, H, G, D, B = 2, 2, 2, 8, 16
SLOTS = L * H
CHANNELS = (ops.SUM, ops.MEAN_SQUARES, ops.LOW_COUNT)


def config_of(policy: str, **options) -> KVCompressConfig:
    given = {"policy": policy, "ratio": 3, "recent": 8, "interval": 2, "window": 64}
    if policy == "scissorhands":
        given["policy_options"] = {"later": 1}
    return KVCompressConfig.from_dict({**given, **options})


def likeness(keys: torch.Tensor) -> torch.Tensor:
    mean = normalize(keys, dim=-1).mean(0, keepdim=True)
    return cosine_similarity(keys, mean, dim=-1)


class Literal:
    """Per head: its keys, and per key what one observed query after the other paid to it."""

    def __init__(self) -> None:
        self.keys = [torch.empty(0, 2 * D) for _ in range(SLOTS)]
        self.sums = [torch.empty(len(CHANNELS) + 1, 0) for _ in range(SLOTS)]

    def append(self, vectors: torch.Tensor) -> None:
        for i, old in enumerate(self.keys):
            self.keys[i] = torch.cat([old, vectors[:, i]])
            nothing = torch.zeros(len(CHANNELS) + 1, len(vectors))
            self.sums[i] = torch.cat([self.sums[i], nothing], 1)

    def observe(self, query: torch.Tensor, behind: int, tail: int) -> None:
        """``query [L * H, G, D]`` has ``behind`` tokens after it; the last ``tail`` keys, which
        fill no block, are not counted."""
        for i, vectors in enumerate(self.keys):
            visible = len(vectors) - behind
            p = (query[i] @ vectors[:visible, :D].T * D**-0.5).softmax(-1)
            mean = p.mean(0)
            low = (mean < 1 / visible).float()
            paid = torch.stack([p.sum(0), mean.square(), low, torch.ones(visible)])
            counted = min(visible, len(vectors) - tail)
            self.sums[i][:, :counted] += paid[:, :counted]

    def keep(self, head: int, indices: list[int]) -> None:
        self.keys[head] = self.keys[head][indices]
        self.sums[head] = self.sums[head][:, indices]


class Request:
    """One request in pages, driven by the planner as the scheduler and a worker do it."""

    def __init__(self, config: KVCompressConfig, num_tokens: int) -> None:
        self.config = config
        self.planner = CompressionPlanner(config, B, 4, 4, 4096)
        self.planner.admit("r", num_tokens)
        self.state = PackedState(
            CacheGroup(L, H, G, D, B, 4, D**-0.5), num_blocks=200,
            state_slots=4, observe_slots=4, window=config.window, dtype=torch.float32,
            device=torch.device("cpu"), accumulated=True,
        )  # fmt: skip
        # What earlier requests left behind must not count.
        assert self.state.accumulated is not None
        self.state.accumulated.fill_(float("nan"))
        self.pages = torch.full((200 * SLOTS, B, 2 * D), float("nan"))
        self.compressor = Compressor(config, self.state, self.pages)
        self.free = (torch.randperm(199) + 1).tolist()
        self.row: list[int] = []
        self.num_tokens = 0
        self.literal = Literal()
        self.evidence: list = []
        self.pending: list[tuple[int, torch.Tensor]] = []
        policy = self.compressor.policy
        score = type(policy).score

        def spy(evidence):
            self.evidence.append(evidence)
            return score(policy, evidence)

        object.__setattr__(policy, "score", spy)

    def forward(self, count: int) -> None:
        """Compute ``count`` tokens, and observe what the planner wants of them."""
        vectors = torch.randn(count, SLOTS, 2 * D) * torch.linspace(0.5, 3, SLOTS)[:, None]
        queries = torch.randn(count, SLOTS, G, D)
        observed = self.planner.observe(self.planner.requests["r"], self.num_tokens, count)
        for vector in vectors:
            if self.num_tokens % B == 0:
                self.row.append(self.free.pop())
            page = self.row[-1] * SLOTS + torch.arange(SLOTS)
            self.pages[page, self.num_tokens % B] = vector
            self.num_tokens += 1
        self.literal.append(vectors)
        for observation in observed:
            self._ring(observation, queries)

    def _ring(self, observation: Observation, queries: torch.Tensor) -> None:
        window = self.config.window
        positions = observation.positions(len(queries), window)
        for position, index in zip(positions, observation.places(positions, window), strict=True):
            slot, place = divmod(index, window)
            query = queries[position - observation.first_token]
            self.state.ring[:, slot, place] = query.view(L, H * G, D)
            self.pending.append((position, query))

    def step_start(self) -> bool:
        """What the scheduler and the worker do between two forwards; True if it was compressed."""
        computed = {"r": self.num_tokens}
        tracked = self.planner.requests["r"]
        known = tracked.accumulated
        chunks = [
            Compression(
                "r", t.state_slot, t.observe_slot, t.accumulated, t.covered, t.kept, t.known,
                list(self.row), [], observed=observed,
            )
            for t, observed in self.planner.accumulate(computed)
        ]  # fmt: skip
        self.compressor.accumulate(chunks)
        if chunks:
            self._observe_literally(known)
        self.planner.generations.watch(computed)
        for tracked in self.planner.due(computed):
            self._compress(tracked)
            return True
        return False

    def _observe_literally(self, known: int) -> None:
        """What was observed since, by now that the keys of whole blocks are known."""
        last = sorted(self.pending, key=lambda item: item[0])[-self.config.window :]
        for position, query in last:
            if position >= known:
                self.literal.observe(query, self.num_tokens - 1 - position, self.num_tokens % B)
        self.pending.clear()

    def _compress(self, tracked) -> None:
        self._observe_literally(tracked.accumulated)
        covered, kept = tracked.target()
        new = [self.free.pop() for _ in range(kept)]
        item = Compression(
            "r", tracked.state_slot, tracked.observe_slot, tracked.due_at, tracked.covered,
            tracked.kept, covered, list(self.row), new,
            observed=self.planner.observed(tracked, tracked.due_at),
        )  # fmt: skip
        scored = self._score(item)
        self.compressor.record = {}
        (batch,) = self.compressor.run([item])
        (report,) = batch.collect()
        assert report.curve == scored.curve
        self.check_statistics(item)
        tail = list(range(self.num_tokens - covered * B))
        for head, keys in enumerate(self.compressor.record["r"]):
            candidates = len(self.literal.keys[head]) - len(tail)
            self.literal.keep(head, [*keys.tolist(), *(candidates + t for t in tail)])
        self.planner.compressed("r")
        self.row[:covered] = new + [0] * (covered - kept)

    def _score(self, item: Compression):
        """Only the loss curve, as for a mass budget: nothing may change or count twice."""
        tensors = [*vars(self.state).values(), self.pages]
        before = [(t, t.clone()) for t in tensors if isinstance(t, torch.Tensor)]
        assert len(before) == 7
        (batch,) = self.compressor.run([item], score_only=True)
        for now, was in before:
            torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
        (scored,) = batch.collect()
        return scored

    def check_statistics(self, item: Compression) -> None:
        """What the policy saw equals what the literal side counted, key by key."""
        evidence = self.evidence[-1]
        for head in range(SLOTS):
            n = len(self.literal.keys[head]) - (self.num_tokens - item.covered * B)
            first = evidence.num_keys - n
            sums = self.literal.sums[head][:, :n]
            for channel, values in evidence.statistics.items():
                if channel == ops.LIKENESS:
                    wanted = likeness(self.literal.keys[head][:, :D])[:n]
                else:
                    wanted = sums[CHANNELS.index(channel)]
                torch.testing.assert_close(values[head, first:], wanted, rtol=1e-4, atol=1e-5)
            assert evidence.counts[head, first:].equal(sums[-1])


@pytest.mark.parametrize(
    ("policy", "stride"),
    [("roco", 1), ("roco", 8), ("h2o", 8), ("mean_attention", 3), ("scissorhands", 1)],
)
def test_sums_of_all_queries(policy: str, stride: int) -> None:
    torch.manual_seed(stride)
    config = config_of(policy, query_stride=stride)
    request = Request(config, 277)
    compressions = 0
    while request.num_tokens < 277:
        wanted = min(120, 277 - request.num_tokens)
        count = request.planner.chunk(request.planner.requests["r"], request.num_tokens, wanted)
        assert 0 < count <= 64 * stride
        request.forward(count)
        compressions += request.step_start()
    assert compressions == 1
    evidence = request.evidence[-1]
    if policy != "scissorhands":
        # Every stride-th query of the prompt was counted, back from the end of each chunk.
        assert evidence.num_queries >= 277 // stride
        assert float(evidence.counts[0, 0]) == evidence.num_queries
    for _ in range(100):
        request.forward(1)
        compressions += request.step_start()
    assert compressions >= 2


@dataclass(frozen=True)
class Both(H2O):
    channels = (ops.SUM, ops.LIKENESS)


def test_what_keys_are_is_not_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy of both: channels of the attention add up over chunks, those of the keys do not."""
    install(monkeypatch, both="tests.test_accumulated_statistics:Both")
    torch.manual_seed(5)
    request = Request(config_of("both", query_stride=8), 277)
    compressions = 0
    while request.num_tokens < 377:
        left = max(1, min(120, 277 - request.num_tokens))
        request.forward(
            request.planner.chunk(request.planner.requests["r"], request.num_tokens, left)
        )
        compressions += request.step_start()
    assert compressions >= 2
    assert set(request.evidence[-1].statistics) == {ops.SUM, ops.LIKENESS}


def test_scissorhands_looks_at_its_history_only() -> None:
    torch.manual_seed(3)
    request = Request(config_of("scissorhands", query_stride=8), 900)
    chunks = []
    while request.num_tokens < 900:
        count = request.planner.chunk(request.planner.requests["r"], request.num_tokens, 2048)
        chunks.append(count)
        request.forward(count)
        request.step_start()
    # Unobserved up to position 500, the end of whose block is 512.
    assert chunks == [512, 388]
    assert request.evidence[-1].num_queries == math.ceil(12 / 8) + math.ceil(388 / 8)


def test_what_others_left_in_the_blocks_does_not_count() -> None:
    """The pool is poisoned, and the first chunk zeroes what it counts (see Request)."""
    torch.manual_seed(4)
    request = Request(config_of("h2o", query_stride=4), 300)
    while request.num_tokens < 300:
        request.forward(
            request.planner.chunk(request.planner.requests["r"], request.num_tokens, 100)
        )
        request.step_start()
    assert request.state.accumulated is not None
    slot = request.planner.requests["r"].state_slot
    pages = layout.page_id(
        torch.tensor(request.row), int(request.state.covered[slot]),
        request.state.num_pages[slot].flatten()[0], request.state.first_page[slot].flatten()[0],
        0, SLOTS, torch.arange(int(request.state.num_pages[slot].flatten()[0])),
    )  # fmt: skip
    assert not request.state.accumulated[pages].isnan().any()


def test_only_policies_that_judge_by_all_queries_pay() -> None:
    assert KVCompressConfig(policy="kv_compress").query_stride == 0
    assert KVCompressConfig(policy="roco").query_stride == 32
    with pytest.raises(ValueError, match="query_stride=8 is for policies that judge by all"):
        KVCompressConfig(policy="snapkv", query_stride=8)
    shared = KVCompressConfig(policy="snapkv", query_stride=8, allow_policies=True)
    assert shared.with_policy("h2o").query_stride == 8
    with pytest.raises(ValueError, match="query_stride=1 and window=8 are too small"):
        CompressionPlanner(config_of("h2o", window=8, query_stride=1), 16, 4, 4, 4096)
