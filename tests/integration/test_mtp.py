# SPDX-License-Identifier: Apache-2.0
"""MTP on the real engine, as EAGLE in ``test_drafts.py``: a model whose own checkpoint has the
layer that drafts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import engine
from tests.integration.heads import save_mtp
from tests.integration.test_drafts import (
    OPTIONS,
    test_all_or_nothing_is_accepted,
    test_answers_are_the_same,
    test_the_model_keeps_what_it_would_without,
    test_what_is_told_of_drafts,
    without,
)
from tests.integration.test_speculation import DRAFTS, MEMORY

__all__ = [
    "test_all_or_nothing_is_accepted",
    "test_answers_are_the_same",
    "test_the_model_keeps_what_it_would_without",
    "test_what_is_told_of_drafts",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_mtp(tmp_path_factory.mktemp("mtp")))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[list[int]]]:
    return without(model)


@pytest.fixture(scope="module")
def speculative(model: Path, expected: dict[str, list[list[int]]]) -> Iterator[Any]:
    with engine(
        OPTIONS,
        model=str(model),
        kv_cache_memory_bytes=MEMORY,
        speculative_config={"method": "mtp", "num_speculative_tokens": DRAFTS},
        disable_log_stats=False,
    ) as llm:
        yield llm
