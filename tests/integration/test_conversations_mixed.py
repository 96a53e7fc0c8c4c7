# SPDX-License-Identifier: Apache-2.0
"""Segments that others left unfinished, beside requests that have a policy, a mass or a context of
their own, on vLLM's real scheduler with a pretend model; see ``test_conversations.py``."""

from __future__ import annotations

import pytest

from tests.integration.simulation import Simulation
from tests.integration.test_conversations import ECHO, as_if_computed, simulation, talk
from tests.integration.test_sharing import contexts, document

MIXED = {**ECHO, "context_stride": 512, "allow_policies": True}
OTHERS = [
    {"kv_compress_policy": "kv_compress"},
    {"kv_compress_policy": "snapkv"},
    {"kv_compress_mass": 0.8},
    {"kv_compress_policy": "echo", "kv_compress_mass": 0.8},
    {"kv_compress_context_tokens": 320},
    {"kv_compress_ratio": 4},
    {"kv_compress": False},
]


@pytest.fixture(autouse=True)
def _checked(monkeypatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")


def ids(asked: dict) -> str:
    return "-".join(f"{key.removeprefix('kv_compress_')}={asked[key]}" for key in asked)


@pytest.mark.parametrize(("asynchronous", "page_dtype"), [(False, "auto"), (True, "int4")])
@pytest.mark.parametrize("asked", OTHERS, ids=ids)
def test_turns_between_which_others_ask_otherwise(asked, asynchronous, page_dtype) -> None:
    """The same conversation is gone on with by someone whose compressions go by other things: while
    a turn of ours is answered, and between two of them."""
    sim = simulation({**MIXED, "page_dtype": page_dtype}, asynchronous=asynchronous)
    _, history = talk(sim, 1, 300, 30, 40)
    for turn in range(4):
        sim.add(f"other {turn}", [*history, *document(60 + turn, 20)], 60, **asked)
        if turn % 2:
            sim.run()
        sim.add(f"ours {turn}", history, 100)
        for _ in range(30):
            sim.step()
        sim.add(f"late {turn}", [*history, *document(70 + turn, 20)], 60, **asked)
        sim.run()
        history = [*history, *sim.outputs[f"ours {turn}"], *document(80 + turn, 30)]
    ours = [context for context in contexts(sim) if context.owner.startswith("ours")]
    assert [context.num_tokens for context in ours] == [512], [c.owner for c in contexts(sim)]
    assert sim.pool.get_num_free_blocks() == 399 and not sim.failed
    only_ours(sim)
    as_if_computed(sim, history[:800])


def only_ours(sim: Simulation) -> None:
    """Forget what others packed, which ``as_if_computed`` would not pack again."""
    index = sim.scheduler.kv_compress_planner.contexts
    for context in contexts(sim):
        if not context.owner.startswith("ours"):
            index.retire(context)
