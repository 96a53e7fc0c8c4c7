# SPDX-License-Identifier: Apache-2.0
"""Turns of conversations that go on from what the turns before left, on vLLM's real scheduler with
a pretend model. Integrity is checked on every step, contents in every step that compresses."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.report import Report
from tests.integration.simulation import B, Simulation
from tests.integration.test_sharing import OPTIONS, contexts, document, kept

STRIDE = {**OPTIONS, "context_stride": 256}
ECHO = {**STRIDE, "policy": "echo"}


@pytest.fixture(autouse=True)
def _checked(monkeypatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")


def simulation(options: dict, blocks: int = 400, **more) -> Simulation:
    more = {"max_model_len": 2048, "max_num_batched_tokens": 600, **more}
    return Simulation(blocks, options, **more)


def talk(sim: Simulation, turns: int, first: int, question: int, answer: int, seed=1, **asked):
    """A conversation: of each turn its prompt, its tokens when it ends, and what it found."""
    history, found = document(seed, first), []
    for turn in range(turns):
        before = sim.num_cached_tokens
        name = f"{seed} turn {turn}"
        sim.add(name, history, answer, **asked)
        sim.run()
        found.append((len(history), len(history) + answer, sim.num_cached_tokens - before))
        history = [*history, *sim.outputs[name], *document(100 * seed + turn, question)]
    return found, history


def full_blocks(end: int, prompt: int, stride: int) -> int:
    """What a turn finds of one that ended with ``end`` tokens: the last token was not computed; and
    what the next mark observes must be."""
    known, mark = (end - 1) // B * B, -(-end // stride) * stride
    return min(known, (mark - 4) // B * B) if mark - 4 < prompt else known


@pytest.mark.parametrize("options", [STRIDE, ECHO], ids=["kv_compress", "echo"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_turn_finds_all_that_was_computed_before(asynchronous: bool, options: dict) -> None:
    """Read or decoded, like in vLLM's own prefix cache; also where answers pass several marks."""
    sim = simulation(options, asynchronous=asynchronous)
    found, _ = talk(sim, 3, 300, 70, 290)
    for (_, end, _), (prompt, _, cached) in pairwise(found):
        known = full_blocks(end, prompt, 256)
        assert known - (B if asynchronous else 0) <= cached <= known
    assert [context.num_tokens for context in contexts(sim)] == list(range(256, 1281, 256))
    assert sim.num_compressions == 5, "nobody packs what is held"
    shared = [report.shared for report in sim.reports]
    assert sum(report.hits for report in shared) == 2
    assert sum(report.tokens for report in shared) == sum(cached for *_, cached in found)
    assert sim.pool.get_num_free_blocks() == 399


@pytest.mark.parametrize(
    "options",
    [ECHO, {**ECHO, "page_dtype": "int4"}, {**ECHO, "context_stride": 512}],
    ids=["auto", "int4", "segments"],
)
def test_what_is_decoded_is_packed_as_if_it_had_been_read(options: dict) -> None:
    """By echo scores, of segments that begin in the prompt and end in the answer."""
    sim = simulation(options)
    found, history = talk(sim, 3, 300, 70, 290)
    stride = options["context_stride"]
    marks = list(range(stride, 1281, stride))
    assert [context.num_tokens for context in contexts(sim)] == marks
    assert len({context.owner for context in contexts(sim)}) > 1
    for (_, end, _), (prompt, _, cached) in pairwise(found):
        assert cached == full_blocks(end, prompt, stride)
    before = kept(sim)
    assert sim.scheduler.reset_prefix_cache()
    sim.add("anew", history[:1300], 1)
    sim.run()
    assert sim.num_cached_tokens == sum(cached for *_, cached in found)
    assert kept(sim) == before


def computed_anew(sim: Simulation, *prompts: list[int]) -> tuple[dict, dict]:
    """What is held, packed, and what some prompts pack if nothing is held."""
    before = kept(sim)
    assert sim.scheduler.reset_prefix_cache()
    for index, prompt in enumerate(prompts):
        sim.add(f"anew {index}", prompt, 1)
        sim.run()
    return before, kept(sim)


def as_if_computed(sim: Simulation, *prompts: list[int]) -> None:
    """All that is held is what some prompts pack if nothing is held."""
    before, after = computed_anew(sim, *prompts)
    assert before and {key: after[key] for key in before} == before


@pytest.mark.parametrize("at_once", [True, False])
def test_two_go_on_in_one_segment(at_once: bool) -> None:
    """Its first keys have the scores of whoever completes it, so only one at a time may."""
    sim = simulation(ECHO)
    _, history = talk(sim, 1, 300, 30, 40)
    history = history[:-30]
    prompts = [[*history, *document(20 + index, 30)] for index in range(2)]
    before = sim.num_cached_tokens
    for index, prompt in enumerate(prompts):
        sim.add(f"r{index}", prompt, 200)
        if not at_once:
            sim.run()
    sim.run()
    assert sim.num_cached_tokens - before == 336 + (256 if at_once else 336)
    as_if_computed(sim, *([*prompts[i], *sim.outputs[f"r{i}"]][:520] for i in range(2)))


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_segment_is_no_longer_whole_where_another_goes_on(meanwhile: bool) -> None:
    """The first has completed it, the second branches off in its middle, and the first comes back:
    then, or before the second has completed its own."""
    sim = simulation({**ECHO, "context_stride": 768})
    _, history = talk(sim, 1, 300, 30, 40)
    one, two = ([*history[:-30], *document(20 + index, 30)] for index in range(2))
    sim.add("one", one, 230)
    sim.run()
    before = sim.num_cached_tokens
    sim.add("two", two, 450)
    while len(sim.outputs["two"]) < (50 if meanwhile else 450):
        sim.step()
    one = [*one, *sim.outputs["one"], *document(30, 30)]
    sim.add("one again", one, 200)
    sim.run()
    # Blocks [256, 336) are those of the second, or have its scores.
    assert sim.num_cached_tokens - before == 336 + (256 if meanwhile else 336)
    ends = [[*one, *sim.outputs["one again"]], [*two, *sim.outputs["two"]]]
    assert {context.owner for context in contexts(sim)} == {"one again", "two"}
    as_if_computed(sim, *(tokens[:800] for tokens in ends))


@pytest.mark.parametrize("slots, steps", [(None, 1), (1, 2)])
@pytest.mark.parametrize("message", [170, 500])
def test_a_message_that_passes_the_end_of_a_segment(message: int, slots, steps: int) -> None:
    """One step reads it, if there is a slot for the segment behind, too. What one pass of the whole
    conversation keeps is the same."""
    sim = simulation({**ECHO, "context_stride": 1024}, max_num_batched_tokens=1100)
    _, history = talk(sim, 1, 300, message, 60)
    observers = sim.scheduler.kv_compress_planner.observers
    assert observers.used == 0 and len(observers._slots) == observers.count > 1
    hidden = [observers._slots.take() for _ in range(observers.count - (slots or observers.count))]
    sim.add("again", history, 1100 - len(history))
    count = 0
    while not sim.outputs["again"]:
        sim.step()
        count += 1
    assert sim.num_cached_tokens == (360 - 1) // B * B and count == steps
    for slot in hidden:
        observers._slots.give(slot)
    sim.run()
    assert observers.used == 0 and len(observers._slots) == observers.count
    assert [context.owner for context in contexts(sim)] == ["again"]
    as_if_computed(sim, [*history, *sim.outputs["again"]][:1050])


def test_a_message_that_passes_the_end_of_a_segment_and_is_longer_than_a_step() -> None:
    """The step that completes the segment ends before the one in which the message does."""
    sim = simulation({**ECHO, "context_stride": 2048})
    _, history = talk(sim, 1, 300, 900, 60)
    sim.add("again", history, 5)
    sim.step()
    request = sim.scheduler.requests["again"]
    assert sim.num_cached_tokens == 352 and request.num_computed_tokens == 768
    sim.run()  # the worker checks which queries the segment is scored by
    assert len(sim.outputs["again"]) == 5


def test_messages_of_many_that_pass_the_end_of_a_segment_at_once() -> None:
    """One step reads them all where the slots go round: each takes two until it is over."""
    sim = simulation({**ECHO, "context_stride": 1024}, 900, max_num_batched_tokens=2000)
    observers = sim.scheduler.kv_compress_planner.observers
    users = [talk(sim, 1, 300, 170, 60, seed=seed)[1] for seed in range(observers.count // 2)]
    assert len(users) > 1
    for seed, history in enumerate(users):
        sim.add(f"{seed} again", history, 1100 - len(history))
    sim.step()
    assert [len(sim.outputs[f"{seed} again"]) for seed in range(len(users))] == [1] * len(users)
    sim.run()
    assert observers.used == 0 and len(observers._slots) == observers.count
    as_if_computed(sim, *([*users[i], *sim.outputs[f"{i} again"]][:1050] for i in range(2)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_is_scored_twice(asynchronous: bool) -> None:
    """What a prompt ends with is scored with the answer behind it, while there is a slot; else as
    it is read."""
    sim = simulation(
        {**ECHO, "context_stride": 1024}, max_num_batched_tokens=1100, asynchronous=asynchronous
    )
    scored, stock = [], sim.worker.run

    def run(output, *rest):
        plan = output.kv_compress
        scored.extend((item.first, item.end) for item in [*plan.echoes, *plan.heard])
        stock(output, *rest)

    sim.worker.run = run
    _, history = talk(sim, 1, 600, 200, 60)
    assert scored == [(0, 512)]
    sim.add("again", history, 1100 - len(history))
    sim.run()
    assert sorted(scored) == [(0, 512), (512, 768), (768, 1024)]
    as_if_computed(sim, [*history, *sim.outputs["again"]][:1050])
    scored.clear()
    observers = sim.scheduler.kv_compress_planner.observers
    for _ in range(observers.count):
        observers._slots.take()
    sim.add("without", document(9, 600), 60)
    sim.run()
    assert scored == [(0, 600)]


def test_an_answer_of_one_token_behind_the_end_of_a_segment() -> None:
    """It has ended before the segment could be scored; the next turn does that."""
    sim = simulation({**ECHO, "context_stride": 1024}, max_num_batched_tokens=1100)
    _, history = talk(sim, 1, 300, 170, 60)
    sim.add("short", history, 1)
    sim.run()
    before = sim.num_cached_tokens
    history += [*sim.outputs["short"], *document(40, 20)]
    sim.add("again", history, 1100 - len(history))
    sim.run()
    assert sim.num_cached_tokens - before == 512 - B
    observers = sim.scheduler.kv_compress_planner.observers
    assert observers.used == 0 and len(observers._slots) == observers.count
    as_if_computed(sim, [*history, *sim.outputs["again"]][:1050])


@pytest.mark.parametrize("stride", [256, 1024])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_drafts_leave_the_right_queries(asynchronous: bool, stride: int) -> None:
    """Some are rejected, also in the step in which an answer ends, or passes the end of a segment
    that the turn before began."""
    sim = simulation({**ECHO, "context_stride": stride}, drafts=3, asynchronous=asynchronous)
    found, history = talk(sim, 4, 300, 70, 145)
    for (_, end, _), (prompt, _, cached) in pairwise(found):
        assert cached >= full_blocks(end, prompt, stride) - (B if asynchronous else 0)
    as_if_computed(sim, history[:1100])


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("options", [STRIDE, ECHO], ids=["kv_compress", "echo"])
def test_an_answer_that_was_given_up_is_gone_on_from(
    options: dict, drafts: int, asynchronous: bool
) -> None:
    """Its client left, or vLLM's front end found a stop string; with a step in flight, too."""
    sim = simulation(options, asynchronous=asynchronous, drafts=drafts)
    sim.add("ended", document(1, 300), 200)
    while len(sim.outputs["ended"]) < 110:
        sim.step()
    sim.abort("ended")
    sim.run()
    history = [*document(1, 300), *sim.outputs["ended"]]
    sim.add("next", [*history, *document(2, 40)], 200)
    sim.run()
    assert 0 <= len(history) // B * B - sim.num_cached_tokens <= B
    as_if_computed(sim, [*history, *document(2, 40), *sim.outputs["next"]][:520])


@pytest.mark.parametrize("options", [STRIDE, ECHO], ids=["kv_compress", "echo"])
def test_behind_the_last_mark_turns_find_everything_too(options: dict) -> None:
    """No compression will come that would need scores, unless the pool runs short."""
    sim = simulation({**options, "context_stride": 768}, max_model_len=1500)
    found, history = talk(sim, 5, 700, 40, 60)
    assert [cached for *_, cached in found] == [0, 752, 848, 944, 1056]
    assert [context.num_tokens for context in contexts(sim)] == [768]
    sim.add("pressed", history, 200)
    while len(sim.outputs["pressed"]) < 20:
        sim.step()
    planner = sim.scheduler.kv_compress_planner
    (tracked,) = planner.requests.values()
    planner._course.leave_stride(tracked)
    planner._course.prepare(tracked, len(history) + 40)
    sim.run()  # what it found without scores is kept
    assert len(sim.outputs["pressed"]) == 200 and sim.num_compressions > 1


def test_who_loses_the_slot_as_it_starts_loads_nothing(monkeypatch) -> None:
    """It only listens; behind it starts one, in the same step, that a compression needs one for."""
    sim = simulation({**ECHO, "context_stride": 512}, max_num_seqs=8)
    short = document(1, 100)
    sim.add("first", short, 30)
    sim.run()
    observers = sim.scheduler.kv_compress_planner.observers
    for index in range(observers.count - 1):
        sim.add(f"held {index}", document(10 + index, 300), 400)
    while observers.used < observers.count - 1:
        sim.step()
    next_turn = [*short, *sim.outputs["first"], *document(2, 10)]
    sim.add("listens", next_turn, 5)
    sim.add("observed", document(3, 520), 50)
    monkeypatch.setattr(sim.worker, "_load", lambda item, tokens: pytest.fail(f"{item}"))
    sim.step()
    assert {"listens", "observed"} <= {r.request_id for r in sim.scheduler.running}
    assert sim.scheduler.kv_compress_planner.requests["listens"].listen_slot is None
    sim.run()


def test_queries_that_are_gone_are_computed_anew() -> None:
    """Whatever else of the conversation is still held."""
    sim = simulation(ECHO)
    _, history = talk(sim, 1, 300, 30, 40)
    saved = list(sim.worker.saved)
    assert len(saved) == 5, "of tokens 256 to 336"
    assert sim.pool._maybe_evict_cached_block(sim.pool.blocks[saved[2]])
    before = sim.num_cached_tokens
    sim.add("next", history, 200)
    sim.run()
    assert sim.num_cached_tokens - before == 256 + 2 * B
    as_if_computed(sim, [*history, *sim.outputs["next"]][:520])


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_not_heard_is_computed_anew_only_once(monkeypatch, packed: bool) -> None:
    """Its blocks have no scores, and are forgotten for those that do, of the same tokens."""
    sim = simulation({**ECHO, "context_stride": 256 if packed else 2048}, blocks=600)
    observers = sim.scheduler.kv_compress_planner.observers
    history = document(1, 240)
    if packed:
        sim.add("packs", document(1, 260), 1)
        sim.run()
        history = document(1, 262)
    with monkeypatch.context() as patch:
        patch.setattr(observers, "_listens", False)
        patch.setattr(observers, "_whole", False)
        sim.add("unheard", history, 230)
        sim.run()
    history = [*history, *sim.outputs["unheard"]]
    before = sim.num_cached_tokens
    for turn in range(3):
        sim.add(f"turn {turn}", [*history, *document(7, 5)], 1)
        sim.run()
    found = sim.num_cached_tokens - before
    whole = 256 if packed else 0
    assert found == whole + 2 * ((len(history) + 4) // B * B)


def test_who_loses_its_slot_has_scored_what_it_heard(monkeypatch) -> None:
    """The prompt's end was left for later. Two that must be observed take both slots."""
    monkeypatch.setattr("kvcompress_vllm.scheduling.slots.FEWEST_OBSERVE_SLOTS", 2)
    monkeypatch.setattr("kvcompress_vllm.scheduling.slots.LISTENING_SHARE", 10**9)
    monkeypatch.setattr("kvcompress_vllm.scheduling.slots.CONVERSING", 0)
    sim = simulation({**ECHO, "context_stride": 1024}, 900, max_num_batched_tokens=4000)
    sim.add("loses", document(1, 700), 420)
    sim.step()
    sim.step()
    tracked = sim.scheduler.kv_compress_planner.requests["loses"]
    assert tracked.listen_slot is not None and tracked.unscored.before(700) == ((512, 700),)
    for index in range(2):
        sim.add(f"needs {index}", document(5 + index, 1030), 3)
    sim.step()
    assert tracked.listen_slot is None and tracked.unscored.before(701) == ()
    while not tracked.kept:
        sim.step()
    assert tracked.unheard == () and tracked.kept == 1024 // B // 8
    sim.run()


@pytest.mark.parametrize("room_at", [910, 790])
def test_nobody_listens_while_a_compression_in_its_prompt_waits(monkeypatch, room_at: int) -> None:
    """Nothing is observed behind it: what is read then is scored as it is read."""
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "0")  # blocks are taken that nobody owns
    options = {**ECHO, "ratio": 2, "context_stride": 512, "on_pressure": False}
    sim = simulation(options, max_num_batched_tokens=40)
    sim.add("late", document(1, 900), 80)
    request, taken = sim.scheduler.requests["late"], []
    while len(sim.outputs["late"]) < 3:
        if 472 <= request.num_computed_tokens < room_at:
            sim.pool.free_blocks(taken)
            taken = sim.pool.get_new_blocks(sim.pool.get_num_free_blocks() - 4)
        elif taken:
            sim.pool.free_blocks(reversed(taken))
            taken = []
        sim.step()
    tracked = sim.scheduler.kv_compress_planner.requests["late"]
    assert tracked.unscored.before(900) == ()
    sim.pool.free_blocks(reversed(taken))
    sim.run()


def test_users_of_one_context_that_pass_a_mark_need_copies() -> None:
    """Of which the forecast knows: each is packed where its stride says, and shared."""
    options = {**OPTIONS, "ratio": 2, "context_stride": 512, "on_pressure": False}
    sim = simulation(options, 480, max_num_seqs=16)
    text = document(1, 1030)
    sim.add("first", text, 1)
    sim.run()
    for _ in range(40):
        sim.scheduler._admission._output_length.finished(70)
    for index in range(10):
        sim.add(f"user {index}", [*text, *document(50 + index, 460)], 70)
    waits = 0
    while sim.live:
        sim.step()
        waits += sim.scheduler._steps.waits
    assert not waits and not sim.num_preemptions
    assert [context.num_tokens for context in contexts(sim)].count(1536) == 8


def test_who_is_not_heard_packs_for_itself(monkeypatch) -> None:
    """With fewer observation slots than requests, what others find still is what they would have
    computed; and who was not heard is compressed as without a stride."""
    monkeypatch.setattr("kvcompress_vllm.scheduling.slots.FEWEST_OBSERVE_SLOTS", 2)
    monkeypatch.setattr("kvcompress_vllm.scheduling.slots.LISTENING_SHARE", 10**9)
    sim = simulation(ECHO)
    prompts = {f"r{index}": document(index, 300 + 9 * index) for index in range(5)}
    for name, prompt in prompts.items():
        sim.add(name, prompt, 300)
        for _ in range(4):
            sim.step()
    sim.run()
    assert all(len(tokens) == 300 for tokens in sim.outputs.values())
    before = kept(sim)
    at_512 = [context for context in contexts(sim) if context.num_tokens == 512]
    assert 1 <= len(at_512) < 5
    assert sim.scheduler.reset_prefix_cache()
    for name, prompt in prompts.items():
        sim.add(f"{name} again", [*prompt, *sim.outputs[name]], 1)
        sim.run()
    after = kept(sim)
    assert all(after[key] == before[key] for key in before)


@pytest.mark.parametrize("prompt", [300, 240])
@pytest.mark.parametrize("options", [STRIDE, ECHO], ids=["kv_compress", "echo"])
def test_a_preempted_answer_goes_on_from_its_latest_mark(options: dict, prompt: int) -> None:
    """Also where its prompt has none."""
    sim = simulation(options)
    sim.add("long", document(1, prompt), 800 - prompt)
    while len(sim.outputs["long"]) < 630 - prompt:
        sim.step()
    cached, compressions = sim.num_cached_tokens, sim.num_compressions
    sim.scheduler._preempt_request(sim.scheduler.running.pop(), 0.0)
    sim.step()
    assert sim.scheduler.kv_compress_planner.requests["long"].context.num_tokens == 512
    sim.run()
    assert len(sim.outputs["long"]) == 800 - prompt and sim.num_cached_tokens == cached
    assert sim.num_compressions == compressions + 1
    assert [context.num_tokens for context in contexts(sim)] == [256, 512, 768]


def test_a_prompt_that_ends_just_before_a_mark_is_observed_from_there() -> None:
    sim = simulation(STRIDE)
    for length in (509, 511, 512, 513):
        sim.add(f"{length}", document(length, length), 20)
        sim.run()
    assert sorted(context.num_tokens for context in contexts(sim)) == [256] * 4 + [512] * 4


def test_what_was_computed_behind_a_failed_policy_is_not_found(monkeypatch) -> None:
    sim = simulation(STRIDE)
    sim.add("first", document(1, 300), 100)
    while not sim.outputs["first"]:
        sim.step()
    (context,) = contexts(sim)
    failed = Report("first", context.slot, 256, "prefill", [], 0.0, 0.0, LossCurve([1], [0.0]), "x")
    for _ in range(40):
        sim.step()
    with monkeypatch.context() as patch:
        place = "kvcompress_vllm.integration.engine.scheduler.reports_of"
        patch.setattr(place, lambda output: [failed])
        sim.step()
    sim.run()
    assert sim.failed == {"first"} and contexts(sim) == []
    sim.add("again", document(1, 262), 1)  # packs the same context
    sim.run()
    before = sim.num_cached_tokens
    sim.add("later", [*document(1, 300), *sim.outputs["first"], 5], 5)
    sim.run()
    assert sim.num_cached_tokens - before == 256


def test_without_decoding_only_prompts_are_packed() -> None:
    """And what an answer adds behind the next mark is nobody's."""
    sim = simulation({**STRIDE, "decode": False})
    found, _ = talk(sim, 3, 300, 70, 290)
    # Turns of 300, 660 and 1020 tokens, answers to 590, 950 and 1310.
    assert [context.num_tokens for context in contexts(sim)] == [256, 512, 768]
    assert [cached for *_, cached in found] == [0, 496, 752]


@pytest.mark.parametrize("options", [STRIDE, ECHO], ids=["kv_compress", "echo"])
def test_the_first_mark_may_lie_in_an_answer(options: dict) -> None:
    sim = simulation(options)
    sim.add("short", document(1, 240), 30)
    sim.run()
    (context,) = contexts(sim)
    assert (context.num_tokens, context.owner) == (256, "short")


def test_two_who_answer_alike_at_once_do_not_mind() -> None:
    sim = simulation(STRIDE)
    for index in range(3):
        sim.add(f"r{index}", document(1, 300), 300)
    sim.run()
    assert sorted(context.num_tokens for context in contexts(sim)) == [256, 512]
    assert sim.outputs["r0"] == sim.outputs["r1"] == sim.outputs["r2"]
    assert sim.pool.get_num_free_blocks() == 399


def test_a_late_compression_is_not_shared(monkeypatch) -> None:
    """The pool has no room at a mark: what is read meanwhile attends to what is dropped later."""
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "0")  # the test holds blocks, too
    sim = simulation({**STRIDE, "on_pressure": False}, blocks=60)
    sim.add("one", document(1, 300), 260)
    while len(sim.outputs["one"]) < 200:
        sim.step()
    pool = sim.pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 2)
    while len(sim.outputs["one"]) < 218:
        sim.step()
    pool.free_blocks(reversed(taken))
    sim.run()
    assert [context.num_tokens for context in contexts(sim)] == [256]
    assert sim.pool.get_num_free_blocks() == 59


@pytest.mark.parametrize("seed", [0, 1, 2, 14])
def test_conversations_at_random(seed: int) -> None:
    """Several at once, in a pool and with slots that may run short; some turns are given up. Steps
    go on behind segments where they can, and what is held is what a miss packs."""
    choice = Random(seed)
    sim = simulation(
        {**ECHO, "context_stride": 1024},
        choice.choice([260, 500]),
        max_num_batched_tokens=choice.choice([320, 900]),
        max_num_seqs=choice.choice([4, 16]),
        asynchronous=choice.random() < 0.5,
    )
    observers, passed = sim.scheduler.kv_compress_planner.observers, []
    stock = observers.passes
    observers.passes = lambda *args, **kwargs: passed.append(stock(*args, **kwargs)) or passed[-1]
    histories = [document(seed * 10 + index, choice.randrange(100, 500)) for index in range(5)]
    for turn in range(6):
        names = {}
        for index, history in enumerate(histories):
            answer = choice.randrange(1, 120)
            if len(history) + answer + 20 > 1500 or choice.random() < 0.2:
                continue
            names[index] = f"{index} turn {turn}"
            sim.add(names[index], history, answer)
        for _ in range(choice.randrange(40)):
            sim.step()
        for index, name in list(names.items()):
            if name in sim.live and choice.random() < 0.15:
                sim.abort(name)
                del names[index]
        sim.run()
        for index, name in names.items():
            message = document(1000 * seed + 10 * turn + index, choice.randrange(5, 300))
            histories[index] = [*histories[index], *sim.outputs[name], *message][:1400]
    assert any(passed)
    assert observers.used == 0 and len(observers._slots) == observers.count
    long = [history[:1100] for history in histories if len(history) > 1040]
    before, after = computed_anew(sim, *long)
    both = before.keys() & after.keys()
    assert both and all(after[key] == before[key] for key in both)
