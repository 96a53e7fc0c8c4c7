# SPDX-License-Identifier: Apache-2.0
"""Samples of benchmarks/retrieval never change: figures name them by (task, length, seed)."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.retrieval import TASKS, TaskGen  # noqa: E402

MODEL = ROOT / "models" / "tiny"
GOLDEN_TASKS = {
    ("single", 512, 0): "b0549a0f3f389f29",
    ("multikey", 1024, 1): "a51a8abe1dd8ff3f",
    ("multikey32", 1900, 2): "461bac934108af21",
    ("dense", 512, 3): "1d2bca325be6c940",
    ("multivalue", 1024, 4): "155535b3a9c5e484",
    ("multiquery", 1900, 5): "e3e5ea825467359a",
    ("kv40", 512, 6): "e4fc83aa9555c99b",
    ("kv70", 1024, 7): "5888662b70899223",
    ("kv100", 1900, 8): "a830d8f77a8bd473",
    ("vt1", 512, 9): "fcd0e7cb77c16222",
    ("vt2", 1024, 10): "4b90733c687adddf",
    ("vt3", 1900, 11): "256694cb021e76dc",
    ("vt_list", 512, 12): "bed873a4fc570cb6",
    ("copy", 1024, 13): "c0d63f06c7b31a12",
    ("fwe", 1900, 14): "5dca1e77af5d1deb",
    ("qa", 512, 15): "e2cd133aa3178951",
    ("qa2", 1024, 16): "3d88ad19697786e6",
    ("single", 1900, 100000): "e9a4c22f8e8b9bcb",
    ("multikey", 1900, 100001): "9ca682287b44701b",
    ("kv40", 512, 7): "404f94aa0009bfd9",
}
GOLDEN_TURNS = {
    ("multikey", 1024, 3): "ccf2060ff831e47e",
    ("qa", 1900, 4): "8d6dbd1f076ebe82",
    ("vt2", 512, 5): "c4617231f45ef255",
}


@pytest.fixture(scope="module")
def generator() -> TaskGen:
    return TaskGen.load(MODEL)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def test_samples_are_the_published_ones(generator: TaskGen) -> None:
    assert {name for name, _, _ in GOLDEN_TASKS} == set(TASKS)
    assert {key: _digest(generator.task(*key)) for key in GOLDEN_TASKS} == GOLDEN_TASKS


def test_conversations_are_the_published_ones(generator: TaskGen) -> None:
    found = {}
    for key in GOLDEN_TURNS:
        prompt, turns = generator.turns(*key)
        found[key] = _digest([prompt, *(text or "" for turn in turns for text in turn)])
    assert found == GOLDEN_TURNS


def test_single_states_its_answer_once(generator: TaskGen) -> None:
    prompt, answer = generator.task("single", 1024, 0)
    city = re.search(r"What is the secret code for (.+)\?<\|assistant\|>$", prompt)
    assert city is not None
    assert prompt.startswith("<|user|>")
    assert prompt.count(f"The secret code for {city[1]} is {answer}.") == 1


def test_unknown_task_is_refused(generator: TaskGen) -> None:
    with pytest.raises(ValueError, match="no task 'sinle'"):
        generator.task("sinle", 512, 0)
