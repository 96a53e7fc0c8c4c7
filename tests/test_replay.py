# SPDX-License-Identifier: Apache-2.0
"""What a repetition pays to the keys of a context, in pages, against the study's formula."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from benchmarks.real import scores
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression import replay as op
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.scheduling import replay

L, H, G, D, B = 2, 2, 3, 32, 16
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("device", "dtype", "atol"),
    [
        ("cpu", torch.float32, 1e-5),
        pytest.param("cuda", torch.bfloat16, 2e-2, marks=[pytest.mark.gpu, NEEDS_GPU]),
    ],
)
def test_scores_are_the_highest_probability_of_all_parts(device, dtype, atol, monkeypatch) -> None:
    """Two parts, the first in two chunks, behind 4 blocks of context that lie anywhere."""
    monkeypatch.setattr(op, "MOST_LOGITS", 1000)  # a few queries at a time
    random = torch.Generator().manual_seed(0)
    group = CacheGroup(layers=L, heads=H, queries_per_head=G, head_size=D, block_size=B,
                       itemsize=dtype.itemsize, scale=D**-0.5)  # fmt: skip
    state = PackedState(group, num_blocks=16, state_slots=2, observe_slots=1, window=4, dtype=dtype,
                        device=torch.device(device), echo=True)  # fmt: skip
    assert state.echo is not None
    pages = torch.randn(16 * L * H, B, 2 * D, generator=random).to(device, dtype)
    state.echo.fill_(0.9)
    row = [5, 2, 9, 14, 7, 3]
    op.clear(state, row[:4])
    wanted = torch.zeros(L, H, 4 * B, device=device)
    for length, cuts in ((30, (0, 13, 30)), (20, (0, 20))):
        end = 4 * B + length
        by_block = pages.view(16, L, H, B, 2 * D)[row]
        query = torch.randn(L, length, H, G, D, generator=random).to(device, dtype) * 3
        for layer in range(L):
            keys = by_block[:, layer].transpose(0, 1).flatten(1, 2)[:, :end, :D]
            for first, last in pairwise(cuts):
                op.score(
                    state, pages, layer, query[layer, first:last].flatten(1, 2),
                    torch.tensor(row, device=device), 4, 4 * B + first,
                )  # fmt: skip
            found = scores.replay(
                keys[:, : 4 * B].float(), query[layer].permute(1, 2, 0, 3).float(),
                keys[:, 4 * B :].float(), group.scale,
            )  # fmt: skip
            wanted[layer] = torch.maximum(wanted[layer], found)
    stored = state.echo.view(16, L, H, B)
    found = stored[row[:4]].permute(1, 2, 0, 3).flatten(2)
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-3)
    others = [block for block in range(16) if block not in row[:4]]
    assert (stored[others] == 0.9).all()


def test_soft_caps_and_sinks_are_those_of_attention() -> None:
    """Against ``softmax`` over the capped logits and one more, which is the sink."""
    random = torch.Generator().manual_seed(1)
    group = CacheGroup(layers=L, heads=H, queries_per_head=G, head_size=D, block_size=B,
                       itemsize=4, scale=0.5, soft_cap=5.0)  # fmt: skip
    sinks = torch.randn(L, H * G, generator=random) * 3
    state = PackedState(group, num_blocks=4, state_slots=1, observe_slots=1, window=4,
                        dtype=torch.float32, device=torch.device("cpu"), echo=True,
                        sink_logits=sinks)  # fmt: skip
    assert state.echo is not None
    pages = torch.randn(4 * L * H, B, 2 * D, generator=random)
    query, row = torch.randn(5, H * G, D, generator=random), torch.tensor([3, 1, 2])
    op.clear(state, [3, 1])
    op.score(state, pages, 1, query, row, 2, 2 * B)
    keys = pages.view(4, L, H, B, 2 * D)[row, 1].transpose(0, 1).flatten(1, 2)[..., :D]
    for head in range(H):
        wanted = torch.zeros(2 * B)
        for token in range(5):
            for g in range(G):
                q = query[token, head * G + g]
                logits = 5 * torch.tanh(keys[head, : 2 * B + token + 1] @ q * 0.5 / 5)
                logits = torch.cat([logits, sinks[1, head * G + g].view(1)])
                wanted = torch.maximum(wanted, logits.softmax(0)[: 2 * B])
        found = state.echo.view(4, L, H, B)[[3, 1], 1, head].flatten()
        torch.testing.assert_close(found, wanted)


def test_parts_are_the_whole_context_and_fit_behind_it(monkeypatch) -> None:
    monkeypatch.setattr(replay, "PART", 100)
    context, repeat = list(range(1000, 1250)), [1, 2, 3]
    found = list(replay.parts(context, repeat, 10_000))
    assert [tokens[3:count] for tokens, count in found] == [
        context[:100], context[100:200], context[200:],
    ]  # fmt: skip
    assert all(tokens[:3] == repeat and count == len(tokens) - 1 for tokens, count in found)
    # Near the end of the longest request parts are shorter.
    most = 250 + replay.ROOM
    assert replay.may_repeat(250, most) and not replay.may_repeat(251, most)
    # One position is vLLM's own, for what it samples.
    assert max(250 + len(tokens) for tokens, _ in replay.parts(context, repeat, 300)) == 299


def test_no_step_computes_one_token_alone_that_counts() -> None:
    assert [replay.chunk(n, 5) for n in range(4)] == [0, 0, 2, 3]
    assert replay.chunk(1, 1) == 1
