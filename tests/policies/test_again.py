# SPDX-License-Identifier: Apache-2.0
"""Compressing again what was compressed before, with every policy."""

from __future__ import annotations

import pytest
import torch

from kvcompress_vllm import policies
from kvcompress_vllm.compression.pending import PendingLengths
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.policies import Evidence
from tests.policies import literal
from tests.policies.prompts import setting
from tests.policies.test_parity import SAME_SCORE, assert_same_choice
from tests.test_compressor import SLOTS, B, D, G, H, L, Paged, W, scaled

# Without shares all heads stay equally long, so that the literal scores apply to what is left.
EQUAL = {
    "pyramidkv": {"beta": 1},
    "scissorhands": {"later": 1},
    "cake": {"tau1": 1e9, "tau2": 1e9},
}


def grow(paged: Paged, num_new: int) -> torch.Tensor:
    """Append tokens of uneven keys; returns the last queries ``[W, L * H, G, D]``."""
    paged.append(torch.randn(num_new, SLOTS, 2 * D) * torch.linspace(0.5, 3, SLOTS)[:, None])
    return torch.randn(W, SLOTS, G, D)


def config_of(
    policy: str, allocator: str, pool: int | str = "auto", equal: bool = False
) -> KVCompressConfig:
    options = EQUAL.get(policy, {}) if equal else {}
    return KVCompressConfig.from_dict({
        "policy": policy, "allocator": allocator, "window": W, "pool": pool,
        "policy_options": options,
    })  # fmt: skip


def test_shielded_columns_begin_where_the_head_does() -> None:
    absent = torch.tensor([[True] * 3 + [False] * 7, [False] * 10])
    evidence = Evidence(
        layers=1, heads=2, group=1, num_keys=10, num_kept=5, seq_len=12, num_queries=4,
        num_sinks=2, num_recent=1, scale=1.0, device=torch.device("cpu"), absent=absent,
    )  # fmt: skip
    assert evidence.shielded().int().tolist() == [
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 1],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert (evidence.num_window, evidence.num_open, evidence.open_kept) == (2, 7, 2)
    assert evidence.num_observations().tolist() == [4.0] * 9 + [3.0]


@pytest.mark.parametrize("pool", ["auto", 11])  # reaches over the sinks
@pytest.mark.parametrize("policy", [name for name in policies.BUILT_IN if name != "random"])
def test_second_compression_equals_the_literal_one(policy: str, pool: int | str) -> None:
    torch.manual_seed(1)
    config = config_of(policy, "uniform", pool, equal=True)
    paged = Paged(config)
    paged.compress(grow(paged, 333), 6)
    for num_new, kept in [(150, 5), (203, 7)]:
        queries = grow(paged, num_new)
        before = torch.stack([paged.keys(i) for i in range(SLOTS)]).unflatten(0, (L, H)).double()
        length = before.shape[2]
        every = torch.randn(L, H, G, length, D).double()
        every[:, :, :, -W:] = queries.permute(1, 2, 0, 3).unflatten(0, (L, H))
        a = literal.causal(every, before[..., :D], before[..., D:])
        s = setting(config, length)
        s.kept = kept
        density = (length // B) / (paged.num_tokens // B)
        s.pool = scaled(s.pool, density)
        score = SAME_SCORE.get(policy) or getattr(literal, policy)
        more = {"key_pool": scaled(7, density)} if policy == "diverse" else {}
        if policy == "echo":
            more = {"stored": a.values[..., 0].sigmoid()}
        scores = score(a, s, **more)
        paged.compress(queries, kept)
        wanted = literal.kept_keys(a, s, scores, "uniform")
        tail = [*range(length // B * B, length)]
        flat = before.flatten(0, 1).float()
        index = [
            [int(flat[i].eq(key).all(-1).nonzero()[0]) for key in paged.keys(i)]
            for i in range(SLOTS)
        ]
        assert all(head[len(head) - len(tail) :] == tail for head in index)
        kept_keys = [head[: len(head) - len(tail)] for head in index]
        assert_same_choice(kept_keys, wanted, scores.flatten(0, 1))


@pytest.mark.parametrize("allocator", ["global", "uniform"])
@pytest.mark.parametrize("policy", sorted(policies.BUILT_IN.keys() - {"random"}))
def test_columns_without_keys_change_nothing(
    policy: str, allocator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the longest head is not known yet, the rectangle is as wide as the request. (What
    ``random`` keeps hashes columns.)"""

    def run() -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(2)
        paged, widths = Paged(config_of(policy, allocator)), []
        width = paged.compressor._width
        monkeypatch.setattr(
            paged.compressor, "_width", lambda item: widths.append(width(item)) or widths[-1]
        )
        for num_new, kept in [(333, 6), (90, 5), (150, 5), (250, 7)]:
            paged.compress(grow(paged, num_new), kept)
        return [paged.keys(i) for i in range(SLOTS)], widths[-1]

    kept, width = run()
    monkeypatch.setattr(PendingLengths, "longest", lambda self: None)
    wide, full = run()
    assert width < full == (333 + 90 + 150 + 250) // B
    assert all(a.equal(b) for a, b in zip(kept, wide, strict=True))


@pytest.mark.parametrize("allocator", ["global", "layer", "uniform"])
@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_uneven_heads_again_and_again(policy: str, allocator: str) -> None:
    """Page counts stay exact and shields hold, whatever heads had before."""
    torch.manual_seed(2)
    config = config_of(policy, allocator)
    paged = Paged(config)
    for num_new, kept in [(333, 6), (90, 5), (16, 5), (250, 7)]:
        queries = grow(paged, num_new)
        before = [paged.keys(i) for i in range(SLOTS)] if paged.kept else None
        paged.compress(queries, kept)
        pages = paged.state.num_pages[2]
        assert int(pages.sum()) == kept * SLOTS and int(pages.min()) >= 2
        if policy in ("kv_compress", "snapkv") and allocator == "uniform":
            assert pages.eq(kept).all()
        for i in range(SLOTS):
            after = paged.keys(i)
            assert not after.isnan().any()
            if before is not None:
                ends = before[i][:4], before[i][-16:]
                assert after[:4].equal(ends[0]) and after[-16:].equal(ends[1])
