# SPDX-License-Identifier: Apache-2.0
"""Echo scores on vLLM's real scheduler: who scores what, what hits bring along, and that nobody
waits for ever. The simulation checks that every kept key has the score that it should have."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import pairwise

import pytest

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


def test_what_is_decoded_is_scored_once_in_segments():
    sim = simulation()
    heard, unscored = defaultdict(list), []
    stock = sim.worker.run

    def run(output, tokens):
        for item in output.kv_compress.heard:
            heard[item.request_id].append((item.first, item.end))
        unscored.extend(item.unscored for item in output.kv_compress.compressions)
        stock(output, tokens)

    sim.worker.run = run
    for name in "ab":
        sim.add(name, prompt(ord(name), 512 + 40 * (name == "b")), 400)
    sim.run()
    assert len(unscored) > 8 and not any(unscored)
    for ranges, length in ((heard["a"], 512), (heard["b"], 552)):
        assert ranges[0][0] == length
        assert all(end == begin for (_, end), (begin, _) in pairwise(ranges))


def test_listeners_give_their_slots_to_prompts():
    sim = simulation(blocks=900, max_num_seqs=12)
    planner = sim.scheduler.kv_compress_planner
    assert planner.observers.count < 12
    for index in range(12):
        sim.add(str(index), prompt(index, 400), 300)
    most = 0
    while sim.scheduler.has_requests():
        sim.step()
        most = max(most, len(sim.scheduler.running))
        slots = [
            t.listen_slot if t.observe_slot is None else t.observe_slot
            for t in planner.requests.values()
        ]
        taken = [slot for slot in slots if slot is not None]
        assert len(taken) == len(set(taken))
    assert most == 12 and len(planner.observers._slots) == planner.observers.count
