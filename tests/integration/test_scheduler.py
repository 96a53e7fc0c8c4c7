# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler under compression: accounting, contents, concurrency, determinism."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.integration.engine import banner
from tests.integration.simulation import B, H, L, Simulation

# Echo has files of its own: its hits are of whole segments, longer than most prompts here.
OPTIONS = {"policy": "kv_compress", "ratio": 4, "recent": 8, "sinks": 2, "min_tokens_per_head": 8,
           "window": 4, "min_prompt_tokens": 40, "interval": 2}  # fmt: skip


def prompt(family: int, length: int) -> list[int]:
    """Prompts of one family share their prefix."""
    return [family * 1000 + i % 97 for i in range(length)]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, prefill in chunks, are compressed, decode, are preempted, aborted, finish."""

    @initialize(
        num_blocks=st.integers(33, 60),
        max_num_batched_tokens=st.sampled_from([16, 48, 64, 200]),
        max_num_seqs=st.integers(1, 8),
        allocator=st.sampled_from(["global", "layer", "uniform"]),
        decode=st.sampled_from([True, True, False]),
        prefix_caching=st.booleans(),
        peak=st.sampled_from([{}, {}, {"prefill_peak_tokens": 256}]),
        policy=st.sampled_from([{}, {"policy": "h2o", "query_stride": 5}]),
        page_dtype=st.sampled_from([each.label for each in PageFormat]),
    )
    def build(
        self, num_blocks, max_num_batched_tokens, max_num_seqs, allocator, decode, prefix_caching,
        peak, policy, page_dtype,
    ):  # fmt: skip
        if policy:  # else it is refused
            max_num_batched_tokens = max(max_num_batched_tokens, B + max_num_seqs - 1)
        # check_integrity() runs in every schedule() (the switch is on), contents in every step().
        self.sim = Simulation(
            num_blocks,
            {
                **OPTIONS, "allocator": allocator, "decode": decode, "page_dtype": page_dtype,
                **peak, **policy,
            },
            prefix_caching=prefix_caching, max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
        )  # fmt: skip
        self.added = 0

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 400),
        max_tokens=st.integers(1, 80),
        asked=st.fixed_dictionaries(
            {},
            optional={
                "kv_compress_context_tokens": st.integers(1, 400),
                "kv_compress_protect": st.sampled_from(["0:30", "10:20,90:140", "300:500"]),
            },
        ),
    )
    def add(self, family, length, max_tokens, asked):
        self.sim.add(f"r{self.added}", prompt(family, length), max_tokens, **asked)
        self.added += 1

    @rule(steps=st.integers(1, 20))
    def step(self, steps):
        for _ in range(steps):
            self.sim.step()

    @rule(choice=st.randoms(use_true_random=False))
    def abort(self, choice):
        if self.sim.live:
            self.sim.abort(choice.choice(self.sim.live))

    @rule()
    def reset_prefix_cache(self):
        self.sim.scheduler.reset_prefix_cache(reset_running_requests=True)

    @invariant()
    def pool_is_sound(self):
        if hasattr(self, "sim"):
            self.sim.scheduler.check_integrity()

    def teardown(self):
        if hasattr(self, "sim"):
            self.sim.run()
            # Which contexts a reset dropped the workers hear with the next step.
            self.sim.add("last", prompt(0, 1), 1)
            self.sim.run()
            assert self.sim.pool.get_num_free_blocks() == self.sim.pool.num_gpu_blocks - 1
            assert self.sim.scheduler.kv_compress_planner.requests == {}
            assert self.sim.worker.rows == {} and self.sim.state_slots_left == set()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def test_thousands_of_random_operations() -> None:
    """One long run: every path is taken, every request answered in full, every block returned."""
    sim = Simulation(40, OPTIONS, max_num_seqs=8)
    choice = random.Random(5)
    wanted: dict[str, int] = {}
    operations = aborted = 0
    while operations < 2000:
        operations += 1
        kind = choice.random()
        if kind < 0.08 and len(sim.live) < 16:
            name, tokens = f"r{operations}", choice.randint(1, 300)
            wanted[name] = tokens
            sim.add(name, prompt(choice.randrange(3), choice.randint(1, 212)), tokens)
        elif kind < 0.09 and sim.live:
            name = choice.choice(sim.live)
            wanted.pop(name)
            aborted += 1
            sim.abort(name)
        else:
            sim.step()
    sim.run()
    assert min(sim.num_compressions, sim.num_preemptions, sim.num_cached_tokens, aborted) > 5
    assert {name: len(sim.outputs[name]) for name in wanted} == wanted
    assert sim.pool.get_num_free_blocks() == 39
    assert sim.state_slots_left == set() and sim.scheduler.kv_compress_planner.requests == {}


def load(ratio: float, **options: object) -> Simulation:
    """30 prompts of 10 blocks each, which nothing is shared between, in a pool of 45 blocks."""
    sim = Simulation(46, {**OPTIONS, "ratio": ratio}, max_num_seqs=30, **options)
    for i in range(30):
        sim.add(f"r{i}", prompt(i, 160), 40)
    sim.run()
    return sim


def test_more_requests_run_at_once_and_none_is_lost() -> None:
    full, packed = load(1), load(8)
    assert full.num_compressions == 0 and packed.num_compressions >= 30
    assert packed.most_running > full.most_running
    for sim in (full, packed):
        assert all(len(tokens) == 40 for tokens in sim.outputs.values())
        assert sim.pool.get_num_free_blocks() == 45


def test_blocks_really_come_back() -> None:
    sim = Simulation(60, {**OPTIONS, "ratio": 4}, prefix_caching=False)
    sim.add("r", prompt(1, 330), 10)  # 20 full blocks and 10 tokens
    while not sim.num_compressions:
        sim.step()
    # 5 packed blocks, the partial block, and none for the one token decoded so far.
    assert sim.pool.get_num_free_blocks() == 59 - 5 - 1
    kept = sim.worker.state.num_pages[sim.scheduler.kv_compress_planner.requests["r"].state_slot]
    assert int(kept.sum()) == 5 * L * H and kept.min() >= 1
    sim.run()
    assert sim.pool.get_num_free_blocks() == 59


def test_a_long_generation_holds_a_constant_number_of_blocks() -> None:
    """1,900 tokens from 128, in a pool that could not hold a third of them."""
    options = {**OPTIONS, "ratio": None, "budget_tokens": 128, "interval": 4,
               "prefill_peak_tokens": 256}  # fmt: skip
    sim = Simulation(40, options, max_model_len=2048, prefix_caching=False)
    sim.add("r", prompt(1, 128), 1900)
    held = []
    while sim.live:
        sim.step()
        held.append(sim.pool.num_gpu_blocks - 1 - sim.pool.get_num_free_blocks())
    assert len(sim.outputs["r"]) == 1900 and sim.num_preemptions == 0
    # 8 packed blocks, and 4 more until the next compression.
    assert max(held) == 12 and sim.num_compressions == 1900 // (4 * B)


def outgrow_the_forecast(sim: Simulation) -> None:
    """More generation than it could know of: outputs outlive the short ones that it learnt from."""
    for i in range(30):
        sim.add(f"short{i}", prompt(i, 10), 2)
    sim.run()
    for i in range(7):
        sim.add(f"r{i}", prompt(i, 100), 120)
    sim.run()


@pytest.mark.parametrize("on_pressure", [True, False])
def test_pressure_compresses_before_vllm_preempts(on_pressure: bool) -> None:
    options = {**OPTIONS, "interval": 8, "on_pressure": on_pressure}
    sim = Simulation(46, options, max_num_seqs=12, prefix_caching=False)
    outgrow_the_forecast(sim)
    assert all(len(sim.outputs[f"r{i}"]) == 120 for i in range(7))
    assert (sim.num_preemptions == 0) == on_pressure


def test_a_second_request_hits_the_uncompressed_blocks() -> None:
    sim = Simulation(60, OPTIONS)
    sim.add("first", prompt(1, 320), 30)
    while not sim.num_compressions:
        sim.step()
    sim.add("second", prompt(1, 320), 30)
    sim.step()
    # All but what must be computed for the observed window, in whole blocks.
    assert sim.num_cached_tokens == 304
    sim.run()
    assert sim.num_compressions == 2


@pytest.mark.parametrize("preempted", [0, 1])
def test_hits_that_are_computed_again_do_not_count(preempted: int) -> None:
    sim = Simulation(60, OPTIONS)
    sim.add("first", prompt(1, 321), 2)
    sim.run()
    sim.add("second", prompt(1, 321), 2, kv_compress_context_tokens=160)
    sim.scheduler.requests["second"].num_preemptions = preempted
    sim.scheduler.kv_cache_manager.make_prefix_cache_stats()
    sim.step()
    # Of 320 cached tokens the last 4 before position 160 are observed.
    assert sim.num_cached_tokens == 144
    stats = sim.prefix_cache_stats
    assert stats is not None
    assert (stats.hits, stats.preempted_hits) == ((0, 144) if preempted else (144, 0))


def test_what_passed_the_front_end_by_is_answered_with_an_error() -> None:
    """A bad value, and a prompt that no pool of this size holds; others do not notice."""
    sim = Simulation(24, OPTIONS)
    sim.add("good", prompt(1, 200), 30)
    sim.step()
    sim.pass_by("bad", prompt(2, 200), 9, kv_compress_ratio="lots")
    sim.pass_by("worse", prompt(2, 200), 9, kv_compress_resolved={"ratio": 8})
    sim.pass_by("huge", prompt(2, 400), 9)
    sim.pass_by("asking", prompt(2, 200), 9, kv_compress_ratio=2)
    sim.add("last", prompt(3, 200), 5)
    sim.run(300)
    lengths = {name: len(tokens) for name, tokens in sim.outputs.items()}
    assert lengths == {"good": 30, "bad": 0, "worse": 0, "huge": 0, "asking": 9, "last": 5}
    assert sim.failed == {"bad", "worse", "huge"}
    assert sim.pool.get_num_free_blocks() == 23


def test_blocks_whose_release_waits_for_a_step_are_not_lost() -> None:
    """vLLM may keep a finished request's blocks until the workers are done with them."""
    sim = Simulation(24, OPTIONS)
    kept = sim.pool.get_new_blocks(2)
    with pytest.raises(RuntimeError, match="kv_compress"):
        sim.scheduler.check_integrity()
    sim.scheduler.deferred_frees.append((1, kept))
    sim.scheduler.check_integrity()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_scheduler_is_as_asynchronous_as_vllm_decided(asynchronous: bool) -> None:
    sim = Simulation(24, OPTIONS, asynchronous=asynchronous)
    assert isinstance(sim.scheduler, AsyncScheduler) == asynchronous


def test_decoded_blocks_are_not_published_after_compression() -> None:
    sim = Simulation(60, OPTIONS)
    sim.add("first", prompt(1, 100), 100)
    sim.run()
    answer = sim.outputs["first"]
    sim.add("second", prompt(1, 100) + answer, 5)
    sim.step()
    assert sim.num_cached_tokens == 96  # the prompt's full blocks only


def test_a_prefix_hit_leaves_the_window_to_compute() -> None:
    """Without that, a hit would observe fewer queries and keep other keys than a miss."""
    for length, hit in ((321, 288), (323, 288), (324, 304)):
        sim = Simulation(60, {**OPTIONS, "window": 20})
        for name in ("miss", "hit"):
            sim.add(name, prompt(1, length), 2)
            sim.run()
        assert sim.num_cached_tokens == hit  # at most length - 20, in whole blocks


def test_who_judges_by_all_queries_computes_them_all() -> None:
    sim = Simulation(60, {**OPTIONS, "policy": "h2o", "query_stride": 5})
    for name in ("first", "second"):
        sim.add(name, prompt(1, 320), 2)
        sim.run()
    assert sim.num_cached_tokens == 0 and sim.num_compressions == 2


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("few", ["max_num_batched_tokens", "max_num_scheduled_tokens"])
def test_a_prompt_is_observed_beside_all_that_decode(drafts: int, few: str) -> None:
    """In whole blocks: with less room in a step it waited, and all behind it, until others end."""
    options = {**OPTIONS, "policy": "h2o", "query_stride": 5}
    least = B + 5 * (1 + drafts)

    def simulation(tokens: int) -> Simulation:
        steps = {"max_num_batched_tokens": 64, few: tokens}
        return Simulation(200, options, max_num_seqs=6, drafts=drafts, acceptance=0, **steps)

    with pytest.raises(ValueError, match=rf"at least {least} .* others\), and one is {least - 1};"):
        simulation(least - 1)
    sim = simulation(least)
    for i in range(5):
        sim.add(f"d{i}", [i] * 30, 400)  # of one token, so that each is drafted again
        sim.step()
    for _ in range(20):
        sim.step()
    sim.add("late", prompt(1, 160), 2)
    for _ in range(14):
        sim.step()
    assert len(sim.outputs["late"]) == 2 and len(sim.live) == 5


def test_echo_knows_how_many_tokens_a_step_computes() -> None:
    """It waited for a step with room for 256 where none has more than 100."""
    sim = Simulation(60, {**OPTIONS, "policy": "echo"}, max_num_batched_tokens=512,
                     max_num_scheduled_tokens=100)  # fmt: skip
    sim.add("r", prompt(1, 400), 2)
    sim.run(50)
    assert len(sim.outputs["r"]) == 2


@pytest.mark.parametrize("checked", [False, True])
def test_rows_travel_only_where_they_are_checked(checked, monkeypatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", str(int(checked)))
    sim = Simulation(60, OPTIONS)
    sim.add("r", prompt(1, 330), 10)
    sent, stock = [], sim.worker.run

    def run(output, *rest) -> None:
        sent.extend(output.kv_compress.expected or ())
        stock(output, *rest)

    sim.worker.run = run
    sim.run()
    assert sim.num_compressions == 1 and bool(sent) == checked
    assert {row.request_id for row in sent} <= {"r"}


def test_the_log_says_how_many_fit(monkeypatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(banner.logger, "info", lambda text, *args: lines.append(text % args))
    Simulation(65, {**OPTIONS, "page_dtype": "auto"}, max_model_len=256)
    assert "ratio=4.0" in lines[0]
    assert lines[1] == (
        "kv_compress: 64 blocks of 16 tokens; a prompt of 256 tokens takes 16 blocks, 4 once "
        "compressed, with 25% of its keys: room for 16.0 such requests instead of 4.0"
    )
    assert len(lines) == 2


@pytest.mark.parametrize(("ratio", "warned"), [(4, True), (1, False)])
def test_few_heads_are_warned_of_where_keys_are_dropped(ratio, warned, monkeypatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(banner.logger, "warning", lambda text, *args: lines.append(text % args))
    Simulation(65, {**OPTIONS, "page_dtype": "auto", "ratio": ratio}, max_model_len=256)
    assert [line for line in lines if "share the budget of a request" in line] == lines[:warned]
    assert len(lines) == warned


def test_waiting_for_the_reserve_only_delays_a_compression() -> None:
    """The pool is full when the lone prompt is due: it decodes uncompressed, then catches up."""
    sim = Simulation(34, {**OPTIONS, "ratio": 2}, prefix_caching=False)
    sim.add("long", prompt(1, 400), 60)  # 25 blocks, 13 once packed: 33 cannot hold both
    waited = 0
    while sim.live:
        sim.step()
        waited += bool(sim.live) and not sim.num_compressions
    assert waited > 10 and len(sim.outputs["long"]) == 60
    assert sim.pool.get_num_free_blocks() == 33


@pytest.mark.parametrize("blocks, forecasts", [(400, 0), (60, 1)])
def test_memory_is_forecast_only_where_not_all_fit_as_they_are(blocks: int, forecasts: int) -> None:
    sim = Simulation(blocks, OPTIONS, max_num_batched_tokens=1000)
    admission, asked = sim.scheduler._admission, []
    stock = admission._load
    admission._load = lambda *args: asked.append(args) or stock(*args)
    for seed in range(4):
        sim.add(f"r{seed}", prompt(seed, 200), 20)  # 13 blocks, 14 with its answer
    sim.step()
    assert bool(asked) == bool(forecasts) and sim.most_running == 4
    sim.run()


@pytest.mark.parametrize(("blocks", "running"), [(76, 2), (75, 1)])
def test_who_runs_is_forecast_from_what_it_has_computed(blocks: int, running: int) -> None:
    """With its 6 blocks of 100 more tokens, beside 6 of the other by then: one of all blocks is
    vLLM's own. When the first has ended there is room for all that the other will say."""
    sim = Simulation(blocks, OPTIONS, max_num_batched_tokens=16, max_model_len=2048)
    sim.add("runs", prompt(1, 1000), 100, kv_compress=False)
    while not sim.outputs["runs"]:
        sim.step()
    sim.add("next", prompt(2, 10), 300, kv_compress=False)
    sim.step()
    assert len(sim.scheduler.running) == running


def test_a_prompt_for_which_there_is_no_room_is_not_begun() -> None:
    """Who runs takes a block each in this very step: what the forecast counts lacks two."""
    sim = Simulation(2 * 2 + 10 + 1, OPTIONS, prefix_caching=False)
    for name in ("a", "b"):
        sim.add(name, prompt(ord(name), 32), 10, kv_compress=False)
    sim.step()
    sim.add("long", prompt(3, 160), 1, kv_compress=False)
    sim.run()
    assert sim.num_preemptions == 0
    assert {name: len(said) for name, said in sim.outputs.items()} == {"a": 10, "b": 10, "long": 1}


@pytest.mark.parametrize(
    ("policy", "free"), [({}, 1), ({"policy": "h2o", "query_stride": 5}, 2)],
    ids=["compressed", "observed"],
)  # fmt: skip
def test_who_is_preempted_in_the_step_that_reads_it_is_forgotten(monkeypatch, policy, free) -> None:
    """Its state slot and its blocks are somebody else's by then."""
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "0")  # the test holds blocks, too
    options = {**OPTIONS, **policy, "ratio": 2, "on_pressure": False, "min_prompt_tokens": 16}
    sim = Simulation(40, options, max_num_batched_tokens=200, prefix_caching=False)
    for name in ("a", "b", "c"):
        sim.add(name, prompt(ord(name), 32), 40, kv_compress=False)
    sim.add("read", prompt(4, 33), 20)
    sim.step()
    # Each of the others begins a block. There are two: a copy of one block frees as many.
    taken = sim.pool.get_new_blocks(sim.pool.get_num_free_blocks() - free)
    steps, begun = sim.scheduler._steps, []
    begin = steps.begin

    def note(computed):
        begun.append(begin(computed))
        assert len(begun[0].compressions) + len(begun[0].accumulations) == 1
        return begun[0]

    with monkeypatch.context() as patch:
        patch.setattr(steps, "begin", note)
        sim.step()
    assert sim.num_preemptions == 1
    assert begun[0].compressions == begun[0].accumulations == []
    sim.pool.free_blocks(taken)
    sim.run()
    assert [len(said) for said in sim.outputs.values()] == [40, 40, 40, 20]
    assert sim.num_compressions > 0 and sim.state_slots_left == set()


def test_a_prompt_that_cannot_fit_is_refused() -> None:
    sim = Simulation(20, OPTIONS)
    with pytest.raises(ValueError, match=r"may take 26 blocks .* a request has 19"):
        sim.add("r", prompt(1, 400), 1)


@pytest.mark.parametrize("allocator", ["global", "layer", "uniform"])
def test_allocators_keep_what_they_promise(allocator: str) -> None:
    options = {**OPTIONS, "allocator": allocator, "pool": 1}
    sim = Simulation(60, options, prefix_caching=False)
    sim.add("r", prompt(1, 20 * B), 3)
    while not sim.num_compressions:
        sim.step()
    kept = sim.worker.state.num_pages[sim.scheduler.kv_compress_planner.requests["r"].state_slot]
    assert int(kept.sum()) == 5 * L * H
    if allocator == "uniform":
        assert kept.eq(5).all()
    else:
        assert not kept.eq(5).all()
        assert allocator == "global" or kept.sum(-1).eq(5 * H).all()
