# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records.budget import Wish
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.records.report import Report
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.sizes import NEVER
from kvcompress_vllm.scheduling.slots import num_observe_slots

B = 16
PAGE_DTYPES = [each.label for each in PageFormat]


def planner(observe_slots: int = 2, **options: object) -> CompressionPlanner:
    config = KVCompressConfig.from_dict({"ratio": 4, "window": 8, **options})
    return CompressionPlanner(
        config, B, state_slots=4, observe_slots=observe_slots, max_tokens=100_000
    )


def has_slots(p: CompressionPlanner, num_tokens: int) -> bool:
    return p.newcomers.have_slots(p.newcomers.starting("next", num_tokens))


def test_life_of_a_request() -> None:
    p = planner(decode=False)
    p.admit("a", 1000)
    assert not p.observe(p.requests["a"], 0, 512)  # does not reach the window
    (first,) = p.observe(p.requests["a"], 512, 485)  # positions 512..996: the window is from 992
    assert (first.first_token, first.observe_from) == (512, 992)
    (last,) = p.observe(p.requests["a"], 997, 3)
    assert last.observe_slot == first.observe_slot
    assert p.due({"a": 999}) == [] and list(p.accumulate({"a": 999})) == []
    assert [t.request_id for t in p.due({"a": 1000})] == ["a"]
    assert list(p.packed()) == []
    p.compressed("a")
    assert p.due({"a": 1001}) == [] and [t.request_id for t in p.packed()] == ["a"]
    assert not p.observe(p.requests["a"], 1000, 1)
    assert p.take_released() == []
    slot = p.requests["a"].state_slot
    p.release("a")
    assert p.take_released() == [slot] and p.take_released() == []


def decode(p: CompressionPlanner, name: str, num_tokens: int, until: int) -> list[tuple[int, int]]:
    """Generate one token per step; (tokens, blocks held before) of every compression."""
    compressions = []
    while num_tokens < until:
        p.generations.watch({name: num_tokens})
        for tracked in p.due({name: num_tokens}):
            blocks = num_tokens // B - tracked.covered + tracked.kept
            compressions.append((num_tokens, blocks))
            p.compressed(name)
        tracked = p.requests[name]
        seen = p.observe(tracked, num_tokens, 1)
        window = range(tracked.due_at - p.config.window, tracked.due_at)
        assert len(seen) == (num_tokens in window)
        num_tokens += 1
    return compressions


def test_a_generation_is_compressed_whenever_it_has_outgrown_its_budget() -> None:
    p = planner(budget_tokens=128, ratio=None, interval=4)
    p.admit("a", 130)  # 8 blocks are the budget: the prompt is left alone
    assert p.requests["a"].observe_slot is None
    compressions = decode(p, "a", 130, 8000)
    # Blocks are counted whole: 8 + 4 of them, every 4 blocks of 16 tokens.
    assert compressions == [(n, 12) for n in range(12 * B, 8000, 4 * B)]


def test_a_ratio_holds_for_prompt_and_generation_together() -> None:
    p = planner(ratio=4, interval=8)
    p.admit("a", 1600)
    p.compressed("a")
    assert (p.requests["a"].covered, p.requests["a"].kept) == (100, 25)
    for num_tokens, blocks in decode(p, "a", 1600, 8000):
        assert blocks - p.sizes().packed(num_tokens)[1] == 8


def test_a_short_generation_is_not_squeezed_below_the_least_budget() -> None:
    p = planner(ratio=4, interval=8, min_budget_tokens=256)
    p.admit("a", 100)
    held = decode(p, "a", 100, 2000)
    assert held[0] == (24 * B, 16 + 8) and held[1] == (32 * B, 16 + 8)
    # As without it, once a quarter is more.
    assert all(blocks == max(16, -(-n // B // 4)) + 8 for n, blocks in held)
    assert max(blocks for _, blocks in held) > 16 + 8


def test_decode_false_leaves_generations_alone() -> None:
    p = planner(decode=False)
    p.admit("short", 100)
    assert p.requests == {}
    p.admit("a", 1000)
    p.compressed("a")
    assert p.requests["a"].due_at == NEVER
    p.generations.watch({"a": 90_000})
    assert p.requests["a"].observe_slot is None


@pytest.mark.parametrize("decode", [True, False])
def test_a_prefill_is_interrupted_whenever_it_has_reached_its_peak(decode: bool) -> None:
    """However far apart the compressions of a generation are, and if there are none."""
    p = planner(prefill_peak_tokens=640, interval=40, decode=decode)
    p.admit("a", 1500)
    due = []
    while p.requests["a"].in_prefill:
        due.append(p.requests["a"].due_at)
        p.compressed("a", due[-1])
    # Half of the peak is kept each time, and the other half read.
    assert due == [640, 960, 1280]


def pressed(p: CompressionPlanner, free: int, **lengths: int) -> list[str]:
    """Requests that begin to be observed when so many blocks are free."""
    before = {n for n, t in p.requests.items() if t.observe_slot is not None}
    p.generations.press(lengths, free)
    return sorted({n for n, t in p.requests.items() if t.observe_slot is not None} - before)


def grown(observe_slots: int, **options: object) -> tuple[CompressionPlanner, dict[str, int]]:
    """Three packed requests that have generated 100, 60 and 10 tokens since: 6, 3 and 0 blocks."""
    p = planner(observe_slots, ratio=None, budget_tokens=128, interval=20, **options)
    lengths = {"a": 1700, "b": 1660, "c": 1610}
    for name in lengths:
        p.admit(name, 1600)
        p.compressed(name)
    return p, lengths


def test_pressure_takes_first_what_gives_back_most_where_nothing_else_is_known() -> None:
    p, lengths = grown(3)
    assert pressed(p, 100, **lengths) == []
    # Until 9 tokens on, "a" takes no block (1709 of 1712), "b" and "c" one each; a copy takes 8.
    assert pressed(p, 2 + 8, **lengths) == []
    assert pressed(p, 2 + 8, **lengths | {"a": 1697}) == [], "it has just begun a block"
    assert pressed(p, 2 + 8 - 1, **lengths) == ["a"]
    a = p.requests["a"]
    assert a.due_at == 1708 and p.due({"a": 1708}) == [a]
    # What is under way counts: "a" will give 6 blocks back.
    assert pressed(p, 2 + 8 - 6, **lengths) == []
    assert pressed(p, 2 + 8 - 7, **lengths) == ["b"]
    assert pressed(p, 0, **lengths) == []  # nothing worth it is left in "c"
    p.compressed("a")
    assert (a.covered, a.kept) == (106, 8)


def report(p: CompressionPlanner, name: str, lost: list[float]) -> None:
    """The curve of a request's latest compression arrives: ``lost`` at 2, 4, 8 and 100 blocks."""
    t = p.requests[name]
    curve = LossCurve([2, 4, 8, 100], lost)
    assert p.feedback.reported(
        Report(name, t.state_slot, t.covered * B, "prefill", [], lost[2], 1.0, curve)
    )


def test_pressure_takes_first_what_loses_least_per_block() -> None:
    """ "a" can give back 6 blocks and "b" 3, but those of "a" are dear."""
    p, lengths = grown(3)
    report(p, "a", [0.9, 0.6, 0.1, 0.0])
    report(p, "b", [0.9, 0.2, 0.1, 0.0])
    assert pressed(p, 9, **lengths) == ["b"]
    assert pressed(p, 9 - 4, **lengths) == ["a"]
    # As many blocks of both: of 14 held blocks 8 stay, as of 8 kept ones 4.57 would.
    p, lengths = grown(3)
    lengths["b"] = lengths["a"]
    report(p, "a", [0.9, 0.2, 0.1, 0.0])
    report(p, "b", [0.9, 0.3, 0.1, 0.0])
    assert pressed(p, 8, **lengths) == ["a"]
    # What is lost already does not count.
    p, lengths = grown(3)
    lengths["b"] = lengths["a"]
    report(p, "a", [0.9, 0.51, 0.5, 0.0])
    report(p, "b", [0.9, 0.3, 0.1, 0.0])
    assert pressed(p, 8, **lengths) == ["a"]


def test_pressure_does_not_spend_a_slot_on_a_small_gain() -> None:
    """ "b" loses less per block but gives back 3 blocks, "a" 6."""
    p, lengths = grown(3)
    lengths["b"] = 1640
    report(p, "a", [0.9, 0.6, 0.1, 0.0])
    report(p, "b", [0.9, 0.11, 0.1, 0.0])
    assert pressed(p, 0, **lengths) == ["a", "b"]
    p, _ = grown(1)
    report(p, "a", [0.9, 0.6, 0.1, 0.0])
    report(p, "b", [0.9, 0.11, 0.1, 0.0])
    assert pressed(p, 0, **lengths) == ["a"]


def test_pressure_leaves_alone_what_gives_back_a_single_block() -> None:
    p, _ = grown(1)
    assert pressed(p, 0, b=1631 - 8) == [] and pressed(p, 0, b=1632 - 8) == ["b"]


def test_pressure_beyond_the_budget_by_loss() -> None:
    p, lengths = grown(1, max_ratio=40)
    for name, at_4 in [("a", 0.5), ("b", 0.3), ("c", 0.2)]:
        lengths[name] = 1610
        report(p, name, [0.9, at_4, 0.1, 0.0])
    assert pressed(p, 0, **lengths) == ["c"]
    p.compressed("c")
    assert p.requests["c"].kept == 3


def test_pressure_spares_what_nothing_is_known_of_but_not_what_lost_nothing() -> None:
    p, lengths = grown(3)
    report(p, "b", [0.9, 0.6, 0.1, 0.0])
    assert p.requests["a"].curve is None  # its report is on its way
    assert pressed(p, 9, **lengths) == ["b"]
    p, lengths = grown(3)
    p.release("b")
    p.admit("b", 130)  # too short for a compression so far, and grown since
    report(p, "a", [0.9, 0.11, 0.1, 0.0])
    assert pressed(p, 8, a=1700, b=200) == ["b"]


def test_a_curve_holds_until_the_next_compression() -> None:
    p, lengths = grown(3)
    report(p, "a", [0.9, 0.6, 0.1, 0.0])
    assert pressed(p, 0, a=lengths["a"]) == ["a"]
    p.compressed("a")
    assert p.requests["a"].curve is None


def test_far_from_short_nothing_is_looked_at() -> None:
    p, lengths = grown(1)
    p.requests["a"].sizes = None  # type: ignore[assignment]
    most = 3 + (100_000 + 8) // B
    assert pressed(p, most, **lengths) == []
    with pytest.raises(AttributeError):
        pressed(p, most - 1, **lengths)


@given(st.lists(st.integers(1, 5000), max_size=4), st.integers(0, 7000), st.integers(1, 40))
def test_looking_only_when_it_may_be_short_changes_nothing(
    lengths: list[int], free: int, window: int
) -> None:
    def run(max_tokens: int) -> list[str]:
        config = KVCompressConfig(ratio=2, window=window, interval=20)
        p = CompressionPlanner(config, B, state_slots=4, observe_slots=4, max_tokens=5200)
        for index, length in enumerate(lengths):
            p.admit(str(index), length)
            if p.requests.get(str(index)) and p.requests[str(index)].observe_slot is not None:
                p.compressed(str(index))
        p.limits = p.limits._replace(max_tokens=max_tokens)
        computed = {str(i): length + 100 for i, length in enumerate(lengths)}
        p.generations.press(computed, free)
        return sorted(name for name, t in p.requests.items() if t.observe_slot is not None)

    assert run(5200) == run(10**9)


def test_pressure_goes_beyond_the_budget_only_where_it_may() -> None:
    p, lengths = grown(1)
    assert pressed(p, 0, c=lengths["c"]) == []
    p, lengths = grown(1, max_ratio=20)
    assert pressed(p, 0, c=lengths["c"]) == ["c"]
    p.compressed("c")
    c = p.requests["c"]
    assert (c.covered, c.kept) == (101, 6)  # 101 / 20 blocks, not the 8 of the budget
    assert c.ratio is None and c.due_at == p.sizes().outgrown_at(
        Packing(101, 6)
    )  # the usual budget again


def test_pressure_never_takes_more_slots_than_there_are() -> None:
    p, lengths = grown(1)
    assert pressed(p, -100, **lengths) == ["a"]


def test_ratio_1_tracks_nothing() -> None:
    p = planner(ratio=1)
    p.admit("a", 1000)
    assert p.requests == {} and has_slots(p, 10**6)


def test_without_a_free_slot_a_decode_compression_comes_later_with_a_whole_window() -> None:
    p = planner(observe_slots=1, budget_tokens=128, ratio=None, interval=4)
    p.admit("short", 130)
    p.admit("long", 1000)  # takes the slot
    due = p.requests["short"].due_at
    p.generations.watch({"short": due + 3})
    assert p.requests["short"].observe_slot is None and p.due({"short": due + 3}) == []
    p.compressed("long")
    p.generations.watch({"short": due + 5})
    assert p.requests["short"].observe_slot is not None
    assert p.requests["short"].due_at == due + 5 + 8
    assert p.due({"short": due + 12}) == [] and p.due({"short": due + 13})


def test_a_scarce_slot_goes_to_who_is_overdue_longest() -> None:
    p = planner(observe_slots=1, budget_tokens=128, ratio=None, interval=4)
    p.admit("first", 130)
    p.admit("second", 130)
    due = p.requests["first"].due_at
    p.generations.watch({"first": due - 8, "second": due + 20})
    assert p.requests["first"].observe_slot is None
    assert p.requests["second"].observe_slot is not None


def test_generations_outgrow_their_budgets_further_where_slots_do_not_go_round() -> None:
    p = planner(observe_slots=2, interval=4)
    # 16 requests take each of 2 slots 8 times for 8 tokens: 64 tokens, 4 blocks.
    assert [p.newcomers.interval(count) for count in (1, 16, 17, 32, 33)] == [4, 4, 5, 8, 9]


@given(
    ratio=st.floats(1.01, 100),
    interval=st.integers(1, 20),
    prompt=st.integers(0, 3000),
    min_prompt_tokens=st.integers(1, 400),
    min_budget_tokens=st.sampled_from([0, 100, 1000]),
    page_dtype=st.sampled_from(PAGE_DTYPES),
    in_tokens=st.booleans(),
)
def test_outgrown_at_is_the_first_such_place(
    ratio: float,
    interval: int,
    prompt: int,
    min_prompt_tokens: int,
    min_budget_tokens: int,
    page_dtype: str,
    in_tokens: bool,
) -> None:
    p = planner(
        interval=interval,
        min_prompt_tokens=min_prompt_tokens,
        min_budget_tokens=min_budget_tokens,
        page_dtype=page_dtype,
        ratio=None if in_tokens else ratio,
        budget_tokens=int(2000 / ratio) if in_tokens else None,
    )
    sizes, m = p.sizes(), PageFormat.of(page_dtype).blocks_per_page
    covered, kept = sizes.packed(prompt)
    covered, kept = (covered, kept) if kept < covered else (0, 0)

    def excess(full: int) -> int:
        """Of whole packed pages, over what the budget allows: not over what all keys take."""
        return kept + full - covered - sizes.budget.allowed_blocks(full * B, B)

    at = sizes.outgrown_at(Packing(covered, kept))
    if at != NEVER:
        assert at % (B * m) == 0 and excess(at // B) >= interval
        after = sizes.packed(at)
        assert Packing(covered, kept).gives_back(after) >= interval
    last = p.limits.max_tokens // B
    first = next((f for f in range(covered, last, m) if excess(f) >= interval), None)
    assert at == (NEVER if first is None else first * B)


def test_admission_waits_for_an_observation_slot_but_never_for_short_prompts() -> None:
    p = planner(observe_slots=1)
    p.admit("a", 1000)
    assert not has_slots(p, 1000) and has_slots(p, 100)
    p.compressed("a")
    assert has_slots(p, 1000)
    with pytest.raises(RuntimeError, match="without observation"):
        p.compressed("a")


def test_admitting_twice_or_without_slot_is_an_error() -> None:
    p = planner(observe_slots=1)
    p.admit("a", 1000)
    with pytest.raises(RuntimeError, match="tracked=True"):
        p.admit("a", 1000)
    with pytest.raises(RuntimeError, match="0 observation slots"):
        p.admit("b", 1000)


def test_reserve_is_the_largest_packed_copy_that_may_be_needed() -> None:
    p = planner()
    next_one = p.newcomers.starting("next", 1600)
    assert p.newcomers.reserve() == 0 and p.newcomers.reserve(next_one) == 25
    p.admit("a", 3200)
    assert p.newcomers.reserve() == 50 and p.newcomers.reserve(next_one) == 50
    p.compressed("a")
    assert p.newcomers.reserve() == 0


def test_releasing_before_compression_gives_both_slots_back() -> None:
    p = planner(observe_slots=1)
    for name in "abcdefgh":
        p.admit(name, 1000)
        p.release(name)
    assert has_slots(p, 1000)


def test_a_window_longer_than_the_prompt_observes_from_its_start() -> None:
    p = planner(window=512, min_prompt_tokens=1, recent=0, sinks=0)
    p.admit("a", 200)
    (observation,) = p.observe(p.requests["a"], 0, 200)
    assert observation.observe_from == 0


def test_number_of_observation_slots_is_bounded() -> None:
    group = CacheGroup(2, 2, 4, 64, B, 2, 0.125)
    config = KVCompressConfig(policy="kv_compress", window=8)
    assert num_observe_slots(config, 2048, 256, 10**6 // B, group) == 34
    assert num_observe_slots(config, 2048, 16, 10**6 // B, group) == 16
    # A hundredth of the cache: a slot is 8 queries of 4 heads, 16 tokens' worth of K and V.
    assert num_observe_slots(config, 2048, 256, 19_200 // B, group) == 12
    assert num_observe_slots(config, 2048, 256, 100 // B, group) == 4
    # Where what is decoded is scored, a slot holds a whole segment of 16 queries, and there is one
    # for everybody in a twenty-fifth of the cache.
    listening = KVCompressConfig(policy="echo", window=8)
    assert num_observe_slots(listening, 2048, 256, 19_200 // B, group) == 24
    assert num_observe_slots(listening, 2048, 256, 10**6 // B, group) == 256
    # With a stride it holds 256, and up to 16 of them may take twice as much.
    talking = KVCompressConfig(policy="echo", window=8, context_stride=1024)
    for tokens, count in ((19_200, 4), (110_000, 16), (250_000, 19)):
        assert num_observe_slots(talking, 2048, 256, tokens // B, group) == count
    silent = KVCompressConfig(policy="echo", window=8, decode=False)
    assert num_observe_slots(silent, 2048, 256, 19_200 // B, group) == 12


def test_observed_positions_end_where_the_compression_is_due() -> None:
    p = planner()
    p.admit("a", 1000)
    (seen,) = p.observe(p.requests["a"], 990, 20)
    assert list(seen.positions(20, 8)) == list(range(999, 991, -1))


@given(
    context=st.integers(10, 200),
    question=st.integers(1, 1500),
    ratio=st.floats(1.1, 32),
    interval=st.integers(1, 20),
)
def test_beside_its_context_nobody_holds_more_than_without_compression(
    context: int, question: int, ratio: float, interval: int
) -> None:
    """Its blocks may be shared by any number; what comes on top is what counts for each."""
    config = KVCompressConfig(ratio=ratio, interval=interval)
    budget = resolve(config, Wish(context_tokens=context * B + 5))
    p = CompressionPlanner(config, B, 4, 4, 100_000)
    p.admit("a", end := context * B + question, budget)
    a, now = p.requests["a"], context * B
    if a.due_at != now:
        return  # nothing to gain
    p.compressed("a", now)
    for _ in range(6):
        own = a.packing.held(a.due_at // B) - (a.kept if a.covered == context else 0)
        assert own <= a.due_at // B - context
        if a.due_at > max(end, 20_000):
            break
        p.generations.watch({"a": a.due_at - config.window})
        p.compressed("a", a.due_at)
        assert a.kept <= a.covered - context, "its copy, too"
