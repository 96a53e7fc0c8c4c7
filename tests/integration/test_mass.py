# SPDX-License-Identifier: Apache-2.0
"""Mass budgets through vLLM's scheduler, synchronous and asynchronous, and the real engine."""

from __future__ import annotations

import random

import pytest

from kvcompress_vllm.integration.worker.reports import reports_of
from kvcompress_vllm.records.report import Report, Scored
from tests.integration.engines import engine, greedy, samples, scheduler
from tests.integration.simulation import Simulation
from tests.integration.test_scheduler import OPTIONS, prompt

MASS = {**OPTIONS, "ratio": None, "mass": 0.9, "policy": "random"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_curve_comes_back_and_fixes_the_blocks(asynchronous: bool) -> None:
    sim = Simulation(60, MASS, prefix_caching=False, asynchronous=asynchronous)
    masses = {"a": 0.99, "b": 0.9, "c": 0.5, "d": 0.2}
    for name, mass in masses.items():
        sim.add(name, prompt(ord(name), 330), 8, kv_compress_mass=mass)
        kept, waited = 0, 0
        planner = sim.scheduler.kv_compress_planner
        while name in sim.live:
            sim.step()
            tracked = planner.requests.get(name)
            if tracked is not None:
                waited += tracked.scored_at > 0 and tracked.decided is None and not tracked.kept
                kept = tracked.kept or kept
                if tracked.curve is not None:
                    curve = tracked.curve
        fewest = next(c for c in curve.blocks if curve.lost_at(c) <= 1 - mass)
        assert kept == max(fewest, 2), name  # 20 / 16 blocks at least
        assert waited == (1 if asynchronous else 0)
        assert len(sim.outputs[name]) == 8
    assert sim.pool.get_num_free_blocks() == 59 and sim.num_compressions == 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_thousands_of_random_operations(asynchronous: bool) -> None:
    """Preempted and aborted while their curve is on its way; every step and content is checked."""
    sim = Simulation(40, MASS, max_num_seqs=8, asynchronous=asynchronous)
    planner = sim.scheduler.kv_compress_planner
    choice = random.Random(5)
    wanted: dict[str, int] = {}
    gone = operations = 0
    while operations < 1500:
        operations += 1
        kind = choice.random()
        waiting = [
            n for n, t in planner.requests.items() if t.scored_at == t.due_at and t.decided is None
        ]
        if kind < 0.08 and len(sim.live) < 16:
            name, tokens = f"r{operations}", choice.randint(1, 300)
            wanted[name] = tokens
            own = {"kv_compress_mass": choice.choice([0.3, 0.9, 0.999])}
            sim.add(
                name, prompt(choice.randrange(3), choice.randint(1, 212)), tokens,
                **(own if choice.random() < 0.5 else {}),
            )  # fmt: skip
        elif (kind < 0.09 and sim.live) or (kind < 0.3 and waiting):
            name = choice.choice(waiting or sim.live)
            wanted.pop(name, None)
            sim.abort(name)
            gone += name in waiting
        else:
            sim.step()
    sim.run()
    assert sim.num_compressions > 50 and sim.num_preemptions > 2
    assert gone > 5 if asynchronous else gone == 0
    assert {name: len(sim.outputs[name]) for name in wanted} == wanted
    assert sim.pool.get_num_free_blocks() == 39
    assert sim.state_slots_left == set() and planner.requests == {}
    assert planner.observers.used == 0


def kept_before_question(mass: float, others: int, asynchronous: bool = False) -> list[int]:
    """C of every compression of a prompt of 330 tokens, the first of them after 300; before it,
    other clients asked for masses of their own."""
    sim = Simulation(80, MASS, prefix_caching=False, asynchronous=asynchronous)
    for index in range(others):
        sim.add(f"other{index}", prompt(index, 330), 2, kv_compress_mass=0.05)
        sim.run()
    planner, kept = sim.scheduler.kv_compress_planner, []
    sim.add("r", prompt(90, 330), 40, kv_compress_mass=mass, kv_compress_context_tokens=300)
    while sim.live:
        sim.step()
        tracked = planner.requests.get("r")
        if tracked is not None and tracked.kept and kept[-1:] != [tracked.kept]:
            kept.append(tracked.kept)
    assert len(sim.outputs["r"]) == 40
    return kept


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_mass_before_a_question_does_not_depend_on_others(asynchronous: bool) -> None:
    alone = kept_before_question(0.9, 0, asynchronous)
    assert alone == kept_before_question(0.9, 12, asynchronous)
    assert 2 < kept_before_question(0.5, 0, asynchronous)[0] < alone[0] < 18
    assert kept_before_question(1, 0, asynchronous) == []


def test_prompts_of_the_real_engine_keep_what_they_need() -> None:
    """Every step is checked for integrity (see conftest)."""
    pairs = samples("single", 900, 2) + samples("kv40", 800, 2) + samples("copy", 700, 2)
    reports: list[Report | Scored] = []
    with engine({"mass": 0.99}, max_num_seqs=4) as llm:
        stock = scheduler(llm).update_from_output
        scheduler(llm).update_from_output = lambda step, output: (
            reports.extend(reports_of(output)) or stock(step, output)
        )
        answers = greedy(llm, [text for text, _ in pairs], 24)
        texts = [llm.get_tokenizer().decode(ids) for ids in answers]
        pool = scheduler(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    curves = {r.request_id: r for r in reports if isinstance(r, Scored)}
    carried_out = [r for r in reports if isinstance(r, Report)]
    assert len(curves) == len(carried_out) == 6
    ratios = set()
    for report in carried_out:
        first = curves[report.request_id]
        blocks = sum(map(sum, report.kept_pages)) // 12
        assert first.curve.lost_at(blocks) <= 0.01 or blocks * 16 >= report.num_tokens // 16
        assert blocks == max(-(-(report.num_tokens // 16) // 16), first.curve.fewest_blocks(0.99))
        # Scored twice, on the same queries and keys: the tokens decoded since do not matter.
        assert report.curve.lost_at(blocks) == pytest.approx(first.curve.lost_at(blocks), abs=1e-6)
        ratios.add(blocks / (report.num_tokens // 16))
    assert len(ratios) > 3
    assert sum(t.startswith(a) for t, (_, a) in zip(texts[:4], pairs[:4], strict=True)) == 4


def test_a_mass_of_a_request() -> None:
    ((text, _),) = samples("single", 900, 1)
    with engine({"ratio": 1}) as llm:
        kept = []
        for mass in (0.9, 0.9999):
            llm.collective_rpc("kv_compress_record")
            greedy(llm, [text], 3, extra_args={"kv_compress_mass": mass})
            (record,) = llm.collective_rpc("kv_compress_record")
            (heads,) = record.values()
            kept.append(sum(map(len, heads)) // (12 * 16))
        assert 1 <= kept[0] < kept[1] < 900 // 16
