# SPDX-License-Identifier: Apache-2.0
"""Contexts that are repeated (``exact=kvzip``), on vLLM's real scheduler with a pretend model that
checks which scores each head holds."""

from __future__ import annotations

from random import Random

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import RequestStatus

from kvcompress_vllm.integration.compat.releases import waiting_queues
from kvcompress_vllm.scheduling import replay, slots
from tests.integration.simulation import Simulation
from tests.integration.test_sharing import OPTIONS, contexts, document, held

EXACT = {**OPTIONS, "policy": "echo", "exact": "kvzip"}


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    monkeypatch.setattr(replay, "PART", 100)


def prompt_tokens(sim: Simulation) -> int:
    sim.scheduler._replays.prepare()
    return len(sim.scheduler._replays._prompt)


def parts(sim: Simulation) -> list:
    return [r for r in sim.scheduler.requests.values() if r.request_id in sim.scheduler._replays]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("page_dtype", ["auto", "int4"])
def test_a_context_is_repeated_once_and_then_taken(asynchronous, page_dtype) -> None:
    sim = Simulation(
        120, {**EXACT, "page_dtype": page_dtype}, asynchronous=asynchronous, max_model_len=1024,
        max_num_batched_tokens=600,
    )  # fmt: skip
    sim.add("other", document(2, 30), 90)
    sim.add("first", [*document(1, 320), 5, 6, 7], 4, kv_compress_context_tokens=320)
    while "first" in sim.live:
        before = len(sim.outputs["other"])
        sim.step()
        # Who decodes goes on beside it.
        assert len(sim.outputs["other"]) - before == 1 or sim.num_steps < 4
    # 320 tokens in four parts, and the prompt before each.
    assert sim.worker.replayed == {"first": 320 + 4 * prompt_tokens(sim)}
    (context,) = contexts(sim)
    sim.add("second", [*document(1, 320), 8, 9], 4, kv_compress_context_tokens=320)
    sim.run()
    assert context.hits == 1 and sim.worker.replayed.keys() == {"first"}
    assert {name: len(ids) for name, ids in sim.outputs.items()} == {
        "other": 90, "first": 4, "second": 4,
    }  # fmt: skip
    assert sim.pool.get_num_free_blocks() == 119
    # Nothing of it is in the prefix cache but what is packed: a request that asks for the same text
    # and no context computes it, and finds no score of a repetition.
    cached = sim.num_cached_tokens
    sim.add("plain", [*document(1, 320), 8, 9], 4)
    sim.run()
    assert sim.num_cached_tokens == cached


def test_a_part_that_takes_all_positions_there_are_ends(monkeypatch) -> None:
    """vLLM leaves the last position to what is sampled."""
    sim = Simulation(80, EXACT, max_model_len=320 + replay.ROOM)
    monkeypatch.setattr(replay, "PART", 10_000)
    sim.add("r", [*document(1, 320), 5], 4, kv_compress_context_tokens=320)
    sim.run(300)
    assert len(sim.outputs["r"]) == 4 and sim.worker.replayed["r"] > 320


def test_parts_are_nobodys_prompts_or_answers() -> None:
    """Their keys get no scores of their own, and their one token is no guess at how long answers
    are. Two sequences at a time are enough."""
    sim = Simulation(80, EXACT, max_model_len=1024, max_num_seqs=2)
    sim.add("r", [*document(1, 320), 5], 4, kv_compress_context_tokens=320)
    scored, stock = set(), sim.worker.run

    def run(output, *rest) -> None:
        scored.update(span.request_id for span in output.kv_compress.echoes)
        counts = output.num_scheduled_tokens
        assert all(counts[name] > 1 for name in counts if name != "r"), "a part does not decode"
        stock(output, *rest)

    sim.worker.run = run
    sim.run()
    assert sim.failed == set() and "r" in sim.worker.replayed and scored == {"r"}
    assert sim.scheduler._admission._output_length.mean == pytest.approx(512 - 0.1 * (512 - 4))


def test_several_are_repeated_one_after_the_other_where_there_is_no_room_for_two() -> None:
    """Each waits with half of the pool for room to be repeated in."""
    sim = Simulation(40, EXACT, max_model_len=320 + replay.ROOM, max_num_seqs=4)
    for family in range(4):
        sim.add(f"r{family}", [*document(family, 320), 5], 4, kv_compress_context_tokens=320)
    while sim.scheduler.has_requests():
        sim.step()
        assert len(parts(sim)) <= 1
        assert sim.num_steps < 500
    assert all(len(sim.outputs[f"r{family}"]) == 4 for family in range(4))
    assert len(sim.worker.replayed) == 4 and sim.pool.get_num_free_blocks() == 39


def test_who_takes_a_packed_context_waits_for_no_repetition() -> None:
    sim = Simulation(120, EXACT, max_model_len=1024)
    sim.add("packs", [*document(1, 320), 5], 4, kv_compress_context_tokens=320)
    sim.run()
    sim.add("repeated", [*document(2, 320), 5], 4, kv_compress_context_tokens=320)
    while not parts(sim):
        sim.step()
    sim.add("takes", [*document(1, 320), 6], 4, kv_compress_context_tokens=320)
    sim.step()
    assert len(sim.outputs["takes"]) == 1 and len(sim.scheduler._replays) == 1
    sim.run()


@pytest.mark.parametrize("how", ["aborted", "preempted", "reset", "part preempted"])
def test_whoever_goes_in_the_middle_leaves_nothing_behind(how) -> None:
    sim = Simulation(120, EXACT, max_model_len=1024)
    for index in range(2):
        sim.add(f"r{index}", [*document(1, 320), index + 3], 4, kv_compress_context_tokens=320)
    while not parts(sim) or parts(sim)[0].num_computed_tokens < 360:
        sim.step()
    assert held(sim) > 20
    scheduler = sim.scheduler
    if how == "aborted":
        sim.abort("r0")
    elif how == "reset":
        scheduler.reset_prefix_cache(reset_running_requests=True)
    else:
        (request,) = parts(sim) if how == "part preempted" else [scheduler.requests["r0"]]
        scheduler.running.remove(request)
        scheduler._preempt_request(request, 0.0)
        assert request.status == RequestStatus.PREEMPTED
    sim.run()
    assert [len(sim.outputs[f"r{i}"]) for i in range(2)] == [0 if how == "aborted" else 4, 4]
    assert len(contexts(sim)) == 1 and sim.num_compressions == 1
    assert sim.pool.get_num_free_blocks() == 119
    assert len(scheduler._replays) == 0 and not scheduler._replays._parts


def test_a_part_that_ends_otherwise_ends_its_request_with_an_error() -> None:
    sim = Simulation(120, EXACT, max_model_len=1024)
    for index in range(2):
        sim.add(f"r{index}", [*document(1, 320), index + 3], 4, kv_compress_context_tokens=320)
    while not parts(sim):
        sim.step()
    sim.abort(parts(sim)[0].request_id)
    sim.run()
    assert sim.failed == {"r0"} and len(sim.outputs["r1"]) == 4
    assert sim.pool.get_num_free_blocks() == 119


def test_whoever_comes_past_the_front_end_ends_with_an_error() -> None:
    sim = Simulation(120, EXACT, max_model_len=512)
    sim.pass_by("long", document(1, 500), 4, kv_compress_context_tokens=480)
    sim.pass_by("none", document(1, 100), 4, kv_compress_exact="kvzip")
    sim.add("good", [*document(1, 160), 5], 4, kv_compress_context_tokens=160)
    sim.run()
    assert sim.failed == {"long", "none"} and len(sim.outputs["good"]) == 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_without_a_tokenizer_nothing_is_repeated_and_the_engine_goes_on(asynchronous) -> None:
    """With a step in flight, too: the refused context is computed before its request is ended."""
    sim = Simulation(120, {**EXACT, "exact": "off"}, asynchronous=asynchronous)
    sim.scheduler.vllm_config.model_config.skip_tokenizer_init = True
    sim.pass_by(
        "exact", [*document(1, 50), 5], 4, kv_compress_context_tokens=48,
        kv_compress_exact="kvzip",
    )  # fmt: skip
    sim.add("good", document(2, 100), 4)
    sim.run()
    assert sim.failed == {"exact"} and len(sim.outputs["good"]) == 4


def test_a_context_that_ends_the_prompt_is_packed_while_its_request_decodes() -> None:
    sim = Simulation(120, EXACT, max_model_len=1024)
    sim.add("r", document(1, 320), 60, kv_compress_context_tokens=320)
    sim.run()
    assert len(sim.outputs["r"]) == 60 and "r" in sim.worker.replayed
    assert len(contexts(sim)) == 1


def test_keys_that_nobody_heard_stay_beside_a_context(monkeypatch) -> None:
    """Answers behind a shared context, too many to be listened to."""
    monkeypatch.setattr(slots, "LISTENING_SHARE", 10**9)
    sim = Simulation(900, {**OPTIONS, "policy": "echo"}, max_num_seqs=12, max_model_len=1024)
    planner, unheard = sim.scheduler.kv_compress_planner, []
    for index in range(12):
        sim.add(f"r{index}", [*document(1, 320), *document(30 + index, 20)],
                100 if index < 4 else 300, kv_compress_context_tokens=320)  # fmt: skip
    shared = 0
    while sim.scheduler.has_requests():
        sim.step()
        unheard += [sum(b - a for a, b in t.unheard) for t in planner.packed()]
        shared = max(shared, *(len(c.users) for c in contexts(sim)), 0)
    assert shared == 12 and max(unheard) > 64 and min(unheard) == 0
    assert sim.num_compressions > 4 and sim.pool.get_num_free_blocks() == 899
    # A context itself never keeps for that: it is packed from what its prompt was scored as.
    assert all(len(tokens) in (100, 300) for tokens in sim.outputs.values())


@pytest.mark.parametrize("policy", [SchedulingPolicy.FCFS, SchedulingPolicy.PRIORITY])
def test_who_waits_for_room_does_not_keep_a_part_from_starting(policy) -> None:
    """The owner waits for it with blocks for which others wait, though they came first: they were
    held back once, which puts them before everybody, or are more urgent."""
    sim = Simulation(60, EXACT, max_model_len=1024)
    scheduler = sim.scheduler
    scheduler.policy = policy
    if policy is SchedulingPolicy.PRIORITY:
        for name in {"waiting", "skipped_waiting"} & vars(scheduler).keys():
            setattr(scheduler, name, create_request_queue(policy))
    sim.add("owner", [*document(1, 320), *document(3, 300)], 4, kv_compress_context_tokens=320)
    while not scheduler.running or scheduler.running[0].num_computed_tokens < 300:
        sim.step()
    assert not parts(sim)
    sim.add("waits", document(2, 600), 4)
    request, first = scheduler.requests["waits"], waiting_queues(scheduler)[0]
    request.priority = -1
    for queue in waiting_queues(scheduler):
        queue.remove_requests([request])
    first.prepend_request(request)
    sim.run(400)
    assert {name: len(ids) for name, ids in sim.outputs.items()} == {"owner": 4, "waits": 4}
    assert sim.worker.replayed.keys() == {"owner"} and sim.pool.get_num_free_blocks() == 59


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_many_on_few_documents_all_end(seed, asynchronous) -> None:
    """Repeated or not, in a pool that holds two or three of them, some waiting for others' contexts
    and some for room."""
    choice = Random(seed)
    sim = Simulation(
        45, {**EXACT, "exact": "off"}, asynchronous=asynchronous, max_model_len=512,
        max_num_batched_tokens=200,
    )  # fmt: skip
    wanted = {}
    for index in range(25):
        tokens = [*document(choice.randrange(3), 160), *document(10 + index, choice.randrange(300))]
        name = f"r{index}"
        wanted[name] = choice.randint(1, 30)
        asked = {"kv_compress_context_tokens": choice.choice([64, 160])}
        if choice.random() < 0.4:
            asked["kv_compress_exact"] = "kvzip"
        sim.add(name, tokens, wanted[name], **asked)
        for _ in range(choice.randrange(4)):
            sim.step()
    sim.run(3000)
    assert {name: len(ids) for name, ids in sim.outputs.items()} == wanted
    assert sim.worker.replayed and sim.pool.get_num_free_blocks() == 44


def test_a_context_that_goes_as_its_taker_starts_is_not_repeated_beside_another(
    monkeypatch,
) -> None:
    """It was held when the step began, so nobody held its taker back, and gave its blocks to who
    computes another. Two that await a repetition leave no place for either's."""
    sim = Simulation(
        80, EXACT, max_model_len=1024, max_num_seqs=2, max_num_batched_tokens=1024
    )  # fmt: skip
    monkeypatch.setattr(sim.scheduler.kv_compress_sharing, "hold_back", lambda scheduler: ([], []))
    for family in range(2):
        tokens = [*document(family, 320), *document(9, 40)]
        sim.add(f"r{family}", tokens, 4, kv_compress_context_tokens=320)
    sim.run(400)
    assert {name: len(ids) for name, ids in sim.outputs.items()} == {"r0": 4, "r1": 4}
    assert sim.worker.replayed.keys() == {"r0", "r1"}


def test_a_pause_waits_for_repetitions_that_are_under_way() -> None:
    """``pause(mode="wait")`` ends once nobody runs, and admits nobody until then: but the parts."""
    sim = Simulation(80, EXACT, max_model_len=1024)
    scheduler = sim.scheduler
    sim.add("runs", [*document(1, 320), 5], 4, kv_compress_context_tokens=320)
    sim.step()
    assert not parts(sim)
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    sim.add("new", document(2, 100), 4)
    for _ in range(200):
        sim.step()
    assert len(sim.outputs["runs"]) == 4 and not sim.outputs["new"]
    assert scheduler.pause_state == PauseState.PAUSED_NEW and "runs" in sim.worker.replayed
    scheduler.set_pause_state(PauseState.UNPAUSED)
    sim.run(200)
    assert len(sim.outputs["new"]) == 4


def test_one_that_cannot_start_leads_nobody() -> None:
    """Its grammar is not compiled, say: others need not wait for it to compute what they share."""
    sim = Simulation(120, EXACT, max_model_len=1024)
    for name, family in (("blocked", 1), ("same", 1), ("other", 2)):
        sim.add(name, [*document(family, 320), 5], 4, kv_compress_context_tokens=320)
    scheduler = sim.scheduler
    sharing, blocked = scheduler.kv_compress_sharing, scheduler.requests["blocked"]

    def held_back() -> set[str]:
        return {request.request_id for request in sharing.hold_back(scheduler)[1]}

    assert held_back() == {"same", "other"}
    blocked.status = next(s for s in RequestStatus if s.name.startswith("WAITING_FOR_"))
    assert held_back() == {"other"}  # one context is repeated at a time
    blocked.status = RequestStatus.WAITING
    sim.run()


def test_one_at_a_time_leaves_no_place_for_a_repetition() -> None:
    """``--max-num-active-seqs 1`` of vLLM 0.33."""
    sim = Simulation(120, EXACT, max_model_len=1024)
    sim.scheduler.max_num_active_reqs = 1
    sim.pass_by("none", [*document(1, 320), 5], 4, kv_compress_context_tokens=320)
    sim.run(50)
    assert sim.failed == {"none"}
