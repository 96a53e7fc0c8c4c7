# SPDX-License-Identifier: Apache-2.0
"""Mass budgets: how many blocks, and when the planner knows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records.budget import KEEP_ALL, Wish
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.records.report import Scored
from kvcompress_vllm.scheduling.mass import ExpectedRatio, mass_blocks
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.sizes import NEVER

B = 16
CURVE = LossCurve([2, 10, 20, 50, 100], [0.9, 0.5, 0.2, 0.02, 0.0])


def config(**options: object) -> KVCompressConfig:
    return KVCompressConfig.from_dict({"mass": 0.9, "window": 8, "interval": 4, **options})


@pytest.mark.parametrize(
    ("mass", "limits", "blocks"),
    [
        (0.98, {}, 50),
        (0.8, {}, 20),
        (0.5, {}, 10),
        (0.1, {}, 7),  # at most ratio 16 where nothing is set
        (0.1, {"max_ratio": 40}, 3),
        (0.1, {"max_ratio": 1000}, 2),  # the floor
        (0.5, {"max_ratio": 8}, 13),
        (0.99, {"min_ratio": 3}, 34),
        (1.0, {}, 100),
    ],
)
def test_the_fewest_blocks_within_the_limits(mass: float, limits: dict, blocks: int) -> None:
    budget = resolve(config(**limits), Wish(mass=mass))._replace(mass=mass)
    assert mass_blocks(budget, CURVE, 100, B) == blocks


def test_never_more_than_there_are() -> None:
    """Compressed again: 12 blocks compete of a request of 400."""
    curve = LossCurve([2, 12], [0.9, 0.0])
    assert mass_blocks(resolve(config(), Wish(mass=0.99)), curve, 400, B) == 12


@given(st.floats(0.01, 1), st.floats(1, 100), st.floats(1, 100), st.integers(1, 5))
def test_always_within_floor_and_candidates(
    mass: float, low: float, high: float, floor: int
) -> None:
    limits = config(
        min_ratio=min(low, high), max_ratio=max(low, high), min_tokens_per_head=floor * B, recent=0
    )
    budget = resolve(limits)._replace(mass=mass)
    curve = LossCurve([floor, floor + 3, floor + 20], [0.7, 0.2, 0.0])
    assert floor <= mass_blocks(budget, curve, floor + 50, B) <= floor + 20


def test_whose_budget_is_a_mass() -> None:
    by_mass, by_ratio = config(), KVCompressConfig(ratio=4)

    def mass_of(config: KVCompressConfig, own: Wish | None) -> float | None:
        return resolve(config, own).mass

    assert mass_of(by_mass, None) == mass_of(by_mass, Wish(context_tokens=9)) == 0.9
    assert mass_of(by_mass, Wish(mass=0.5)) == mass_of(by_ratio, Wish(mass=0.5)) == 0.5
    for own in (Wish(ratio=2.0), Wish(budget_tokens=100), KEEP_ALL):
        assert mass_of(by_mass, own) is None
    assert mass_of(by_ratio, None) is None


def test_the_expected_ratio_follows_what_comes() -> None:
    expected = ExpectedRatio(config())
    assert expected.ratio == 4
    for _ in range(100):
        expected.learn(100, 10)
    assert expected.ratio in (9.75, 10)
    for _ in range(100):
        expected.learn(100, 100)
    assert expected.ratio == 1.25, "or nothing would be scored any more"
    assert ExpectedRatio(config(max_ratio=2)).ratio == 2
    assert ExpectedRatio(config(min_ratio=8)).ratio == 8
    assert ExpectedRatio(config(page_dtype="fp8")).ratio == 8, "twice the keys in a block"


def planner(**options: object) -> CompressionPlanner:
    return CompressionPlanner(
        config(**options), B, state_slots=4, observe_slots=4, max_tokens=100_000
    )


def admitted(p: CompressionPlanner, name: str, num_tokens: int, own: Wish | None = None) -> Tracked:
    p.admit(name, num_tokens, resolve(p.config, own))
    return p.requests[name]


def scored(tracked: Tracked, curve: LossCurve = CURVE) -> Scored:
    return Scored(tracked.request_id, tracked.state_slot, tracked.due_at, curve)


def test_scored_first_and_compressed_once_the_curve_is_known() -> None:
    p = planner()
    a = admitted(p, "a", 1600)
    assert p.to_score({"a": 1599}) == [] and p.due({"a": 1599}) == []
    assert p.to_score({"a": 1600}) == [a]
    assert a.target() == (100, 25) and p.newcomers.reserve() == 25, "as expected"
    for computed in (1601, 1602):  # its output is on its way, and tokens are decoded meanwhile
        assert p.to_score({"a": computed}) == [] and p.due({"a": computed}) == []
        assert not p.observe(p.requests["a"], computed - 1, 1)
    p.feedback.scored(scored(a))
    # 37 blocks lose 0.098, 36 would lose 0.104.
    assert p.due({"a": 1602}) == [a] and a.target() == (100, 37) and p.newcomers.reserve() == 37
    p.compressed("a")
    assert (a.covered, a.kept, a.observe_slot) == (100, 37, None)
    assert p.observers.used == 0 and p.newcomers.reserve() == 0
    # Its own ratio from now on, 2.7: then 4 blocks too many.
    assert a.due_at == a.sizes.outgrown_at(Packing(100, 37)) >= 1600 + 4 * B
    assert (a.budget.mass, a.budget.ratio) == (0.9, 2.5)


def test_a_mass_keeps_the_least_budget_at_least() -> None:
    p = planner(min_budget_tokens=640)
    a = admitted(p, "a", 1600)
    p.to_score({"a": 1600})
    p.feedback.scored(scored(a))
    assert a.target() == (100, 40)  # 37 hold the mass


def test_a_generation_is_scored_again() -> None:
    p = planner()
    a = admitted(p, "a", 1600)
    p.to_score({"a": 1600})
    p.feedback.scored(scored(a))
    p.compressed("a")
    due_at = a.due_at
    p.generations.watch({"a": due_at - 8})
    assert p.due({"a": due_at}) == [] and p.to_score({"a": due_at}) == [a]
    p.feedback.scored(scored(a, LossCurve([2, 40, 45], [0.5, 0.05, 0.0])))
    p.compressed("a")
    assert (a.covered, a.kept) == (due_at // B, 36) and a.due_at >= due_at + 4 * B


def test_what_keeps_nearly_all_is_not_compressed_over_and_over() -> None:
    p = planner()
    a = admitted(p, "a", 1600)
    p.to_score({"a": 1600})
    p.feedback.scored(scored(a, LossCurve([2, 90, 100], [1.0, 0.1, 0.0])))
    p.compressed("a")
    assert a.kept == 90 and a.sizes.outgrown_at(a.packing) == 1600, "of a ratio of 1.25"
    assert a.due_at == 1600 + 4 * B


def test_where_there_is_nothing_to_gain_nothing_is_compressed() -> None:
    p = planner()
    a = admitted(p, "a", 1600)
    p.to_score({"a": 1600})
    p.feedback.scored(scored(a, LossCurve([2, 99, 100], [1.0, 0.5, 0.0])))
    assert p.due({"a": 1601}) == [] == p.to_score({"a": 1601})
    assert p.observers.used == 0 and a.kept == 0 and a.due_at == 1600 + 4 * B
    p.generations.watch({"a": a.due_at - 8})
    assert p.to_score({"a": a.due_at}) == [a], "later it is asked again"
    p = planner(decode=False)
    a = admitted(p, "a", 1600)
    p.to_score({"a": 1600})
    p.feedback.scored(scored(a, LossCurve([2, 99, 100], [1.0, 0.5, 0.0])))
    assert a.due_at == NEVER


def test_a_curve_that_comes_too_late() -> None:
    p = planner()
    a = admitted(p, "a", 1600)
    p.to_score({"a": 1600})
    late = scored(a)
    p.release("a")
    p.feedback.scored(late)  # aborted
    again = admitted(p, "a", 1650)  # or preempted, with a longer prefill
    assert again.state_slot == a.state_slot
    p.feedback.scored(late)
    assert again.decided is None and again.target()[0] == 103
    p.to_score({"a": 1650})
    p.feedback.scored(scored(again))
    p.feedback.scored(scored(again, LossCurve([2, 103], [1.0, 0.0])))  # once decided, decided
    assert again.decided == 37


def test_requests_may_ask_for_a_mass_or_for_none() -> None:
    p = planner()
    a, b = admitted(p, "a", 1600, Wish(mass=0.5)), admitted(p, "b", 1600, Wish(ratio=10.0))
    assert p.to_score({"a": 1600, "b": 1600}) == [a] and p.due({"a": 1600, "b": 1600}) == [b]
    p.feedback.scored(scored(a))
    assert a.target() == (100, 10) and b.target() == (100, 10)


def test_pressure_beyond_the_budget_waits_for_no_curve() -> None:
    p = planner(max_ratio=10)
    a = admitted(p, "a", 1600)
    p.to_score({"a": 1600})
    p.feedback.scored(scored(a))
    p.compressed("a")
    p.generations.press({"a": 1601}, 0)
    assert a.ratio == 10 and p.due({"a": a.due_at}) == [a] and a.target() == (100, 10)


def test_what_interrupts_a_prefill_waits_for_no_curve() -> None:
    p = planner(prefill_peak_tokens=640)
    a = admitted(p, "a", 1600)
    assert a.due_at == 640 and p.due({"a": 640}) == [a]


def test_a_context_within_a_prompt_keeps_no_more_than_half_of_the_peak() -> None:
    """Whatever its mass would take."""
    p = planner(prefill_peak_tokens=640)
    a = admitted(p, "a", 1600, Wish(context_tokens=480))
    assert a.due_at == 480 and p.to_score({"a": 480}) == [a]
    p.feedback.scored(scored(a, LossCurve([2, 29, 30], [1.0, 0.1, 0.0])))
    assert a.target() == (30, 20)


def test_a_mass_asked_of_a_policy_without_one_is_kv_compress() -> None:
    """Scores of diverse depend on the budget: no sum of them could decide it."""
    by_ratio = KVCompressConfig(policy="diverse", ratio=4)
    own = resolve(by_ratio, Wish(mass=0.9))
    assert (own.policy, own.mass) == ("kv_compress", 0.9)
    assert resolve(by_ratio, Wish(ratio=2)).policy == resolve(by_ratio).policy == "diverse"
    own = resolve(config(policy="cake"))
    assert (own.policy, own.mass) == ("cake", 0.9)
