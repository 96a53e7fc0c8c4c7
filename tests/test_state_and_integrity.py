# SPDX-License-Identifier: Apache-2.0
"""Every invariant check fires on the violation it is for."""

import math
from contextlib import nullcontext

import pytest
import torch

from kvcompress_vllm.cache.integrity import Block, check_pool, check_state
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import PackedRow

NULL = Block(0, True, False)


def pool() -> tuple[list[Block], list[int], dict[str, list[int]], dict[str, tuple[int, int]]]:
    """Null block 0; r: packed 1, null, null, tail 2; s and t share 3; 4 and 5 are free."""
    blocks = [NULL, Block(1, False, False), Block(1, False, False), Block(2, False, True),
              Block(0, False, False), Block(0, False, True)]  # fmt: skip
    return blocks, [4, 5], {"r": [1, 0, 0, 2], "s": [3], "t": [3]}, {"r": (3, 1)}


def test_a_sound_pool_passes() -> None:
    check_pool(*pool())


@pytest.mark.parametrize(
    ("index", "block", "message"),
    [
        (1, Block(2, False, False), "block 1 has reference count 2 but 1 owners"),
        (3, Block(1, False, True), "block 3 has reference count 1 but 2 owners"),
        (4, Block(1, False, False), "block 4 has reference count 1 but 0 owners"),
        (1, Block(1, False, True), "packed block 1 of r is shared or in the prefix cache"),
        (2, NULL, "row of r with F=3, C=1 has null blocks at"),
    ],
)
def test_block_violations(index: int, block: Block, message: str) -> None:
    blocks, free, rows, packed = pool()
    blocks[index] = block
    with pytest.raises(RuntimeError, match=message):
        check_pool(blocks, free, rows, packed)


@pytest.mark.parametrize(
    ("free", "message"),
    [
        ([4], "block 5 with reference count 0 is 0 times"),
        ([4, 5, 5], "block 5 with reference count 0 is 2 times"),
        ([4, 5, 1], "block 1 with reference count 1 is 1 times"),
        ([0, 4, 5], "null block 0 is in the free queue"),
    ],
)
def test_free_queue_violations(free: list[int], message: str) -> None:
    blocks, _, rows, packed = pool()
    with pytest.raises(RuntimeError, match=message):
        check_pool(blocks, free, rows, packed)


def test_row_violations() -> None:
    blocks, free, rows, packed = pool()
    with pytest.raises(RuntimeError, match="r is not packed but holds null blocks"):
        check_pool(blocks, free, rows, {})
    with pytest.raises(RuntimeError, match="packed request q holds no blocks"):
        check_pool(blocks, free, rows, {**packed, "q": (2, 1)})
    with pytest.raises(RuntimeError, match="row of r with F=2, C=1"):
        check_pool(blocks, free, rows, {"r": (2, 1)})


def test_deferred_frees_count_as_owners() -> None:
    blocks, free, rows, packed = pool()
    del rows["t"]
    check_pool(blocks, free, rows, packed, {3: 1})


L, H = 2, 3


def state() -> PackedState:
    return PackedState(
        CacheGroup(L, H, 1, 8, 16, 4, 1.0), num_blocks=20, state_slots=4,
        observe_slots=2, window=4, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


def installed() -> tuple[PackedState, list[PackedRow]]:
    s = state()
    pages = torch.tensor([[[1, 0, 5], [2, 2, 2]], [[1, 1, 1], [1, 1, 1]]], dtype=torch.int32)
    s.install([2, 0], [[7, 8], [3]], [9, 6], pages)
    return s, [PackedRow("a", 2, 9, [7, 8]), PackedRow("b", 0, 6, [3])]


def test_install_find_and_release() -> None:
    s, expected = installed()
    check_state(s, expected)
    table = torch.tensor([[7, 8], [3, 0], [5, 6], [8, 7], [0, 0]], dtype=torch.int32)
    assert s.state_slots(table).tolist() == [2, 0, -1, -1, -1]
    assert s.first_page[2].tolist() == [[0, 1, 1], [6, 8, 10]]
    assert (s.slot_of([7, 8]), s.slot_of([8])) == (2, -1)
    s.release([2, 3])
    check_state(s, expected[1:])
    assert s.state_slots(table).tolist() == [-1, 0, -1, -1, -1]
    s.install([2], [[5]], [4], torch.ones(1, L, H, dtype=torch.int32))
    assert s.state_slots(table).tolist() == [-1, 0, 2, -1, -1]


def test_reinstalling_a_slot_forgets_its_old_block() -> None:
    s, _ = installed()
    s.install([2], [[9]], [4], torch.ones(1, L, H, dtype=torch.int32))
    assert s.owner[7] == -1 and s.owner[9] == 2
    with pytest.raises(RuntimeError, match="state slot 1 has no packed block"):
        s.install([1], [[]], [4], torch.ones(1, L, H, dtype=torch.int32))


def test_state_violations() -> None:
    s, expected = installed()
    with pytest.raises(RuntimeError, match="the scheduler knows packed slots"):
        check_state(s, expected[:1])
    s.owner[5] = 1
    with pytest.raises(RuntimeError, match="owner table"):
        check_state(s, expected)
    s.owner[5] = -1
    s.num_pages[2, 0, 0] += 1
    with pytest.raises(RuntimeError, match="a has 13 packed pages in 2 blocks of 6"):
        check_state(s, expected)
    s.num_pages[2, 0, 1] -= 1
    with pytest.raises(RuntimeError, match="a has 12 packed pages"):  # -1 pages somewhere
        check_state(s, expected)
    s, expected = installed()
    s.first_page[0, 1, 2] -= 1
    with pytest.raises(RuntimeError, match="pages of b overlap"):
        check_state(s, expected)
    s, expected = installed()
    s.covered[0] = 5
    with pytest.raises(RuntimeError, match="b covers 6 blocks, the worker has 5"):
        check_state(s, expected)


@pytest.mark.parametrize(
    ("score", "sound"),
    [(0.0, True), (1 + 1e-6, True), (1.01, False), (-1e-6, False), (math.nan, False)],
)
def test_echo_scores_are_probabilities_up_to_rounding(score: float, sound: bool) -> None:
    s, expected = installed()
    s.echo = torch.full((20 * L * H, 16), 0.5)
    s.echo[7 * L * H, 3] = score
    with nullcontext() if sound else pytest.raises(RuntimeError, match="a has echo scores"):
        check_state(s, expected)
