# SPDX-License-Identifier: Apache-2.0
"""Speculation on vLLM's real scheduler: what is rejected is never packed, never counts, and moves
no compression. The simulation checks that every kept key is one of an accepted token."""

from __future__ import annotations

import random

import pytest

from tests.integration.heads import save_head
from tests.integration.simulation import Simulation

ECHO = {"policy": "echo", "ratio": 4, "recent": 8, "window": 8, "interval": 4}
POLICIES = {
    "echo": ECHO,
    "kv_compress": {**ECHO, "policy": "kv_compress"},
    "h2o": {**ECHO, "policy": "h2o", "query_stride": 5},
    "mass": {**ECHO, "policy": "kv_compress", "ratio": None, "mass": 0.6},
    "int4": {**ECHO, "page_dtype": "int4"},
    "one query": {**ECHO, "policy": "kv_compress", "window": 1, "interval": 2},
}


@pytest.fixture(autouse=True)
def integrity(monkeypatch):
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")


def prompt(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 1000) for _ in range(length)]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> str:
    return save_head(tmp_path_factory.mktemp("head"))


@pytest.fixture(params=["n-gram", "draft model", "draft model, steps in flight"])
def speculates(request) -> dict:
    """Who drafts, and whether a step is planned while the one before runs."""
    if request.param == "n-gram":
        return {}
    asynchronous = request.param.endswith("flight")
    return {"head": request.getfixturevalue("head"), "asynchronous": asynchronous}


def simulation(
    options: dict, drafts: int, acceptance: float, blocks: int = 400, **speculates
) -> Simulation:
    return Simulation(
        blocks,
        options,
        max_num_batched_tokens=300,
        max_model_len=1024,
        drafts=drafts,
        acceptance=acceptance,
        **(speculates if drafts else {}),
    )


def plans_of(sim: Simulation) -> list:
    """Filled as it runs."""
    plans, run = [], sim.worker.run

    def recorded(output, *rest):
        plans.append(output.kv_compress)
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for item in output.kv_compress.compressions:
            # Whatever comes behind attends to what is kept, as it would without speculation.
            assert computed[item.request_id] == item.num_tokens
        run(output, *rest)

    sim.worker.run = recorded
    return plans


@pytest.mark.parametrize(
    "policy, drafts, acceptance",
    [
        ("echo", 4, 0.0),
        ("echo", 20, 0.9),
        ("echo", 4, 1.0),
        ("kv_compress", 1, 0.5),
        ("h2o", 4, 0.6),
        ("mass", 4, 0.6),
        ("int4", 4, 0.6),
        ("one query", 5, 0.6),
    ],
)
def test_answers_and_keys_are_those_of_accepted_tokens(policy, drafts, acceptance, speculates):
    """In a pool so small that some are preempted."""
    sim = simulation(POLICIES[policy], drafts, acceptance, blocks=90, **speculates)
    source, wanted = random.Random(drafts), {}
    for index in range(12):
        wanted[str(index)] = source.randrange(1, 200)
        sim.add(str(index), prompt(index % 5, source.randrange(20, 500)), wanted[str(index)])
        for _ in range(source.randrange(5)):
            sim.step()
    sim.run()
    assert {name: len(tokens) for name, tokens in sim.outputs.items()} == wanted
    assert sim.num_compressions > 10 and (sim.num_rejected > 0) == (acceptance < 1)
    assert sim.pool.get_num_free_blocks() == 89 and sim.state_slots_left == set()


@pytest.mark.parametrize(
    "policy, acceptance", [("echo", 0.0), ("echo", 0.7), ("kv_compress", 1.0), ("h2o", 0.7)]
)
def test_compressions_come_where_they_would_without(policy, acceptance, speculates):
    found = []
    for drafts in (0, 5):
        sim = simulation(POLICIES[policy], drafts, acceptance, **speculates)
        plans = plans_of(sim)
        for index, length in enumerate([40, 130, 200, 333]):
            sim.add(str(index), prompt(index, length), 300)
        sim.run()
        compressions = [item for plan in plans for item in plan.compressions]
        found.append(
            sorted((c.request_id, c.num_tokens, c.covered, c.kept, c.protect) for c in compressions)
        )
    assert found[0] == found[1] and len(found[0]) > 12


@pytest.mark.parametrize(
    "options, windows",
    [
        ({}, (48, 96)),
        ({"exact": "kvzip"}, ()),
        ({"policy": "kv_compress", "prefill_peak_tokens": 256}, ()),
        ({"context_stride": 256}, ()),
    ],
    ids=["windows", "exact", "peak", "stride"],
)
def test_beside_what_else_moves_compressions(options, windows, speculates):
    """In a pool that is too small, with requests that share the beginning of their prompts."""
    blocks = 170 if windows else 130
    sim = Simulation(
        blocks, {**ECHO, **options}, max_num_batched_tokens=300, max_model_len=1024, drafts=4,
        acceptance=0.6, windows=windows, **speculates,
    )  # fmt: skip
    source, wanted = random.Random(1), {}
    for index in range(9):
        length = source.randrange(200, 600)
        context = {"kv_compress_context_tokens": 192} if not options.get("context_stride") else {}
        wanted[str(index)] = source.randrange(1, 120)
        asked = context if index % 2 else {}
        sim.add(str(index), prompt(index % 3, length), wanted[str(index)], **asked)
        for _ in range(source.randrange(5)):
            sim.step()
    sim.run()
    assert {name: len(tokens) for name, tokens in sim.outputs.items()} == wanted
    assert sim.num_compressions > 5 and sim.num_rejected > 100 and not sim.failed
    assert sim.pool.get_num_free_blocks() == blocks - 1 and sim.state_slots_left == set()


def test_a_prompt_starts_beside_those_that_speculate():
    """They leave less than a segment of each step; it does not wait until they are done."""
    sim = Simulation(600, ECHO, max_num_batched_tokens=300, max_num_seqs=9, max_model_len=1024,
                     drafts=20, acceptance=0.0)  # fmt: skip
    for index in range(8):
        sim.add(str(index), prompt(index, 30), 120)
    for _ in range(6):
        sim.step()
    sim.add("late", prompt(9, 400), 20)
    for _ in range(12):
        sim.step()
    assert sim.outputs["late"] and all(len(sim.outputs[str(index)]) < 120 for index in range(8))
    sim.run()


def test_a_last_token_that_is_filled_up(speculates):
    """vLLM makes the last token of a prompt, if it comes alone beside generations, as long as their
    steps are. That is not cut where a compression is due, nor is it observed."""
    sim = simulation({"policy": "kv_compress", "ratio": 4, "window": 1, "recent": 8}, 4, 0.5,
                     **speculates)  # fmt: skip
    shared = prompt(1, 16 * 16)
    sim.add("a", [*shared, 5], 80)
    for _ in range(3):
        sim.step()
    sim.add("b", [*shared, 6], 40)
    filled = []
    run = sim.worker.run

    def recorded(output, *rest):
        filled.extend(
            output.num_scheduled_tokens[new.req_id]
            for new in output.scheduled_new_reqs
            if new.req_id in output.scheduled_spec_decode_tokens
        )
        run(output, *rest)

    sim.worker.run = recorded
    sim.run()
    assert len(sim.outputs["a"]) == 80 and len(sim.outputs["b"]) == 40 and not sim.failed
    if "head" not in speculates:  # with a draft model the last block of a hit is computed anew
        assert filled == [5]
