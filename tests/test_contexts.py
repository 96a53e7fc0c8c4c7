# SPDX-License-Identifier: Apache-2.0
import pytest

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records.budget import Wish
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.records.report import Scored
from kvcompress_vllm.reporting.shared import SharedRecorder, SharedReport
from kvcompress_vllm.scheduling.contexts import Context, Contexts
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.repeated import STRIDE, Repeated
from kvcompress_vllm.scheduling.slots import num_context_slots


def held(contexts: Contexts, key: bytes, *blocks: int) -> Context:
    context = contexts.new(key, 64, Packing(4, len(blocks)), f"owner of {key!r}", None)
    assert context is not None
    contexts.add(context, blocks)
    return context


def test_a_slot_reaches_the_workers_before_or_behind_the_compressions() -> None:
    contexts = Contexts(range(10, 12))
    one, two = held(contexts, b"one", 1, 2), held(contexts, b"two", 3)
    assert {one.slot, two.slot} == {10, 11} and len(contexts) == 2
    contexts.leave(one, one.owner)
    # A compression of this step packs into a block of it: it must have gone before.
    contexts.reallocated([7, 2])
    assert contexts.take_released() == [one.slot] and contexts.get(b"one") is None
    # While the step is planned its blocks may be read by compressions that are planned already.
    contexts.leave(two, two.owner)
    contexts.reallocated([3])
    assert contexts.new(b"three", 64, Packing(4, 1), "r", None) is not None, "the first slot"
    assert contexts.new(b"four", 64, Packing(4, 1), "r", None) is None, "not before the next step"
    assert contexts.take_dropped() == [two.slot] and contexts.take_released() == []
    contexts.take_dropped()
    assert contexts.new(b"four", 64, Packing(4, 1), "r", None) is not None


def test_a_retired_context_goes_with_its_last_user() -> None:
    contexts = Contexts(range(4))
    dropped: list[Context] = []
    contexts.on_drop = dropped.append
    one = held(contexts, b"one", 1)
    contexts.join(one, "second")
    contexts.retire(one)
    contexts.retire(one)
    assert contexts.get(b"one") is None and contexts.described == [one]
    contexts.leave(one, one.owner)
    contexts.leave(one, "second", compressed=True)  # a copy, which this step makes
    assert dropped == [one] and contexts.described == []
    assert contexts.take_released() == [] and contexts.take_dropped() == [one.slot]


def test_a_retired_context_does_not_take_its_successor_with_it() -> None:
    """Dropped while in use and packed anew by another before its last user goes."""
    contexts = Contexts(range(4))
    old = held(contexts, b"one", 1)
    contexts.retire(old)
    new = held(contexts, b"one", 2)
    assert contexts.described == [new, old]
    contexts.leave(old, old.owner)
    assert contexts.get(b"one") is new and contexts.described == [new]
    contexts.leave(new, new.owner)
    contexts.reallocated([1, 2])
    assert contexts.described == [] and sorted(contexts.take_released()) == [old.slot, new.slot]


def test_the_least_recently_used_makes_room_if_nobody_uses_it() -> None:
    contexts = Contexts(range(2))
    one, two = held(contexts, b"one", 1), held(contexts, b"two", 2)
    assert contexts.new(b"three", 64, Packing(4, 1), "r", None) is None
    contexts.leave(two, two.owner)
    contexts.leave(one, one.owner)
    contexts.join(two, "user")
    contexts.leave(two, "user")
    held(contexts, b"three", 3)
    assert [context.key for context in contexts] == [b"two", b"three"]


def test_what_makes_room_while_a_step_is_planned_does_so_for_the_next() -> None:
    contexts = Contexts(range(1))
    one = held(contexts, b"one", 1)
    contexts.leave(one, one.owner)
    contexts.take_released()
    assert contexts.new(b"two", 64, Packing(4, 1), "r", None) is None
    assert contexts.take_dropped() == [one.slot]
    assert contexts.new(b"two", 64, Packing(4, 1), "r", None) is not None


def test_blocks_in_use_are_never_given_away() -> None:
    contexts = Contexts(range(1))
    held(contexts, b"one", 1, 2)
    with pytest.raises(RuntimeError, match=r"blocks \(1, 2\) .* while 1 requests use them"):
        contexts.reallocated([2])


def test_what_is_not_packed_after_all_is_offered_to_nobody() -> None:
    contexts = Contexts(range(10, 12))
    one, two = held(contexts, b"one", 1), held(contexts, b"two", 2)
    contexts.leave(one, one.owner)  # preempted in the step in which it was to be packed
    contexts.never_packed(one.slot)
    assert list(contexts) == [two] == contexts.described
    assert contexts.take_released() == [one.slot]


def test_one_computes_a_context_at_a_time() -> None:
    contexts = Contexts(range(1))
    contexts.begin(b"key", "first")
    contexts.begin(b"key", "second")
    contexts.stop(b"key", "second")
    assert contexts.computing(b"key") == "first"
    contexts.stop(b"key", "first")
    assert contexts.computing(b"key") is None


@pytest.mark.parametrize("kept", [20, 50])
def test_nobody_waits_for_a_context_that_is_not_packed(kept: int) -> None:
    """A mass that all of it is needed for."""
    config = KVCompressConfig.from_dict({"mass": 0.9, "window": 8})
    p = CompressionPlanner(config, 16, 4, 4, 4096, context_slots=2)
    p.admit("a", 1000, resolve(config, Wish(context_tokens=800)), wanted={800: b"key"})
    assert p.contexts.computing(b"key") == "a"
    (a,) = p.to_score({"a": 800})
    share = [0.5, 0.1, 0.0] if kept == 20 else [1.0, 0.5, 0.0]
    p.feedback.scored(
        Scored("a", a.state_slot, 800, LossCurve([2, kept if kept < 50 else 49, 50], share))
    )
    if kept == 50:
        assert p.contexts.computing(b"key") is None and p.new_context(a) is None
        return
    context = p.new_context(a)
    assert context is not None and context.packing == (50, 20) and context.ratio == 2.5
    p.contexts.add(context, range(1, 21))
    p.compressed("a", 800, context)
    assert p.contexts.computing(b"key") is None and a.packed_slot == context.slot != a.state_slot
    # Whoever takes it goes on as the one who computed it.
    p.admit("b", 1000, resolve(config, Wish(context_tokens=800)), context)
    b = p.requests["b"]
    assert (b.due_at, b.packing, b.sizes) == (a.due_at, a.packing, a.sizes)
    new = Packing(60, 22)
    assert b.packing.gives_back(new) == 8 and b.gives_back(new) == 8 - 20, "a needs its blocks"
    p.release("a")
    assert b.gives_back(new) == 8
    p.release("b")
    assert context.users == set() and p.contexts.get(b"key") is context


def test_others_wait_on_while_a_peak_interrupts_whoever_computes_a_context() -> None:
    config = KVCompressConfig(ratio=8, prefill_peak_tokens=320, window=8)
    p = CompressionPlanner(config, 16, 4, 4, 4096, context_slots=2)
    p.admit("a", 1000, resolve(config, Wish(context_tokens=480)), wanted={480: b"key"})
    (a,) = p.due({"a": 320})
    assert p.new_context(a) is None, "not there yet"
    p.compressed("a", 320)
    assert a.due_at == 480 and p.contexts.computing(b"key") == "a"
    assert p.new_context(a) is not None


def test_a_context_behind_a_late_compression_is_not_offered() -> None:
    """What was read while it waited attended to more than others would."""
    config = KVCompressConfig(ratio=8, prefill_peak_tokens=320, window=8)
    p = CompressionPlanner(config, 16, 4, 4, 4096, context_slots=2)
    p.admit("a", 1000, resolve(config, Wish(context_tokens=480)), wanted={480: b"key"})
    (a,) = p.due({"a": 340})
    p.compressed("a", 340)
    assert p.contexts.computing(b"key") is None
    assert p.due({"a": 480}) == [a] and p.new_context(a) is None


def test_no_mark_lies_behind_the_longest_request() -> None:
    for longest, marks in ((1535, (512, 1024)), (1536, (512, 1024, 1536))):
        p = CompressionPlanner(KVCompressConfig(context_stride=512), 16, 4, 4, longest)
        assert p.sizes().marks == marks


def test_slots_of_contexts() -> None:
    assert [num_context_slots(n) for n in (20, 1600, 100_000)] == [8, 200, 256]


def prefixes(*names: str) -> list[tuple[int, bytes]]:
    return [((i + 1) * STRIDE, name.encode()) for i, name in enumerate(names)]


def test_what_comes_again() -> None:
    repeated = Repeated()
    nothing = lambda length: False  # noqa: E731
    assert repeated.context(prefixes("a", "b", "c"), nothing) is None
    assert repeated.context(prefixes("a", "b", "x"), nothing) == 2 * STRIDE
    assert repeated.context(prefixes("a", "b", "c", "d"), nothing) == 3 * STRIDE
    # Of what is held, what reaches at least half as far.
    assert repeated.context(prefixes("a", "b", "c"), {2 * STRIDE}.__contains__) == 2 * STRIDE
    assert repeated.context(prefixes("a", "b", "c"), {STRIDE}.__contains__) == 3 * STRIDE
    assert repeated.context(prefixes("q"), nothing) is None


def test_what_was_seen_is_forgotten_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompress_vllm.scheduling.repeated.MOST_SEEN", 2)
    repeated = Repeated()
    for name in ("a", "b", "a", "c"):
        repeated.context(prefixes(name), lambda length: False)
    assert list(repeated._seen) == [b"a", b"c"]


def test_the_report_lists_contexts_when_others_are_held() -> None:
    recorder, contexts = SharedRecorder(), Contexts(range(4))
    assert recorder.take([], []) == SharedReport()
    one = held(contexts, b"one", 1, 2)
    contexts.join(one, "second")
    recorder.started(0, True)
    recorder.started(64 + 32, True)
    recorder.waited(3)
    report = recorder.take(list(contexts), contexts.described)
    assert (report.hits, report.misses, report.tokens, report.waits) == (1, 1, 96, 3)
    assert (report.contexts, report.blocks, report.saved_blocks) == (1, 2, 2)
    assert report.held == [(one.name, 64, 2, 4, 1)]
    contexts.join(one, "third")  # soon after: not worth a list
    assert recorder.take(list(contexts), contexts.described).held is None
    assert recorder.take([], []).held == []
