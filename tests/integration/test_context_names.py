# SPDX-License-Identifier: Apache-2.0
"""Names of contexts where vLLM's hashes of blocks depend on the tokens behind them."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest

from kvcompress_vllm.integration.engine.context_names import ContextNames

SIZE = 4


def request(tokens: list[int], lookahead: int, **changes: Any) -> Any:
    """Hashes of its full blocks, each of all tokens up to it and of some behind it."""
    ends = range(SIZE, len(tokens) - lookahead + 1, SIZE)
    fields = {
        "all_token_ids": tokens, "num_tokens": len(tokens), "prompt_token_ids": tokens,
        "block_hashes": [
            hashlib.sha256(repr(tokens[: end + lookahead]).encode()).digest() for end in ends
        ],
        "mm_features": [], "cache_salt": None, "lora_request": None,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def names(lookahead: int) -> ContextNames:
    manager = SimpleNamespace(block_pool=SimpleNamespace(hash_block_size=SIZE))
    planner = SimpleNamespace(config=SimpleNamespace(share="context"))
    return ContextNames(manager, planner, {}, True, lookahead)  # type: ignore[arg-type]


@pytest.mark.parametrize("lookahead", [0, 1, 4, 5, 30])
def test_a_name_is_of_what_it_names_alone(lookahead: int) -> None:
    document, found = list(range(100, 124)), names(lookahead)
    first = request([*document, 1, 2, 3, 4, 5, 6, 7, 8], lookahead)
    second = request([*document, 8, 7, 6, 5], lookahead)
    for n in range(SIZE, len(document) + 1, SIZE):
        assert n <= found._named(first) and n <= found._named(second)
        name = found._name(first, n)
        assert name == found._name(second, n)
        others = {found._name(first, other) for other in range(SIZE, 25, SIZE) if other != n}
        for place in range(n):
            changed = list(document)
            changed[place] += 1
            others.add(found._name(request([*changed, 1, 2, 3, 4], lookahead), n))
        if lookahead:
            others.add(found._name(request([*document, 1, 2], lookahead, cache_salt="a"), n))
            lora = SimpleNamespace(lora_name="a")
            others.add(found._name(request([*document, 1], lookahead, lora_request=lora), n))
        assert name not in others


def test_what_is_no_token_is_named_by_hashes() -> None:
    found, tokens = names(1), list(range(24))
    for changes in ({"mm_features": [object()]}, {"prompt_token_ids": None}):
        asked = request([*tokens, 1], 1, **changes)
        assert found._named(asked) == 24 and found._name(asked, 24) == asked.block_hashes[-1]
