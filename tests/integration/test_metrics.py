# SPDX-License-Identifier: Apache-2.0
"""What the scheduler reports, and what Prometheus shows of it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY, generate_latest
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kvcompress_vllm.integration.frontend.prometheus import KVCompressStatLogger
from kvcompress_vllm.integration.frontend.stats import KVCompressSchedulerStats
from kvcompress_vllm.reporting.metrics import METRICS, Compressed, Measured, Occupancy, StepReport
from tests.integration.simulation import Simulation
from tests.integration.test_scheduler import OPTIONS, outgrow_the_forecast, prompt


def compressions(sim: Simulation) -> list[Compressed]:
    return [item for report in sim.reports for item in report.compressions]


def test_a_prompt_and_its_generation() -> None:
    """Every number of a request whose course is known; budget 128 tokens, and 4 more blocks."""
    options = {**OPTIONS, "ratio": None, "budget_tokens": 128, "interval": 4}
    sim = Simulation(60, options, max_model_len=1024, prefix_caching=False)
    sim.add("r", prompt(1, 330), 100)  # 20 full blocks and 10 tokens
    states = []
    while sim.live:
        sim.step()
        report = sim.reports[-1]
        states.append((report.packed_requests, report.saved_blocks, report.observation_slots_used))
        if sim.live:
            row = sim.scheduler.kv_compress_manager.req_to_blocks["r"]
            assert report.saved_blocks == sum(block.is_null for block in row)
    assert compressions(sim) == [
        Compressed("prefill", True, 20, 8, 21, 9),
        Compressed("decode", False, 12, 8, 12, 8),
    ]
    assert (0, 0, 1) in states and (1, 12, 0) in states and (1, 12, 1) in states
    assert (1, 16, 0) in states and states[-1] == (0, 0, 0)
    assert {report.observation_slots for report in sim.reports} == {
        sim.scheduler.kv_compress_planner.observers.count
    }


def test_what_the_worker_measured() -> None:
    """A report comes back for every compression, and the kept pages are those of the worker."""
    sim = Simulation(60, {**OPTIONS, "ratio": 4, "interval": 4}, max_model_len=1024)
    for i, length in enumerate([330, 200]):
        sim.add(f"r{i}", prompt(i, length), 150)
    known = set()
    while sim.live:
        sim.step()
        report, slots = sim.reports[-1], list(sim.worker.state.slots)
        live = {slot: sim.worker.state.num_pages[slot] for slot in slots}
        if len(sim.live) == len(live) == report.measured_requests:
            pages = torch.stack(list(live.values())).sum(0)
            assert report.kept_pages == pages.tolist()
            assert report.mean_kept_pages() == (pages.double() / len(live)).tolist()
        known.add(report.measured_requests)
        pool = sim.pool
        manager = sim.scheduler.kv_compress_manager
        rows = [manager.req_to_blocks[request_id] for request_id in manager.packed]
        assert report.occupancy == (
            59, pool.get_num_free_blocks(), len(sim.scheduler.running), len(sim.scheduler.waiting),
            sum(not block.is_null for row in rows for block in row),
            sum(block.block_hash is not None for block in pool.blocks),
        )  # fmt: skip
    assert known == {0, 1, 2} and sim.reports[-1].kept_pages == []
    measured = [item for report in sim.reports for item in report.measured]
    expected = Counter(item.trigger for item in compressions(sim))
    assert Counter(item.trigger for item in measured) == expected and len(expected) == 2
    assert all(item.milliseconds > 0 and 0 <= item.lost < 1 for item in measured)
    assert sim.scheduler._recorder._kept_pages == {}


def test_a_report_that_comes_too_late_is_not_taken_for_a_new_compression() -> None:
    sim = Simulation(60, OPTIONS)
    sim.add("r", prompt(1, 330), 40)
    while not sim.num_compressions:
        sim.step()
    planner, recorder = sim.scheduler.kv_compress_planner, sim.scheduler._recorder
    tracked = planner.requests["r"]
    (report,) = [r for p in sim.worker.pending for r in p.collect()]
    assert planner.feedback.reported(report) and tracked.curve == report.curve
    for late in [
        report._replace(num_tokens=500), report._replace(state_slot=7),
        report._replace(request_id="gone"),
    ]:  # fmt: skip
        assert not planner.feedback.reported(late)
    sim.abort("r")
    assert not planner.feedback.reported(report)
    recorder.measured(report, False)
    assert recorder._kept_pages == {}


def test_pressure() -> None:
    """The load of test_pressure_compresses_before_vllm_preempts."""
    sim = Simulation(46, {**OPTIONS, "interval": 8}, max_num_seqs=12, prefix_caching=False)
    outgrow_the_forecast(sim)
    triggers = Counter(item.trigger for item in compressions(sim))
    assert triggers["prefill"] == 7 and triggers["pressure"] > 0
    assert triggers.total() == sim.num_compressions
    assert sum(item.first for item in compressions(sim)) == 7
    assert sum(report.preemptions for report in sim.reports) == 0
    # Without pressure, this load preempts (see the next test); the estimate is of that order.
    assert 1 <= sum(report.preemptions_avoided for report in sim.reports) <= 7


def test_a_preempted_request_counts_once() -> None:
    sim = Simulation(46, {**OPTIONS, "interval": 8, "on_pressure": False}, max_num_seqs=12,
                     prefix_caching=False)  # fmt: skip
    outgrow_the_forecast(sim)
    assert sim.num_preemptions > 0
    assert sum(report.preemptions for report in sim.reports) == sim.num_preemptions
    assert sum(report.preemptions_avoided for report in sim.reports) == 0
    prefills = [item for item in compressions(sim) if item.trigger == "prefill"]
    assert len(prefills) > 7 and sum(item.first for item in compressions(sim)) == 7
    assert sim.scheduler._recorder._known == set()


def test_waits_for_the_reserve() -> None:
    """The load of test_waiting_for_the_reserve_only_delays_a_compression."""
    sim = Simulation(34, {**OPTIONS, "ratio": 2}, prefix_caching=False)
    sim.add("long", prompt(1, 400), 60)
    waited = 0
    while sim.live:
        waited += bool(sim.scheduler.kv_compress_planner.due({"long": _computed(sim)}))
        sim.step()
    assert sum(report.reserve_waits for report in sim.reports) == waited > 10
    assert sim.num_compressions == 0


def _computed(sim: Simulation) -> int:
    return sim.scheduler.requests["long"].num_computed_tokens


def refusals(sim: Simulation) -> Counter[str]:
    return sum((Counter(report.refusals) for report in sim.reports), Counter())


def test_refused_by_the_forecast() -> None:
    """A second prompt would fit now, but not beside the first one once that has grown."""
    sim = Simulation(34, {**OPTIONS, "decode": False}, prefix_caching=False)
    sim.add("first", prompt(1, 100), 400)
    sim.step()
    sim.add("second", prompt(2, 100), 400)
    waited = 0
    while not sim.scheduler.requests["second"].num_computed_tokens:
        sim.step()
        waited += not sim.scheduler.requests["second"].num_computed_tokens
    assert refusals(sim) == {"forecast": waited} and waited > 5


def test_refused_for_want_of_slots() -> None:
    sim = Simulation(60, OPTIONS)
    planner = sim.scheduler.kv_compress_planner
    slots, planner.observers._slots = planner.observers._slots, []
    sim.add("r", prompt(1, 300), 5)
    for _ in range(3):
        sim.step()
    planner.observers._slots = slots
    sim.run()
    assert refusals(sim) == {"slots": 3}


def test_without_statistics_nothing_is_collected() -> None:
    sim = Simulation(60, OPTIONS, log_stats=False)
    sim.add("r", prompt(1, 330), 10)
    sim.run()
    assert sim.num_compressions == 1 and sim.reports == []
    assert sim.scheduler._recorder._kept_pages == {}
    assert sim.scheduler._recorder._report == StepReport()
    assert sim.scheduler._recorder._known == set()


def test_the_report_survives_the_trip() -> None:
    report = StepReport(
        [Compressed("prefill", True, 20, 5, 21, 6)], 1, {"slots": 2}, 3, 4, 5, 6,
        [Measured("prefill", 0.5, 0.25)], [[3, 4], [5, 6]], 2, Occupancy(100, 90, 2, 1), 3, 4,
    )  # fmt: skip
    sent = EngineCoreOutputs(
        scheduler_stats=KVCompressSchedulerStats.of(SchedulerStats(num_running_reqs=7), report)
    )
    # As the annotation is in force by the time of the first decoder (see declare()).
    frames = MsgpackEncoder().encode(sent.scheduler_stats)
    received = MsgpackDecoder(KVCompressSchedulerStats | None).decode(frames)
    assert received.kv_compress == report and received.num_running_reqs == 7
    assert MsgpackDecoder(SchedulerStats | None).decode(frames).num_running_reqs == 7


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "m", "engine": "1", **labels})


@pytest.fixture
def logger():
    sim = Simulation(60, OPTIONS)
    sim.vllm_config.model_config.served_model_name = "m"
    return KVCompressStatLogger(sim.vllm_config, [0, 1])


def test_prometheus(logger: KVCompressStatLogger) -> None:
    assert sample("kv_compress:compressions_total", trigger="decode") == 0, "there from the start"
    report = StepReport(
        [Compressed("prefill", True, 20, 5, 21, 6), Compressed("decode", False, 12, 8, 12, 8)],
        1, {"slots": 2}, 3, 4, 5, 6, [Measured("decode", 1.5, 0.25)],
        preemptions=2, preemptions_avoided=3,
    )  # fmt: skip
    for _ in range(2):
        logger.record(KVCompressSchedulerStats(kv_compress=report), None, engine_idx=1)
    logger.record(None, None, engine_idx=1)
    logger.record(SchedulerStats(), None, engine_idx=1)
    assert sample("kv_compress:compressed_requests_total") == 2
    assert sample("kv_compress:compressions_total", trigger="prefill") == 2
    assert sample("kv_compress:compressions_total", trigger="pressure") == 0
    assert sample("kv_compress:kept_ratio_sum", trigger="prefill") == 0.5
    assert sample("kv_compress:kept_ratio_bucket", trigger="prefill", le="0.2") == 0
    assert sample("kv_compress:kept_ratio_bucket", trigger="prefill", le="0.3") == 2
    assert sample("kv_compress:freed_blocks_total") == 2 * (15 + 4)
    assert sample("kv_compress:blocks_before_total") == 2 * 33
    assert sample("kv_compress:blocks_after_total") == 2 * 14
    assert sample("kv_compress:reserve_waits_total") == 2
    assert sample("kv_compress:admission_refusals_total", reason="slots") == 4
    assert sample("kv_compress:compression_seconds_sum", trigger="decode") == 0.003
    assert sample("kv_compress:compression_seconds_bucket", trigger="decode", le="0.001") == 0
    assert sample("kv_compress:compression_seconds_bucket", trigger="decode", le="0.0025") == 2
    assert sample("kv_compress:score_mass_lost_sum", trigger="decode") == 0.5
    assert sample("kv_compress:score_mass_lost_bucket", trigger="decode", le="0.2") == 0
    assert sample("kv_compress:score_mass_lost_bucket", trigger="decode", le="0.3") == 2
    assert sample("kv_compress:preemptions_total") == 4
    assert sample("kv_compress:preemptions_avoided_total") == 6
    assert sample("kv_compress:packed_requests") == 3
    assert sample("kv_compress:saved_blocks") == 4
    assert sample("kv_compress:observation_slots_used") == 5
    assert sample("kv_compress:observation_slots") == 6
    assert REGISTRY.get_sample_value(
        "kv_compress:saved_blocks", {"model_name": "m", "engine": "0"}
    ) == 0  # fmt: skip


def test_the_table_is_what_is_exported(logger: KVCompressStatLogger) -> None:
    lines = generate_latest().decode().splitlines()
    types = dict(line.split()[2:] for line in lines if line.startswith("# TYPE kv_compress:"))
    # prometheus_client adds the creation time of each counter and histogram.
    types = {name: kind for name, kind in types.items() if not name.endswith("_created")}
    assert types == {metric.name: metric.kind for metric in METRICS}
    assert all(m.name.endswith("_total") == (m.kind == "counter") for m in METRICS)


def test_only_where_compression_is_on_and_vllm_keeps_statistics() -> None:
    """The manager is what vLLM builds where it keeps statistics, and only there."""
    sim = Simulation(60, OPTIONS)

    def ours() -> list[object]:
        loggers = StatLoggerManager(sim.vllm_config, [0]).stat_loggers
        return [item for item in loggers if isinstance(item, KVCompressStatLogger)]

    assert len(ours()) == 1
    assert len(ours()) == 1, "a second engine takes the names over"
    sim.vllm_config.additional_config = {}
    assert ours() == []


NAMING = ("metrics.md", "troubleshooting.md", "grafana/kv-compress.json", "prometheus/alerts.yaml")


def test_the_dashboard_names_metrics_of_this_vllm() -> None:
    """vLLM's, that is; tests/test_metrics.py checks ours."""
    sim = Simulation(60, OPTIONS)
    StatLoggerManager(sim.vllm_config, [0])
    docs = Path(__file__).parents[2] / "docs"
    text = "".join((docs / name).read_text() for name in NAMING)
    named = set(re.findall(r"vllm:\w+", text))
    types = re.findall(r"^# TYPE (\S+)", generate_latest().decode(), re.M)
    known = {*types, *(f"{name}_bucket" for name in types), "vllm:cache_config_info"}
    assert named - known == set() and len(named) > 7
