# SPDX-License-Identifier: Apache-2.0
"""Packed prefixes that requests share, on vLLM's real scheduler with a pretend model.

Contents are checked in every step that compresses: each head of each request holds keys of its own
prompt. Integrity is checked on every step: who owns which block, and what the workers know.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcompress_vllm import policies
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.integration.compat.releases import waiting_queues
from kvcompress_vllm.integration.engine import queues
from kvcompress_vllm.ops.reference.rows import State
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.report import Report
from kvcompress_vllm.scheduling.segments import SEGMENT
from tests.integration.simulation import H, L, Simulation, numbers

OPTIONS = {"policy": "kv_compress", "ratio": 8, "recent": 8, "sinks": 2, "min_tokens_per_head": 8,
           "window": 4, "min_prompt_tokens": 40, "interval": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def _checked(monkeypatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")


def document(family: int, length: int) -> list[int]:
    source = random.Random(family)
    return [source.randrange(3, 1000) for _ in range(length)]


def held(sim: Simulation) -> int:
    return sim.pool.num_gpu_blocks - 1 - sim.pool.get_num_free_blocks()


def contexts(sim: Simulation) -> list:
    return list(sim.scheduler.kv_compress_planner.contexts)


def kept(sim: Simulation) -> dict[bytes, list[list[int]]]:
    """Of each context, by head the positions that it keeps."""
    state, result = State(*sim.worker.state.tables), {}
    for context in contexts(sim):
        row = [*context.blocks, *[0] * (context.packing.covered - context.packing.kept)]
        slot = sim.worker.state.slot_of(row)
        assert slot == context.slot
        heads = [state.head(torch.tensor(row), slot, *divmod(head, H)) for head in range(L * H)]
        keys = [head.keys(sim.worker.pages, context.num_tokens) for head in heads]
        result[context.key] = [numbers(each[:, each.shape[1] // 2 :]).tolist() for each in keys]
    return result


def run(sim: Simulation) -> int:
    """Until all are answered; the most blocks that were held."""
    most = 0
    while sim.scheduler.has_requests():
        sim.step()
        most = max(most, held(sim))
    return most


def test_a_second_request_takes_what_the_first_packed() -> None:
    sim = Simulation(80, OPTIONS)
    sim.add("first", [*document(1, 320), 5, 6, 7], 4, kv_compress_context_tokens=320)
    sim.run()
    assert (sim.num_compressions, sim.num_cached_tokens) == (1, 0)
    (context,) = contexts(sim)
    assert (context.num_tokens, context.packing, context.users) == (320, (20, 3), set())
    sim.add("second", [*document(1, 320), 8, 9], 4, kv_compress_context_tokens=320)
    sim.step()
    # Neither computed nor compressed: it holds the context's blocks, and one of its own.
    assert (sim.num_compressions, sim.num_cached_tokens) == (1, 320)
    assert held(sim) == 3 + 1 and context.users == {"second"}
    sim.run()
    assert len(sim.outputs["second"]) == 4
    assert sim.pool.get_num_free_blocks() == 79


@pytest.mark.parametrize(("asked", "taken"), [
    ({"kv_compress_context_tokens": 327}, True),  # the same in whole blocks
    ({"kv_compress_context_tokens": 304}, False),
    ({"kv_compress_context_tokens": 320, "kv_compress_ratio": 4}, False),
    ({"kv_compress_context_tokens": 320, "kv_compress_protect": "0:40"}, False),
    ({"kv_compress_context_tokens": 320, "kv_compress_protect": "325:330"}, True),
    ({}, False),
])  # fmt: skip
def test_only_what_is_packed_alike_is_taken(asked: dict, taken: bool) -> None:
    sim = Simulation(120, OPTIONS)
    tokens = [*document(1, 320), *range(3, 20)]
    sim.add("first", tokens, 4, kv_compress_context_tokens=320)
    sim.run()
    sim.add("second", tokens, 40, **asked)
    sim.step()
    assert (contexts(sim)[0].users == {"second"}) == taken
    sim.run()
    assert len(sim.outputs["second"]) == 40


def test_those_who_come_at_once_wait_for_one() -> None:
    """24 on a document of 40 blocks: one computes it, all share what it packed."""
    sim = Simulation(140, {**OPTIONS, "decode": False}, max_num_seqs=24, max_model_len=800,
                     max_num_batched_tokens=400)  # fmt: skip
    for index in range(24):
        sim.add(f"r{index}", [*document(1, 640), *document(100 + index, 9)], 30,
                kv_compress_context_tokens=640)  # fmt: skip
    # Someone else does not wait behind them.
    sim.add("other", document(2, 30), 3)
    for _ in range(3):
        sim.step()
    assert "other" in {r.request_id for r in sim.scheduler.running}
    most = run(sim)
    assert sim.num_compressions == 1 and sim.num_preemptions == 0
    assert all(len(sim.outputs[f"r{index}"]) == 30 for index in range(24))
    # 5 packed blocks, and of each 39 tokens of its own.
    assert most <= max(40 + 5, 5 + 24 * 3) + 4
    (context,) = contexts(sim)
    assert context.hits == 23
    assert sum(report.shared.hits for report in sim.reports) == 23
    assert sum(report.shared.misses for report in sim.reports) == 1
    assert sum(report.shared.tokens for report in sim.reports) == 23 * 640
    assert max(report.shared.saved_blocks for report in sim.reports) == 23 * 5
    assert all(report.occupancy.packed_blocks <= 139 for report in sim.reports)
    assert sum(report.shared.waits for report in sim.reports) > 23


def test_who_takes_a_context_is_admitted_by_what_it_takes() -> None:
    """Ten users of 5 packed blocks, where another prompt of 41 would not fit beside five."""
    sim = Simulation(50, {**OPTIONS, "decode": False}, max_num_seqs=12, max_model_len=800,
                     max_num_batched_tokens=400)  # fmt: skip
    sim.add("first", [*document(1, 640), 5], 2, kv_compress_context_tokens=640)
    sim.run()
    for index in range(10):
        sim.add(f"r{index}", [*document(1, 640), *document(100 + index, 9)], 30,
                kv_compress_context_tokens=640)  # fmt: skip
    sim.step()
    assert len(sim.scheduler.running) == 10
    sim.run()
    assert sim.num_preemptions == 0


def test_a_user_that_grows_packs_into_blocks_of_its_own() -> None:
    """The shared blocks are as before for the other, who is checked with every compression."""
    sim = Simulation(120, OPTIONS)
    for name, tokens in (("short", 60), ("long", 120)):
        sim.add(name, [*document(1, 320), 5], tokens, kv_compress_context_tokens=320)
    while not contexts(sim) or len(contexts(sim)[0].users) < 2:
        sim.step()
    (context,) = contexts(sim)
    before = sim.worker.pages.view(120, -1)[list(context.blocks)].clone()
    while len(sim.outputs["long"]) < 119:
        sim.step()
    assert sim.num_compressions > 1 and "long" not in context.users
    assert sim.worker.pages.view(120, -1)[list(context.blocks)].equal(before)
    sim.run()
    assert [len(sim.outputs[name]) for name in ("short", "long")] == [60, 120]


def test_who_computes_it_may_go_and_another_goes_on() -> None:
    sim = Simulation(80, OPTIONS)
    for index in range(3):
        sim.add(f"r{index}", [*document(1, 320), index + 3], 4, kv_compress_context_tokens=320)
    for _ in range(3):
        sim.step()
    assert [r.request_id for r in sim.scheduler.running] == ["r0"]
    sim.abort("r0")
    sim.run()
    assert [len(sim.outputs[f"r{index}"]) for index in (1, 2)] == [4, 4]
    assert sim.num_compressions == 1 and contexts(sim)[0].owner == "r1"
    sim.add("r3", [*document(2, 320), 5], 4, kv_compress_context_tokens=320)
    sim.abort("r3")
    sim.step()
    assert sim.scheduler.kv_compress_sharing._waiting == {}, "neither who started nor who went"


def test_the_least_recently_used_goes_when_blocks_run_out() -> None:
    sim = Simulation(30, OPTIONS)
    for family in (1, 2, 1, 3, 4):
        sim.add(f"r{sim.num_steps}", [*document(family, 320), 5], 2,
                kv_compress_context_tokens=320)  # fmt: skip
        sim.run()
    assert sim.num_compressions == 4
    families = len(contexts(sim))
    assert 0 < families < 4
    # All blocks of what is left are there, and what lost one is forgotten in the workers as well.
    assert sim.worker.state.slots.keys() == {context.slot for context in contexts(sim)}
    assert sim.pool.get_num_free_blocks() == 29


def test_what_a_context_was_packed_from_goes_first() -> None:
    """A pool of three documents holds eight of them packed."""
    sim = Simulation(66, OPTIONS)
    for family in range(8):
        sim.add(f"r{family}", [*document(family, 320), 5], 2, kv_compress_context_tokens=320)
        sim.run()
    assert len(contexts(sim)) == 8
    # The latest is there uncompressed as well, for one who wants it so.
    sim.add("whole", [*document(7, 320), 5], 2, kv_compress=False)
    cached = sim.num_cached_tokens
    sim.run()
    assert sim.num_cached_tokens - cached == 304  # all but the window, in whole blocks


def test_slots_of_contexts_are_taken_from_the_least_recently_used(monkeypatch) -> None:
    monkeypatch.setattr("kvcompress_vllm.scheduling.slots.FEWEST_CONTEXTS", 2)
    monkeypatch.setattr("kvcompress_vllm.scheduling.slots.MOST_CONTEXTS", 2)
    sim = Simulation(80, OPTIONS)
    for family in (1, 2, 1, 3):
        sim.add(f"r{sim.num_steps}", [*document(family, 160), 5], 2,
                kv_compress_context_tokens=160)  # fmt: skip
        sim.run()
    assert [context.hits for context in contexts(sim)] == [1, 0]
    assert sim.worker.state.slots.keys() == {context.slot for context in contexts(sim)}
    # With both in use a third packs for itself.
    for family in (1, 3, 4):
        sim.add(f"in use {family}", [*document(family, 160), 5], 40,
                kv_compress_context_tokens=160)  # fmt: skip
    sim.run()
    assert len(contexts(sim)) == 2 and sim.num_compressions >= 4


def test_reset_prefix_cache_forgets_contexts() -> None:
    sim = Simulation(80, OPTIONS)
    sim.add("first", [*document(1, 320), 5], 4, kv_compress_context_tokens=320)
    sim.run()
    assert sim.scheduler.reset_prefix_cache()
    assert contexts(sim) == [] and len(sim.pool.cached_block_hash_to_block) == 0
    sim.add("second", [*document(1, 320), 5], 4, kv_compress_context_tokens=320)
    sim.run()
    assert (sim.num_compressions, sim.num_cached_tokens) == (2, 0)


def test_a_context_that_lost_one_of_its_blocks_is_not_taken() -> None:
    """vLLM may forget any block that it has cached, not only to give it away."""
    sim = Simulation(80, OPTIONS)
    sim.add("first", [*document(1, 320), 5], 4, kv_compress_context_tokens=320)
    sim.run()
    (context,) = contexts(sim)
    assert sim.pool._maybe_evict_cached_block(sim.pool.blocks[context.blocks[-1]])
    sim.add("second", [*document(1, 320), 6], 4, kv_compress_context_tokens=320)
    sim.run()
    assert context.hits == 0 and [c.owner for c in contexts(sim)] == ["second"]


def test_dropped_in_use_and_packed_anew_before_its_last_user_goes() -> None:
    sim = Simulation(120, OPTIONS)
    sim.add("old", [*document(1, 320), 5], 60, kv_compress_context_tokens=320)
    while not contexts(sim):
        sim.step()
    assert sim.scheduler.kv_compress_sharing.drop() == 1
    sim.add("new", [*document(1, 320), 6], 90, kv_compress_context_tokens=320)
    while "old" in sim.live:
        sim.step()
    (context,) = contexts(sim)
    assert (context.owner, sim.num_compressions) == ("new", 2)
    sim.add("late", [*document(1, 320), 7], 4, kv_compress_context_tokens=320)
    sim.run()
    assert context.hits == 1 and [len(said) for said in sim.outputs.values()] == [60, 90, 4]
    assert sim.pool.get_num_free_blocks() == 119


def test_a_preempted_user_takes_it_again() -> None:
    sim = Simulation(80, OPTIONS)
    for index in range(3):
        sim.add(f"r{index}", [*document(1, 320), index + 3], 30, kv_compress_context_tokens=320)
    while len(sim.scheduler.running) < 3:
        sim.step()
    for _ in range(5):
        sim.step()
    compressions = sim.num_compressions
    assert not sim.scheduler.reset_prefix_cache()  # in use
    sim.scheduler._preempt_request(sim.scheduler.running.pop(), 0.0)
    sim.step()
    sim.step()
    assert len(contexts(sim)[0].users) == 3 and sim.num_compressions == compressions
    sim.run()
    assert all(len(tokens) == 30 for tokens in sim.outputs.values())


def test_without_prefix_caching_nothing_is_shared() -> None:
    sim = Simulation(80, OPTIONS, prefix_caching=False)
    for index in range(2):
        sim.add(f"r{index}", [*document(1, 320), index + 3], 4, kv_compress_context_tokens=320)
    sim.run()
    assert sim.num_compressions == 2 and contexts(sim) == []


@pytest.mark.parametrize("options", [{"mass": 0.9, "ratio": None}, {"prefill_peak_tokens": 256}])
def test_contexts_of_a_mass_and_within_a_peak(options: dict) -> None:
    sim = Simulation(120, {**OPTIONS, **options})
    for index in range(3):
        sim.add(f"r{index}", [*document(1, 320), *document(50 + index, 20 + 60 * index)], 40,
                kv_compress_context_tokens=320)  # fmt: skip
        if index == 1:
            sim.run()
    sim.run()
    (context,) = contexts(sim)
    assert context.hits == 2
    assert all(len(tokens) == 40 for tokens in sim.outputs.values())


def test_a_context_whose_policy_failed_ends_all_who_have_it(monkeypatch) -> None:
    sim = Simulation(80, OPTIONS)
    for index in range(2):
        sim.add(f"r{index}", [*document(1, 320), index + 3], 30, kv_compress_context_tokens=320)
    sim.add("other", document(2, 100), 30)
    while len(contexts(sim)) < 1 or len(contexts(sim)[0].users) < 2:
        sim.step()
    (context,) = contexts(sim)
    curve = LossCurve([1], [0.0])
    failed = Report("r0", context.slot, 320, "prefill", [], 0.0, 0.0, curve, "score raised it")
    with monkeypatch.context() as patch:
        place = "kvcompress_vllm.integration.engine.scheduler.reports_of"
        patch.setattr(place, lambda output: [failed])
        sim.step()
    assert sim.failed == {"r0", "r1"} and contexts(sim) == []
    sim.run()
    assert len(sim.outputs["other"]) == 30 and sim.pool.get_num_free_blocks() == 79


def test_auto_finds_what_comes_again() -> None:
    """A document seen twice is packed once and then taken, wherever its readers go on."""
    sim = Simulation(200, {**OPTIONS, "share": "auto"}, max_model_len=900)
    for index in range(4):
        sim.add(f"r{index}", [*document(1, 600), *document(20 + index, 30)], 4)
        sim.run()
    (context,) = contexts(sim)
    # The first reader does not know yet, the second packs it, up to a multiple of 256 tokens.
    assert (context.num_tokens, context.owner, context.hits) == (512, "r1", 2)
    # Someone else's document, and one who opts out or names a context of its own.
    sim.add("other", document(2, 600), 4)
    sim.add("out", [*document(1, 600), 5], 4, kv_compress=False)
    sim.add("own", [*document(1, 600), 5], 4, kv_compress_context_tokens=320)
    sim.run()
    assert context.hits == 2
    assert sorted(c.num_tokens for c in contexts(sim)) == [320, 512]
    assert all(len(tokens) == 4 for tokens in sim.outputs.values())


def test_auto_takes_whole_strides_that_are_alike() -> None:
    """Of 500 tokens in common 256 are a multiple; and without ``auto`` nobody looks."""
    for share, found in (("auto", [256]), ("context", [])):
        sim = Simulation(200, {**OPTIONS, "share": share}, max_model_len=900)
        for index in range(3):
            sim.add(f"r{index}", [*document(1, 500), *document(20 + index, 200)], 4)
            sim.run()
        assert [context.num_tokens for context in contexts(sim)] == found


def test_a_context_that_is_the_whole_prompt() -> None:
    """Others share it, but not one who has nothing behind it to compute; within a peak what ends a
    prompt is none."""
    sim = Simulation(80, OPTIONS)
    for name in ("first", "second"):
        sim.add(name, document(1, 320), 4, kv_compress_context_tokens=320)
        sim.run()
    (context,) = contexts(sim)
    assert context.hits == 0 and sim.num_compressions == 2
    sim.add("third", [*document(1, 320), 5], 4, kv_compress_context_tokens=320)
    sim.run()
    assert context.hits == 1 and sim.num_compressions == 2
    sim = Simulation(80, {**OPTIONS, "prefill_peak_tokens": 256})
    sim.add("first", document(1, 320), 4, kv_compress_context_tokens=320)
    sim.run()
    assert contexts(sim) == []


def test_the_usage_names_the_context() -> None:
    sim = Simulation(80, OPTIONS)
    sim.add("packs", [*document(1, 320), 5], 4, kv_compress_context_tokens=320)
    sim.add("alone", document(2, 320), 4)
    counts = {}
    while sim.live:
        sim.step()
        counts |= sim.scheduler._usage._counts
    assert {name: count.context_tokens for name, count in counts.items()} == {
        "packs": 320, "alone": 0,
    }  # fmt: skip
    assert all(count.compressions == 1 for count in counts.values())


def test_off_shares_nothing() -> None:
    sim = Simulation(80, {**OPTIONS, "share": "off"})
    for index in range(2):
        sim.add(f"r{index}", [*document(1, 320), index + 3], 4, kv_compress_context_tokens=320)
    sim.run()
    assert sim.num_compressions == 2 and contexts(sim) == []


def turns(sim: Simulation, count: int, **asked) -> list[int]:
    """A conversation; tokens that each turn did not compute."""
    history, cached = document(1, 600), []
    for turn in range(count):
        before = sim.num_cached_tokens
        sim.add(f"turn {turn}", history, 20, **asked)
        sim.run()
        cached.append(sim.num_cached_tokens - before)
        history = [*history, *sim.outputs[f"turn {turn}"], *document(50 + turn, 130)]
    return cached


def test_who_waits_for_a_context_passes_others_only_if_it_is_computed_now() -> None:
    """Later it may be gone. But else those who ask for room could wait for as long as there are
    others who share."""
    sim = Simulation(60, OPTIONS, max_model_len=1024, max_num_seqs=4)
    sim.add("runs", [*document(0, 320), 5], 60, kv_compress_context_tokens=320)
    sim.step()
    sim.add("waits for room", document(1, 700), 4)
    for index in range(3):
        for half in "ab":
            tokens = [*document(2 + index, 64), index, ord(half)]
            sim.add(f"{index}{half}", tokens, 4, kv_compress_context_tokens=64)
    sim.add("shares", [*document(0, 320), 6], 4, kv_compress_context_tokens=320)
    finished: list[str] = []
    while sim.live:
        live = sim.live
        sim.step()
        finished += [name for name in live if name not in sim.live]
    finished.remove("runs")
    assert finished[:2] == ["shares", "waits for room"] and len(finished) == 8


def test_whose_context_is_computed_now_comes_before_all_others() -> None:
    """Also before those whom vLLM has passed over and keeps in a queue of their own."""
    sim = Simulation(60, OPTIONS)
    for name in ("skipped", "waits", "served"):
        sim.add(name, document(1, 30), 4)
    scheduler, waiting = sim.scheduler, waiting_queues(sim.scheduler)
    for queue in waiting:
        queue.remove_requests([scheduler.requests["skipped"]])
    waiting[0].prepend_request(scheduler.requests["skipped"])
    with queues.without(scheduler, [], [scheduler.requests["served"]]):
        pass
    order = [request.request_id for queue in waiting for request in queue]
    assert order == ["served", "skipped", "waits"]


@pytest.mark.parametrize(
    "options", [{}, {"policy": "echo", "page_dtype": "int4"}], ids=["kv_compress", "echo-int4"]
)
def test_a_turn_goes_on_from_the_latest_multiple_of_the_stride(options) -> None:
    options = {"context_stride": 256, **options}
    sim = Simulation(250, {**OPTIONS, **options}, max_model_len=2048, max_num_batched_tokens=600)
    # Prompts of 600, 750, 900, 1050 ... tokens, answers of 20. All full blocks of the turn before,
    # but none that the next mark observes.
    assert turns(sim, 8) == [0, 608, 768, 912, 1056, 1216, 1360, 1504]
    assert [context.num_tokens for context in contexts(sim)] == [256, 512, 768, 1024, 1280, 1536]
    assert sim.pool.get_num_free_blocks() == 249
    # One compression at each, whoever comes.
    at_marks = sim.num_compressions
    kept = {context.key: context.packing for context in contexts(sim)}
    assert sim.scheduler.reset_prefix_cache()
    sim.add("anew", sim._tokens["turn 7"][:1650], 1)
    sim.run()
    assert {context.key: context.packing for context in contexts(sim)} == kept
    assert sim.num_compressions - at_marks == 6


def test_conversations_that_branch_share_what_they_have_in_common() -> None:
    """And whoever comes at the same time waits for the latest multiple that is being computed."""
    sim = Simulation(250, {**OPTIONS, "context_stride": 256}, max_model_len=2048)
    for index in range(3):
        sim.add(f"r{index}", [*document(1, 600), *document(20 + index, 250)], 30)
    sim.run()
    assert sorted(context.num_tokens for context in contexts(sim)) == [256, 512, 768, 768, 768]
    # The first 37 blocks of 600 tokens are alike, of which 32 are packed.
    assert sim.num_cached_tokens == 2 * 592
    # Later, too: nothing was given away while there was other room.
    sim.add("later", [*document(1, 600), *document(30, 10)], 2)
    sim.run()
    assert sim.num_cached_tokens == 3 * 592
    assert [len(tokens) for tokens in sim.outputs.values()] == [30, 30, 30, 2]


def test_a_multiple_at_which_nothing_is_gained_is_none() -> None:
    """With a budget of tokens, the first ones; a named context is instead of all of them."""
    sim = Simulation(250, {**OPTIONS, "context_stride": 256}, max_model_len=2048)
    sim.add("tokens", document(1, 1200), 2, kv_compress_budget_tokens=600)
    sim.run()
    assert [context.num_tokens for context in contexts(sim)] == [768, 1024]
    sim.add("named", document(2, 1200), 2, kv_compress_context_tokens=320)
    sim.add("mass", document(3, 600), 2, kv_compress_mass=0.9)
    sim.run()
    assert [context.num_tokens for context in contexts(sim)] == [768, 1024, 320]
    with pytest.raises(ValueError, match="exclude each other"):
        sim.add("both", document(2, 1200), 2, kv_compress_context_tokens=320,
                kv_compress_context_stride=256)  # fmt: skip
    with pytest.raises(ValueError, match="not accepted with mass"):
        sim.add("both", document(2, 1200), 2, kv_compress_mass=0.9, kv_compress_context_stride=256)


POLICIES = ["echo", "snapkv", "diverse", "kv_compress"]


class SharingMachine(RuleBasedStateMachine):
    """Requests on few documents come, wait, share, go on in what others left unfinished, grow, are
    preempted, aborted, forgotten. Some have a policy, a budget or a stride of their own."""

    @initialize(
        num_blocks=st.integers(33, 70),
        max_num_batched_tokens=st.sampled_from([16, 64, 200]),
        max_num_seqs=st.integers(1, 8),
        decode=st.booleans(),
        asynchronous=st.booleans(),
        drafts=st.sampled_from([0, 0, 3]),
        options=st.sampled_from(
            [
                {},
                {"prefill_peak_tokens": 256},
                {"prefill_peak_tokens": 256, "policy": "echo", "allow_policies": True},
                {"mass": 0.8, "ratio": None},
                {"mass": 0.8, "ratio": None, "allow_policies": True},
                {"max_ratio": 16},
                {"share": "auto"},
                {"policy": "echo"},
                {"policy": "echo", "exact": "kvzip"},
                {"policy": "echo", "exact": "kvzip", "share": "auto"},
                {"context_stride": 256, "share": "auto"},
                {"context_stride": 256, "allow_policies": True},
                {"context_stride": 256, "policy": "echo", "max_ratio": 16},
                {"context_stride": 256, "policy": "echo"},
                {"context_stride": 256, "policy": "echo", "allow_policies": True},
            ]
        ),
        page_dtype=st.sampled_from([each.label for each in PageFormat]),
    )
    def build(
        self, num_blocks, max_num_batched_tokens, max_num_seqs, decode, asynchronous, drafts,
        options, page_dtype,
    ):  # fmt: skip
        if options.get("policy") == "echo":
            max_num_seqs = max(max_num_seqs, 2)  # a repetition takes another
        self.longest, self.stride = 512, "context_stride" in options
        if self.stride:  # turns that reach the next mark, in steps that hold a segment
            self.longest, num_blocks = 900, num_blocks + 40
            max_num_batched_tokens = 64 if max_num_batched_tokens == 16 else 450
        options = {**OPTIONS, "decode": decode, "page_dtype": page_dtype, **options}
        self.sim = Simulation(
            num_blocks, options, asynchronous=asynchronous, drafts=drafts * self.stride,
            max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs,
            max_model_len=self.longest,
        )  # fmt: skip
        self.added, self.wanted, self.prompts, self.asked = 0, {}, {}, {}

    def send(self, tokens, max_tokens, asked):
        name = f"r{self.added}"
        self.sim.add(name, tokens, max_tokens, **asked)
        self.added, self.wanted[name] = self.added + 1, max_tokens
        self.prompts[name], self.asked[name] = tokens, asked

    @rule(
        family=st.integers(0, 2),
        context=st.sampled_from([64, 160, 163, 320]),
        more=st.integers(0, 60),
        max_tokens=st.integers(1, 60),
        asked=st.sampled_from(
            [
                {},
                {},
                {},
                {"kv_compress_ratio": 4},
                {"kv_compress_protect": "0:30"},
                {"kv_compress_mass": 0.7},
                *({"kv_compress_policy": name} for name in POLICIES),
            ]
        ),
        times=st.integers(1, 3),
        named=st.booleans(),
        exact=st.booleans(),
    )
    def add(self, family, context, more, max_tokens, asked, times, named, exact):
        config = self.sim.config
        if exact and named and config.policy == "echo" and not config.prefill_peak_tokens:
            asked = {"kv_compress_exact": "kvzip"}
        if config.exact != "off" or "kv_compress_exact" in asked:
            context = min(context, 160)  # the front end refuses what cannot be repeated within 512
        policy = asked.get("kv_compress_policy", config.policy)
        if policy != config.policy and not config.allow_policies:
            asked = {}
        if config.mass is not None and not policies.find(policy).additive:
            asked = {}  # the front end refuses these together
        if named or not self.stride:
            asked = {**asked, "kv_compress_context_tokens": context}
        for _ in range(times):
            tokens = [*document(family, 330)[:context], *document(self.added + 10, more)]
            self.send(tokens, max_tokens, asked)

    @rule(
        choice=st.randoms(use_true_random=False), more=st.integers(0, 60),
        max_tokens=st.integers(1, 60), share=st.integers(0, 40), again=st.booleans(),
    )  # fmt: skip
    def go_on(self, choice, more, max_tokens, share, again):
        """The next turn of a conversation, or another end of the latest one; by who asks for the
        same, or for nothing."""
        name = choice.choice(sorted(self.prompts) or [""])
        if not name:
            return
        said = self.sim.outputs[name]
        tokens = [*self.prompts[name], *said[: len(said) - share], *document(self.added + 10, more)]
        if len(tokens) + max_tokens > self.longest or self.sim.config.exact != "off":
            return
        self.send(tokens, max_tokens, self.asked[name] if again else {})

    @rule(steps=st.integers(1, 20))
    def step(self, steps):
        for _ in range(steps):
            self.sim.step()

    @rule(choice=st.randoms(use_true_random=False))
    def abort(self, choice):
        live = [name for name in self.sim.live if name in self.sim.outputs]
        if live:
            name = choice.choice(live)
            self.wanted.pop(name, None)
            self.sim.abort(name)

    @rule(choice=st.randoms(use_true_random=False))
    def preempt(self, choice):
        if self.sim.scheduler.running:
            request = self.sim.scheduler.running[-1]
            if request.num_output_placeholders == 0:
                self.sim.scheduler.running.pop()
                self.sim.scheduler._preempt_request(request, 0.0)

    @rule()
    def reset_prefix_cache(self):
        self.sim.scheduler.reset_prefix_cache(reset_running_requests=True)

    @rule(choice=st.randoms(use_true_random=False), in_use=st.booleans())
    def drop(self, choice, in_use):
        found = [c for c in contexts(self.sim) if c.users or not in_use]
        if found:
            assert self.sim.scheduler.kv_compress_sharing.drop(choice.choice(found).name) == 1

    @invariant()
    def pool_is_sound(self):
        if hasattr(self, "sim"):
            self.sim.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "sim"):
            return
        self.sim.run()
        self.sim.step()  # tells the worker what was dropped since
        assert {name: len(self.sim.outputs[name]) for name in self.wanted} == self.wanted
        assert self.sim.pool.get_num_free_blocks() == self.sim.pool.num_gpu_blocks - 1
        planner = self.sim.scheduler.kv_compress_planner
        assert planner.requests == {} and self.sim.worker.rows == {}
        assert self.sim.worker.state.slots.keys() == {c.slot for c in contexts(self.sim)}
        assert all(not context.users for context in contexts(self.sim))
        assert planner.contexts._computing == {}
        self.contexts_are_those_of_misses()
        assert self.sim.scheduler.reset_prefix_cache()
        self.sim.scheduler.schedule()
        assert len(planner.contexts._slots) == planner.contexts._slots.count

    def contexts_are_those_of_misses(self):
        """Who computes one anew, alone, keeps the same of it."""
        before, found = kept(self.sim), contexts(self.sim)
        for index, context in enumerate(found):
            asked, n = self.asked[context.owner], context.num_tokens
            policy, named = asked.get("kv_compress_policy"), "kv_compress_context_tokens" in asked
            if n + 20 > self.longest or not (named or self.stride):
                continue
            tokens_at_once = self.sim.vllm_config.scheduler_config.max_num_batched_tokens
            small = named or tokens_at_once < SEGMENT
            if small and self.sim.config.reads_echo(policy):
                # By scores of what a step computed of it. A segment that an answer ends has them
                # all at once; one that steps cut, in a prompt, has not, and is nobody's context.
                continue
            assert self.sim.scheduler.reset_prefix_cache()
            tokens = [*self.prompts[context.owner], *self.sim.outputs[context.owner]]
            self.sim.add(f"anew {index}", [*tokens[:n], *document(index, 5)], 1, **asked)
            self.sim.run()
            assert kept(self.sim)[context.key] == before[context.key]


TestSharingMachine = SharingMachine.TestCase
TestSharingMachine.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
