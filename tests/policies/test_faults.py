# SPDX-License-Identifier: Apache-2.0
"""A policy's fault is refused at the start, or is that of one request."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcompress_vllm import policies
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.policies import judge, trial
from kvcompress_vllm.records.plan import Compression, Scoring
from tests.policies.installed import install
from tests.policies.test_again import grow
from tests.test_compressor import SLOTS, B, D, Paged, W

FAULTS = {
    "nothing": ("ReturnsNothing", r"score returned None, not a tensor of shape \(\d+, \d+\) and"),
    "shape": ("WrongShape", r"score returned shape \(\d+, \d+\) and dtype torch.float32, not a"),
    "type": ("WrongType", r"score returned .* dtype torch.float64, not .* dtype torch.float32"),
    "raises": ("Raises", "score raised KeyError: 'no such channel'"),
    "exits": ("Exits", "score raised SystemExit: 5"),
    "nan": ("NotFinite", "score or worth returned numbers that are not finite"),
    "worthless": ("WorthNotFinite", "score or worth returned numbers that are not finite"),
    "worth": ("WrongWorth", r"worth returned \[1.0\], not a tensor"),
    "layers": ("WrongLayers", r"layer_shares returned shape \(\d,\) .*, not a tensor of shape"),
    "heads": ("WrongHeads", "head_shares raised ZeroDivisionError: nothing left"),
}


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {name: cls for name, (cls, _) in FAULTS.items()} | {"fine": "Fine", "huge": "Huge"}
    install(monkeypatch, **{name: f"tests.policies.faulty:{cls}" for name, cls in classes.items()})


def config_of(policy: str, **options) -> KVCompressConfig:
    return KVCompressConfig.from_dict(
        {"policy": policy, "allocator": "layer", "window": W, **options}
    )


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("policy", FAULTS)
def test_a_trial_finds_it(policy: str) -> None:
    with pytest.raises(ValueError, match=f"policy='{policy}' failed a trial .*{FAULTS[policy][1]}"):
        trial.allowed(config_of(policy))


@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_ours_pass_the_trial(policy: str) -> None:
    trial.check(policy, KVCompressConfig.from_dict({"policy": policy}))
    trial.check(policy, config_of(policy))


@pytest.mark.usefixtures("faulty")
def test_requests_may_choose_those_that_pass() -> None:
    config, failed = trial.allowed(config_of("snapkv", allow_policies=True))
    assert failed.keys() == FAULTS.keys()
    assert set(config.allowed_policies()) == {*policies.BUILT_IN, "fine", "huge"}
    assert KVCompressConfig.from_dict(config.to_dict()) == config
    config, failed = trial.allowed(config_of("snapkv", allow_policies="fine+cake"))
    assert config.allowed_policies() == ("snapkv", "fine", "cake") and not failed
    assert trial.allowed(config)[0] == config  # what a second process reads
    with pytest.raises(ValueError, match="'nan' failed a trial"):
        trial.allowed(config_of("snapkv", allow_policies="fine+nan"))
    assert trial.allowed(config_of("snapkv"))[0].allowed_policies() == ("snapkv",)


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("policy", FAULTS)
def test_a_request_keeps_its_blocks_and_reports_it(policy: str) -> None:
    """A first compression, one of heads of uneven length, and one that is only scored."""
    torch.manual_seed(5)
    paged = Paged(config_of("adakv", allow_policies=True))
    first = paged.compress(grow(paged, 333), 6)
    assert [report.failure for report in first] == [None]
    queries = grow(paged, 120)
    for q in range(W):
        paged.state.ring[:, 1, (paged.num_tokens - W + q) % W] = (
            queries[q].flatten(1, 1).view(paged.state.ring[:, 1, 0].shape)
        )
    covered, new = paged.num_tokens // B, [paged.free.pop() for _ in range(5)]
    again = Compression(
        "r", 2, 1, paged.num_tokens, paged.covered, 6, covered, list(paged.row), new, policy=policy
    )
    other_row, other_new = paged.free[:12], paged.free[12:15]
    paged.pages.view(200, -1)[other_row] = torch.randn(12, SLOTS * B * 2 * D)
    other = Compression("o", 0, 1, 12 * B, 0, 0, 12, other_row, other_new, policy=policy)
    paged.compressor.record = {}
    (pending,) = paged.compressor.run([again, other])
    latest = [*range(4), *range(12 * B - 3 * B + 4, 12 * B)]  # and the sinks
    assert [keys.tolist() for keys in paged.compressor.record["o"]] == [latest] * SLOTS
    reports = pending.collect()
    assert len(reports) == 2
    for report, kept in zip(reports, (5, 3), strict=True):
        assert report.failure is not None
        assert sum(map(sum, report.kept_pages)) == kept * SLOTS
        assert all(math.isfinite(lost) for lost in report.curve.lost)
    assert not paged.pages.view(200, -1)[new + other_new].isnan().any()
    (pending,) = paged.compressor.run(
        [Scoring("r", 3, 1, 12 * B, 0, 0, 12, other_row, 3, policy=policy)], score_only=True
    )
    (scored,) = pending.collect()
    assert scored.failure is not None


@pytest.mark.usefixtures("faulty")
def test_one_of_a_batch_may_fail() -> None:
    """What the policy says of the others counts; heads compete otherwise where it failed."""
    torch.manual_seed(5)
    paged = Paged(config_of("adakv"))
    policy, seen = paged.compressor.policy, []
    score = type(policy).score

    def fails_at_first(evidence):
        seen.append(evidence)
        return score(policy, evidence) if len(seen) > 1 else None

    object.__setattr__(policy, "score", fails_at_first)
    paged.pages.normal_()
    paged.state.ring.normal_()
    due = [
        Compression(name, slot, 1, 320, 0, 0, 20, list(range(first, first + 20)), new)
        for name, slot, first, new in [("a", 0, 1, [100, 101, 102, 103]), ("b", 1, 41, [110, 111])]
    ]
    before = paged.pages.clone()
    (pending,) = paged.compressor.run(due)
    failed, fine = pending.collect()
    assert failed.failure is not None and fine.failure is None
    assert sum(map(sum, failed.kept_pages)) == 4 * SLOTS
    after = paged.pages.view(200, -1)[[110, 111]].clone()
    paged.pages.copy_(before)
    paged.state.release([0, 1])
    (pending,) = paged.compressor.run(due[1:])
    assert pending.collect()[0].kept_pages == fine.kept_pages
    assert paged.pages.view(200, -1)[[110, 111]].equal(after)


@pytest.mark.usefixtures("faulty")
def test_huge_scores_have_a_mass() -> None:
    torch.manual_seed(5)
    paged = Paged(config_of("huge"))
    (report,) = paged.compress(grow(paged, 333), 5)
    assert report.failure is None
    assert 0 < report.lost < 1 and report.curve.lost == sorted(report.curve.lost, reverse=True)


def test_ranks_agree_on_what_failed() -> None:
    torch.manual_seed(5)
    paged = Paged(config_of("snapkv"))
    paged.compressor._agree = torch.ones_like  # another rank says so
    (report,) = paged.compress(grow(paged, 333), 5)
    assert (
        report.failure
        == "score or worth returned numbers that are not finite, here or on another rank"
    )


def test_the_example_of_the_docs_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "extend.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    install(monkeypatch, first_keys="my_package:FirstKeys")
    options = {"policy": "first_keys", "policy_options": {"strength": 2.0}}
    trial.allowed(KVCompressConfig.from_dict(options))


def test_the_engine_still_ends_on_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's workers raise SystemExit in a handler, once; a policy may be running just then."""

    def handler(number: int, frame: object) -> None:
        raise SystemExit

    config = config_of("snapkv")
    policy = config.create_policy()
    made_up = trial.evidence(policy, config, 256, 64, False)
    object.__setattr__(policy, "score", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit):
            judge.scores(policy, made_up, made_up.shielded())
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_trial_leaves_a_process_that_can_be_forked() -> None:
    """As vLLM forks the engine; threads of OpenMP would be missing in it."""
    script = """
import os, signal, torch
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.policies import trial
torch.set_num_threads(2)
for name in ("echo", "cake", "h2o"):
    trial.check(name, KVCompressConfig.from_dict({"policy": name}))
assert torch.get_num_threads() == 2
child = os.fork()
if not child:
    signal.alarm(20)  # ends it if it waits
    print((torch.ones(1000, 1000) @ torch.ones(1000, 1000)).exp().isinf().all().item(), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
