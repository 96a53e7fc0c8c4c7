# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records import budget
from kvcompress_vllm.records.budget import KEEP_ALL, Wish

B = 16
PAGE_DTYPES = [each.label for each in PageFormat]


@pytest.mark.parametrize(
    ("options", "num_tokens", "kept"),
    [
        ({"ratio": 4}, 1600, 25),  # 100 blocks
        ({"ratio": 4}, 1615, 25),  # the partial block is not counted
        ({"ratio": 3}, 1600, 34),  # rounded up
        ({"ratio": 1}, 1600, 100),
        ({"ratio": 64, "recent": 100}, 1600, 7),
        ({"ratio": 64}, 1600, 2),  # the shields (4 + 16 tokens) need 2 pages per head
        ({"budget_tokens": 128}, 1600, 8),
        ({"budget_tokens": 129}, 1600, 9),
        ({"budget_tokens": 5000}, 1600, 100),
        ({"ratio": 4, "min_budget_tokens": 250}, 800, 16),  # not 13
        ({"ratio": 4, "min_budget_tokens": 250}, 1600, 25),
        ({"ratio": 4, "min_budget_tokens": 250}, 160, 10),  # all there is
        ({"ratio": 64, "recent": 300, "min_budget_tokens": 250}, 1600, 19),  # the shields
        ({"budget_tokens": 128, "min_budget_tokens": 250}, 1600, 8),  # said outright
        ({"ratio": 4}, 127, 7),  # shorter than min_prompt_tokens
        ({"ratio": 4, "min_prompt_tokens": 1}, 33, 2),  # the shields hold both blocks
        # Packed pages of 32 keys, and of 64: the same memory, and never more than all keys take.
        ({"ratio": 4, "page_dtype": "fp8"}, 1615, 25),
        ({"ratio": 8, "page_dtype": "int4"}, 1615, 13),  # 832 of 1,600 keys
        ({"ratio": 2, "page_dtype": "int4"}, 1615, 25),
        ({"ratio": 1, "page_dtype": "int4"}, 1615, 100),
        ({"ratio": 64, "page_dtype": "int4"}, 1600, 2),
        ({"ratio": 8, "page_dtype": "int4"}, 1600 + 63, 13),  # whole packed pages only
        ({"ratio": 8, "page_dtype": "int4"}, 1600 + 64, 13),
        ({"budget_tokens": 128, "page_dtype": "int4"}, 1600, 8),  # 512 keys
        ({"budget_tokens": 1500, "page_dtype": "int4"}, 1600, 25),
        ({"budget_tokens": 5000, "page_dtype": "int4"}, 1600, 100),
        ({"ratio": 64, "recent": 300, "page_dtype": "int4"}, 1600, 5),
        ({"ratio": 64, "min_budget_tokens": 250, "page_dtype": "int4"}, 1600, 4),  # of keys
        ({"ratio": 4, "min_prompt_tokens": 1, "page_dtype": "int4"}, 64, 1),
        ({"ratio": 4, "min_prompt_tokens": 1, "page_dtype": "int4"}, 63, 0),
    ],
)
def test_packed_blocks(options: dict, num_tokens: int, kept: int) -> None:
    config = KVCompressConfig.from_dict(options)
    assert resolve(config).packed_blocks(num_tokens, B) == kept


@given(
    ratio=st.floats(1, 1000),
    num_tokens=st.integers(0, 10_000),
    recent=st.integers(0, 100),
    sinks=st.integers(0, 100),
    floor=st.integers(0, 100),
    block_size=st.sampled_from([8, 16, 32]),
    page_dtype=st.sampled_from(PAGE_DTYPES),
)
def test_what_is_kept_always_holds_the_shields(
    ratio: float,
    num_tokens: int,
    recent: int,
    sinks: int,
    floor: int,
    block_size: int,
    page_dtype: str,
) -> None:
    config = KVCompressConfig(
        ratio=ratio, recent=recent, sinks=sinks, min_tokens_per_head=floor, page_dtype=page_dtype
    )
    own, page = resolve(config), block_size * PageFormat.of(page_dtype).blocks_per_page
    covered = own.covered(num_tokens, block_size)
    assert 0 <= num_tokens - covered * block_size < page and covered % own.blocks_per_page == 0
    kept = own.packed_blocks(num_tokens, block_size)
    assert 0 <= kept <= covered
    if kept == covered:
        return
    shielded = budget.num_recent(recent, num_tokens, covered, block_size)
    if kept < covered // own.blocks_per_page:  # else every key is kept
        assert kept >= own.floor_pages(block_size)
    assert kept <= covered // own.blocks_per_page
    assert own.floor_pages(block_size) * page >= max(sinks + shielded, floor)
    # The tail and the shielded candidates together are the recent window.
    assert shielded == max(0, recent - (num_tokens - covered * block_size))


@pytest.mark.parametrize(
    ("options", "own", "kept"),
    [
        ({}, Wish(ratio=10), 10),
        ({}, Wish(budget_tokens=320), 20),
        ({}, KEEP_ALL, 100),
        ({"min_ratio": 2}, KEEP_ALL, 50),  # the operator's limits win
        ({"min_ratio": 2}, Wish(budget_tokens=10**6), 50),
        ({"max_ratio": 8}, Wish(ratio=20), 13),
        ({"max_ratio": 8}, Wish(budget_tokens=16), 13),
        ({"max_ratio": 8}, Wish(ratio=6), 17),
        ({"min_budget_tokens": 320}, Wish(ratio=10), 20),
        ({"min_budget_tokens": 320}, Wish(budget_tokens=160), 10),
        ({"min_budget_tokens": 320, "max_ratio": 8}, Wish(ratio=30), 20),
    ],
)
def test_a_request_may_ask_within_the_limits(options: dict, own: Wish, kept: int) -> None:
    config = KVCompressConfig.from_dict({"ratio": 4, **options})
    assert resolve(config, own).packed_blocks(1600, B) == kept
    # Pressure goes below what was asked for, never above.
    fewest = 5 if own.budget_tokens else max(5, config.min_budget_tokens // B)
    assert resolve(config, own).packed_blocks(1600, B, ratio=20) == min(kept, fewest)
