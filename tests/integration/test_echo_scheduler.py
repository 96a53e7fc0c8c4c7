# SPDX-License-Identifier: Apache-2.0
"""Echo scores on vLLM's real scheduler: who scores what, what hits bring along, and that nobody
waits for ever. The simulation checks that every kept key has the score that it should have."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import pairwise

import pytest

from kvcompress_vllm.scheduling import slots
from kvcompress_vllm.scheduling.segments import SEGMENT
from tests.integration.simulation import B, Simulation

OPTIONS = {"policy": "echo", "ratio": 4, "recent": 8, "window": 8, "interval": 4}


def prompt(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 1000) for _ in range(length)]


def simulation(blocks: int = 600, tokens: int = 600, **more) -> Simulation:
    options = OPTIONS | more.pop("options", {})
    return Simulation(blocks, options, max_num_batched_tokens=tokens, max_model_len=2048, **more)


@pytest.fixture(autouse=True)
def integrity(monkeypatch):
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_kept_key_has_the_score_of_its_whole_segment(seed, asynchronous):
    """Prompts that share beginnings, in a pool so small that some are preempted."""
    source = random.Random(seed)
    sim = simulation(170 + 40 * seed, source.choice([300, 600]), asynchronous=asynchronous)
    stems = [prompt(seed * 10 + i, 1200) for i in range(2)]
    wishes = [{}, {"kv_compress": False}, {"kv_compress_context_tokens": 333}]
    for index in range(12):
        stem = source.choice(stems)[: source.randrange(100, 1100)]
        text = stem + prompt(100 + index, source.randrange(150, 500))
        sim.add(str(index), text, source.randrange(1, 150), **source.choice(wishes))
        for _ in range(source.randrange(6)):
            sim.step()
    sim.run()
    assert sim.num_cached_tokens and sim.num_compressions


def test_hits_are_whole_segments_and_answers_are_none():
    sim = simulation()
    text = prompt(1, 600)
    sim.add("a", text, 200)
    sim.run()
    conversation = text + sim.outputs["a"]
    cached = []
    for name in "bc":
        before = sim.num_cached_tokens
        sim.add(name, conversation + prompt(ord(name), 20), 2)
        sim.run()
        cached.append(sim.num_cached_tokens - before)
    # Of the prompt, whole segments; what was decoded after a compression is never cached.
    assert cached == [2 * SEGMENT, (len(conversation)) // SEGMENT * SEGMENT]


def test_blocks_filled_by_decoding_are_not_hit():
    """Not compressed, so vLLM caches them: but their scores are of other segments."""
    sim = simulation(options={"min_prompt_tokens": 700})
    sim.add("a", prompt(1, 300), 300)
    sim.run()
    sim.add("b", prompt(1, 300) + sim.outputs["a"] + prompt(2, 200), 2)
    sim.run()
    assert sim.num_cached_tokens == SEGMENT and sim.num_compressions == 1


def test_requests_that_keep_everything_use_every_cached_block():
    sim = simulation()
    for name in "ab":
        sim.add(name, prompt(1, 500), 2, kv_compress=False)
        sim.run()
    assert sim.num_cached_tokens == (500 - OPTIONS["window"]) // B * B


@pytest.mark.parametrize("tokens", [64, 192, 257, 300])
def test_nobody_waits_for_ever_for_room(tokens):
    sim = simulation(tokens=tokens, max_num_seqs=8)
    for index in range(8):
        sim.add(str(index), prompt(index, 130 + 97 * index), 20)
    sim.run(2000)
    assert all(len(sim.outputs[str(i)]) == 20 for i in range(8))


def test_chunks_end_where_the_next_compression_is_due():
    """Within a peak several times in a prompt, each time elsewhere than at whole segments."""
    sim = simulation(tokens=600, options={"prefill_peak_tokens": 288})
    sim.add("a", prompt(1, 1000), 20)
    sim.run(100)
    assert len(sim.outputs["a"]) == 20 and sim.num_compressions > 3


def test_prompts_that_share_a_step_are_cut_where_segments_end():
    """Not where the step is full: what is scored does not depend on the neighbours."""
    sim = simulation(tokens=600)
    lengths = {"a": 700, "b": 1000}
    for name, length in lengths.items():
        sim.add(name, prompt(ord(name), length), 30)
    ends, stock = defaultdict(list), sim.worker.run

    def run(output, *rest):
        for item in output.kv_compress.echoes:
            ends[item.request_id].append(item.end)
        stock(output, *rest)

    sim.worker.run = run
    sim.run()
    for name, length in lengths.items():
        assert ends[name].pop() == length
        assert ends[name] and not any(end % SEGMENT for end in ends[name])


def test_what_is_decoded_is_scored_once_in_segments():
    sim = simulation()
    heard, unscored = defaultdict(list), []
    stock = sim.worker.run

    def run(output, *rest):
        for item in output.kv_compress.heard:
            heard[item.request_id].append((item.first, item.end))
        unscored.extend(item.unscored for item in output.kv_compress.compressions)
        stock(output, *rest)

    sim.worker.run = run
    for name in "ab":
        sim.add(name, prompt(ord(name), 512 + 40 * (name == "b")), 400)
    sim.run()
    assert len(unscored) > 8 and not any(unscored)
    for ranges, length in ((heard["a"], 512), (heard["b"], 552)):
        assert ranges[0][0] == length
        assert all(end == begin for (_, end), (begin, _) in pairwise(ranges))


def test_listeners_give_their_slots_to_prompts(monkeypatch):
    monkeypatch.setattr(slots, "LISTENING_SHARE", 100)
    sim = simulation(blocks=900, max_num_seqs=12)
    planner = sim.scheduler.kv_compress_planner
    assert planner.observers.count < 12
    for index in range(12):
        sim.add(str(index), prompt(index, 400), 300)
    most = 0
    while sim.scheduler.has_requests():
        sim.step()
        most = max(most, len(sim.scheduler.running))
        held = [
            t.listen_slot if t.observe_slot is None else t.observe_slot
            for t in planner.requests.values()
        ]
        taken = [slot for slot in held if slot is not None]
        assert len(taken) == len(set(taken))
    assert most == 12 and len(planner.observers._slots) == planner.observers.count


@pytest.mark.parametrize(
    ("asynchronous", "page_dtype"),
    [(False, "auto"), (True, "auto"), (True, "fp8"), (False, "int4")],
)
def test_what_nobody_heard_is_kept(asynchronous, page_dtype, monkeypatch):
    """Slots for a third of the requests; the others get one when those are done, and some protect a
    part of their prompt. The simulation checks what every head holds."""
    monkeypatch.setattr(slots, "LISTENING_SHARE", 10**9)
    options = {"page_dtype": page_dtype}
    sim = simulation(blocks=900, max_num_seqs=12, asynchronous=asynchronous, options=options)
    planner, held = sim.scheduler.kv_compress_planner, []
    assert planner.observers.count == slots.FEWEST_OBSERVE_SLOTS
    for index in range(12):
        wish = {"kv_compress_protect": "10:60"} if index % 3 == 1 else {}
        sim.add(str(index), prompt(index, 300 + 10 * index), 100 if index < 4 else 400, **wish)
    while sim.scheduler.has_requests():
        sim.step()
        held += [sum(b - a for a, b in t.unheard) for t in planner.packed()]
    assert max(held) > 4 * B and min(held) == 0
    assert sim.num_compressions > 12 + 4


def test_a_load_does_not_change_what_is_kept_of_what_is_heard():
    """Who has a slot from the start is compressed as if it were alone."""
    kept = []
    for others in (0, 8):
        sim = simulation(blocks=900, max_num_seqs=12)
        for index in range(others + 1):
            sim.add(str(index), prompt(index, 400), 200 if index else 150)
        while "0" in sim.live:
            sim.step()
            tracked = sim.scheduler.kv_compress_planner.requests.get("0")
            if tracked is not None:
                last = tracked.packing, tracked.unheard
        kept.append(last)
    assert kept[0] == kept[1] and kept[0][1] == ()
