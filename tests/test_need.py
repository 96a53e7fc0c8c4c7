# SPDX-License-Identifier: Apache-2.0
"""What is accepted, how sizes are remembered, and compressions inside a prompt, in the planner."""

from __future__ import annotations

import pytest

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records.budget import KEEP_ALL, Wish
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.records.report import Scored
from kvcompress_vllm.scheduling import budgets as budgets_module
from kvcompress_vllm.scheduling import sizes as sizes_module
from kvcompress_vllm.scheduling.limits import Limits
from kvcompress_vllm.scheduling.need import blocks_needed
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.sizes import NEVER, Sizes

B = 16


def sizes(wish: Wish | None = None, **options: object) -> Sizes:
    config = KVCompressConfig.from_dict({"policy": "kv_compress", **options})
    return Sizes(resolve(config, wish), Limits.of(config, B, 2048))


@pytest.mark.parametrize(
    ("options", "wish", "blocks"),
    [
        ({}, None, 75),  # 32 are kept: 2 * 32 + 8 + 1, and 2
        ({"prefill_peak_tokens": None}, None, 128),
        ({"decode": False}, None, 128),
        ({}, KEEP_ALL, 128),
        ({}, Wish(protect=((0, 400),)), 128),  # leaves less than the peak of 16
        ({}, Wish(protect=((0, 200),)), 75),
        ({"mass": 0.9}, None, 128),
        ({"mass": 0.9, "min_ratio": 4}, None, 75),
        ({"ratio": None, "budget_tokens": 128}, None, 27),  # 8 + 8 + 8 + 1, and 2
        ({"ratio": None, "budget_tokens": 128, "interval": 1}, None, 26),  # 16 + 8, and 2
        ({"ratio": None, "budget_tokens": 128, "min_prompt_tokens": 640}, None, 51),
        ({"ratio": None, "budget_tokens": 128, "recent": 150}, None, 31),  # 10 are kept
        ({"ratio": 1.02}, None, 128),
        # Outgrown by up to a packed page more; what 32 blocks hold in int4 is all there is.
        ({"page_dtype": "fp8"}, None, 76),
        ({"page_dtype": "int4"}, None, 78),
        ({"page_dtype": "int4", "ratio": 16, "interval": 1}, None, 26),  # 16 + 8, and 2
        ({"page_dtype": "int4"}, Wish(protect=((0, 700),)), 78),  # 12 pages of 64 keys
        ({"page_dtype": "int4"}, Wish(protect=((0, 900),)), 128),  # 15 leave no room for one
    ],
)
def test_blocks_with_which_a_request_finishes_alone(
    options: dict, wish: Wish | None, blocks: int
) -> None:
    if "mass" not in options:
        options = {"ratio": 4, **options}
    needed = blocks_needed(sizes(wish, **{"prefill_peak_tokens": 256, **options}), 8, 2048)
    assert needed == blocks


def test_the_arithmetic_of_a_packing() -> None:
    packing = Packing(10, 3)
    assert packing.held(12) == 5 and packing.candidates(14) == 7
    assert packing.gives_back(Packing(14, 4)) == 3 and packing.gains
    assert not Packing(3, 3).gains


def test_sizes_and_budgets_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes_module, "MOST_REMEMBERED", 3)
    monkeypatch.setattr(budgets_module, "MOST_BUDGETS", 3)
    one = sizes(ratio=4)
    assert [one.packed(n * B) for n in range(10, 30)] == [
        Packing(n, -(-n // 4)) for n in range(10, 30)
    ]
    assert len(one._allowed) <= 3
    planner = CompressionPlanner(KVCompressConfig(ratio=4), B, 2, 2, 2048)
    for ratio in range(2, 20):
        budget = resolve(planner.config, Wish(ratio=float(ratio)))
        assert planner.sizes(budget) is planner.sizes(budget)
        assert planner.sizes(budget).packed(1600).kept == -(-100 // ratio)
    assert len(planner._budgets._sizes) <= 3
    assert planner.sizes(resolve(planner.config)) is planner.sizes()


def test_what_a_peak_forces_of_a_mass_keeps_half_of_it() -> None:
    of_mass = sizes(mass=0.9, prefill_peak_tokens=320)
    of_ratio = sizes(ratio=4, prefill_peak_tokens=320)
    assert of_mass.first_due(1600) == of_ratio.first_due(1600) == 320
    assert of_mass.packed_at(320, 1600) == of_ratio.packed_at(320, 1600) == Packing(20, 10)
    # Of a ratio no more than the whole prompt may keep.
    assert of_mass.packed_at(320, 400) == Packing(20, 10)
    assert of_ratio.packed_at(320, 400) == Packing(20, 7)
    assert sizes(Wish(protect=((0, 240),)), prefill_peak_tokens=320).within_peak(20, 3) == 16


def before_a_question(prompt: int = 1000, **options: object) -> CompressionPlanner:
    config = KVCompressConfig.from_dict({"mass": 0.9, "window": 8, **options})
    p = CompressionPlanner(config, B, 4, 4, 4096)
    p.admit("a", prompt, resolve(config, Wish(context_tokens=800)))
    return p


def test_a_prompt_stops_until_its_curve_is_back() -> None:
    p = before_a_question(2000, interval=4)
    assert p.chunk(p.requests["a"], 512, 512) == 288
    (a,) = p.to_score({"a": 800})
    assert p.due({"a": 800}) == [] and p.chunk(p.requests["a"], 800, 200) == 0
    p.feedback.scored(Scored("a", a.state_slot, 800, LossCurve([2, 20, 50], [0.5, 0.1, 0.0])))
    assert p.chunk(p.requests["a"], 800, 200) == 200, (
        "it goes on if the pool has no room for the copy"
    )
    assert p.due({"a": 800}) == [a] and a.target() == Packing(50, 20)
    p.compressed("a", 800)
    assert a.due_at == 2000 and a.observe_slot is not None and a.trigger == "prefill"


def test_a_context_without_anything_to_gain_is_read_on() -> None:
    p = before_a_question()
    (a,) = p.to_score({"a": 800})
    p.feedback.scored(Scored("a", a.state_slot, 800, LossCurve([2, 49, 50], [1.0, 0.5, 0.0])))
    assert a.decided is None and a.kept == 0 and p.chunk(p.requests["a"], 800, 300) == 200
    # The end of the prompt is the next chance; after that it is a generation.
    assert a.due_at == 1000 and p.observers.used == 1 and a.trigger == "prefill"
    assert p.to_score({"a": 1000}) == [a]
    p.feedback.scored(Scored("a", a.state_slot, 1000, LossCurve([2, 61, 62], [1.0, 0.5, 0.0])))
    assert a.due_at > 1000 and p.observers.used == 0 and a.trigger == "decode"


def test_what_was_computed_while_a_compression_waited_is_not_taken_for_observed() -> None:
    config = KVCompressConfig(ratio=4, window=8, prefill_peak_tokens=320)
    p = CompressionPlanner(config, B, 4, 4, 4096)
    p.admit("a", 2000)
    a = p.requests["a"]
    p.compressed("a", a.due_at)
    on_time = a.due_at
    assert on_time == 480
    p.compressed("a", 900)
    assert a.due_at == 908 and a.accumulated == 900 and len(p.observe(p.requests["a"], 900, 8)) == 1
    p.compressed("a", 1995)
    assert a.due_at >= 1995 + 8 and a.observe_slot is None, "the prompt ends before"


def test_half_of_a_peak_holds_what_every_head_keeps() -> None:
    CompressionPlanner(KVCompressConfig(prefill_peak_tokens=256, recent=124), B, 2, 2, 2048)
    with pytest.raises(ValueError, match="half of it must hold the 144 tokens that every head"):
        CompressionPlanner(KVCompressConfig(prefill_peak_tokens=256, recent=125), B, 2, 2, 2048)


def test_what_is_kept_before_a_context_depends_on_nothing_behind_it() -> None:
    asked = sizes(Wish(context_tokens=480), ratio=8, prefill_peak_tokens=320)
    assert asked.packed_at(320, 490) == asked.packed_at(320, 5000) == Packing(20, 4)
    assert sizes(ratio=8, prefill_peak_tokens=320).packed_at(320, 5000) == Packing(20, 10)


def test_a_prompt_is_packed_anew_at_its_end_where_it_has_outgrown_its_budget_by_then() -> None:
    fixed = {"ratio": None, "budget_tokens": 128, "interval": 4}
    one, context = sizes(decode=False, **fixed), sizes(Wish(context_tokens=960), **fixed)
    packing = Packing(60, 8)
    for end, due_at in ((1023, NEVER), (1024, 1024), (1030, 1030)):
        assert one.next_due(packing, 960, end) == due_at
    # What was packed as a context may be shared: a copy of it must be worth it.
    assert context.next_due(packing, 960, 1030) == (64 + 8) * B == context.next_due(packing, 960, 0)
    assert context.next_due(Packing(61, 8), 976, 1030) == 65 * B
    assert context.next_due(Packing(61, 8), 976, 1040) == 1040


def test_a_compression_on_time_is_followed_by_the_next_whatever_the_window() -> None:
    config = KVCompressConfig(ratio=None, budget_tokens=128, interval=1, window=32)
    for late, due_at in ((0, 1616), (3, 1603 + 32)):
        p = CompressionPlanner(config, B, 4, 4, 4096)
        p.admit("a", 1600)
        assert late == 0 or not p.observe(p.requests["a"], 1600, late), (
            "it waits, nothing is observed"
        )
        p.compressed("a", 1600 + late)
        assert p.requests["a"].due_at == due_at


def test_a_context_is_compressed_even_if_that_gives_back_a_single_block() -> None:
    asked = sizes(Wish(context_tokens=160, ratio=1.1))
    assert asked.packed_at(160, 400) == Packing(10, 10)
    assert asked.first_due(400) == 400
    asked = sizes(Wish(context_tokens=160, ratio=1.2))
    assert asked.packed_at(160, 400) == Packing(10, 9)
    assert asked.first_due(400) == 160


def test_what_never_outgrows_its_budget_takes_no_slot() -> None:
    """The longest request may have 128 blocks, and the interval is 8."""
    for tokens, tracked in ((1920, 1), (1936, 0)):
        config = KVCompressConfig.from_dict({"ratio": None, "budget_tokens": tokens})
        p = CompressionPlanner(config, B, 1, 4, 2048)
        p.admit("a", 100)
        another = p.newcomers.starting("b", 100)
        assert len(p.requests) == tracked and p.newcomers.have_slots(another) == (not tracked)


def test_admission_alone_expects_of_a_mass_what_others_came_to() -> None:
    p = before_a_question()
    (a,) = p.to_score({"a": 800})
    assert p.newcomers.forecast().packed(1600).kept == p.sizes().packed(1600).kept == 25
    before = p.newcomers.version
    p.feedback.scored(Scored("a", a.state_slot, 800, LossCurve([2, 49, 50], [1.0, 0.5, 0.0])))
    assert p.newcomers.version > before, "a request that did not fit may fit now"
    # Everything was kept: a quarter is expected no longer, but a share of 0.325, a ratio of 3.
    assert p.newcomers.forecast().packed(1600).kept == 34 and p.sizes().packed(1600).kept == 25
    of_ratio = CompressionPlanner(KVCompressConfig(ratio=8), B, 4, 4, 4096)
    assert of_ratio.newcomers.forecast() is of_ratio.sizes()


def test_a_prompt_that_is_over_is_decoded_until_its_curve_is_back() -> None:
    config = KVCompressConfig.from_dict({"mass": 0.9, "window": 8})
    p = CompressionPlanner(config, B, 4, 4, 4096)
    p.admit("a", 1000)
    (a,) = p.to_score({"a": 1000})
    assert a.awaits_curve and p.chunk(p.requests["a"], 1000, 1) == 1


def test_a_stride_marks_the_multiples_at_which_blocks_come_back() -> None:
    assert sizes(ratio=4, context_stride=512).marks == (512, 1024, 1536, 2048)
    assert sizes(ratio=None, budget_tokens=600, context_stride=256).marks == tuple(
        range(768, 2049, 256)
    )
    # 64 blocks keep 63, and 128 of them 126: in between nothing would come back.
    assert sizes(ratio=1.02, context_stride=512).marks == (1024, 2048)
    assert sizes(ratio=1, context_stride=512).marks == ()
    assert sizes(ratio=4, min_prompt_tokens=600, context_stride=512).marks == (1024, 1536, 2048)
    assert sizes(ratio=4).marks == ()


def test_with_a_stride_a_request_is_due_at_its_marks_in_prompt_and_answer() -> None:
    config = KVCompressConfig(ratio=4, context_stride=512, window=16, policy="snapkv")
    p = CompressionPlanner(config, B, 4, 4, 2048)
    for prompt, due_at, observed in ((100, 512, False), (496, 512, False), (497, 512, True),
                                     (512, 512, True), (600, 512, True)):  # fmt: skip
        p.admit("a", prompt)
        assert p.requests["a"].due_at == due_at
        assert (p.requests["a"].observe_slot is not None) == observed
        p.release("a")
    p.admit("a", 600)
    p.at_mark(p.requests["a"], 512, b"key")
    p.compressed("a", 512)
    assert p.requests["a"].due_at == 1024 and p.requests["a"].prefix == b"key"
    p.generations.watch({"a": 1007})
    assert p.requests["a"].observe_slot is None
    p.generations.watch({"a": 1008})
    assert p.requests["a"].observe_slot is not None and p.requests["a"].due_at == 1024


def test_who_misses_a_mark_has_no_stride_any_more() -> None:
    """Late for want of a slot, or of room: what it computes from then on is its own."""
    config = KVCompressConfig(ratio=4, context_stride=512, window=16, interval=4, policy="snapkv")
    p = CompressionPlanner(config, B, 4, 1, 2048)
    p.admit("a", 600)
    p.at_mark(p.requests["a"], 512, b"key")
    p.compressed("a", 512)
    p.admit("b", 1000)  # takes the only slot
    p.generations.watch({"a": 1008, "b": 0})
    assert p.requests["a"].sizes.stride == 512
    p.release("b")
    p.generations.watch({"a": 1012})
    a = p.requests["a"]
    assert (a.sizes.stride, a.prefix, a.due_at) == (0, None, 1028)
    p.at_mark(a, 1028, b"another")
    assert a.prefix is None and a.wanted == {}
    p.compressed("a", 1028)
    # 64 blocks keep 16: 4 more than a quarter after 22 of its own.
    assert a.due_at == a.sizes.outgrown_at(a.packing) < 1536
