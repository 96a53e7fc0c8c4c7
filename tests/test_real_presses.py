# SPDX-License-Identifier: Apache-2.0
"""benchmarks/real/presses.py: what it tells kvpress, and its answers where that is installed.

pip install --no-deps --target kvpress_site kvpress==0.5.5
PYTHONPATH=kvpress_site:. python -m pytest tests/test_real_presses.py
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.real import presses, samples, study
from benchmarks.real.masks import Shields, keep
from benchmarks.real.model import Model
from benchmarks.real.scores import keydiff

TINY = Path(__file__).parents[1] / "models" / "tiny"
LENGTH = 230


@pytest.mark.parametrize(("length", "ratio", "held"), [
    (1000, 2, 31 * 16 + 8), (1000, 4, 16 * 16 + 8), (1000, 8, 8 * 16 + 8), (1024, 2, 512),
    (2000, 8, 16 * 16), (909, 4, 237), (904, 8, 120),
])  # fmt: skip
def test_kvpress_keeps_as_many_keys_as_the_engine(length: int, ratio: float, held: int) -> None:
    """Pages are rounded up, and what no page holds stays."""
    share = presses.removed(length, ratio)
    assert max(1, int(length * (1 - share))) == held  # kvpress.utils.compute_n_kept
    # KVzip counts what goes, over all heads; a key per head is the most that rounding may cost.
    assert abs(int(90 * length * share) - 90 * (length - held)) <= 90


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_hooks_are_told_of_the_cache_by_the_name_they_know(name: str) -> None:
    seen: dict[str, Any] = {}

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: str) -> str:
        seen.update(kwargs)
        return output

    layer = SimpleNamespace(keys=torch.zeros(1, 2, 37, 8))
    cache = SimpleNamespace(layers=[None, layer])
    module = SimpleNamespace(layer_idx=1)
    told = {name: cache, "hidden_states": torch.zeros(1, 37, 4)}
    assert presses._told(hook)(module, (), told, "output") == "output"
    assert seen["past_key_values"] is cache
    # kvpress takes a step for the prefill where the last position is the last token of the step.
    assert int(seen["cache_position"][-1]) + 1 == seen["hidden_states"].shape[1]


@pytest.fixture(scope="module")
def asker() -> presses.Asker:
    try:
        presses.load()
    except SystemExit:
        pytest.skip("kvpress is not installed")
    torch.set_num_threads(1)
    return presses.Asker(TINY, "cpu", torch.float32)


@pytest.fixture(scope="module")
def sample() -> samples.Sample:
    tokens = torch.randint(10, 4000, (LENGTH,), generator=torch.Generator().manual_seed(3))
    asked = [samples.Question("a", [5, 6, 7], [8, 9]), samples.Question("b", [5, 7], [9, 9, 4])]
    return samples.Sample("toy", LENGTH, 0, tokens.tolist(), asked)


def test_its_keydiff_answers_as_ours_over_the_same_keys(asker: Any, sample: Any) -> None:
    """And the full cache as the study's own model."""
    model = Model(TINY, "cpu", torch.float32)
    context = model.prefill(torch.tensor([sample.context]))
    shields = Shields(page=1, sinks=0, recent=0, floor=0)
    score = keydiff(context.keys[0])
    kept = torch.cat([
        torch.ones(1, *score.shape, dtype=torch.bool), keep(score[None], 4, shields, "uniform"),
    ])  # fmt: skip
    given = study.asked([study.continuations(sample)], model.device)
    logits, _ = model.follow(
        context.keys, context.values, kept[None], given.tokens, LENGTH, given.places
    )
    wanted = study.judged(logits[0], given.answers[0], given.real[0])
    press = asker.press("keydiff", 1 - (math.ceil(LENGTH / 4) + 0.5) / LENGTH)
    for i, chosen in enumerate((None, press)):
        found = asker.ask(sample.context, study.continuations(sample), chosen)
        assert [right for right, _ in found] == wanted.right[i].tolist()
        likelihood = torch.tensor([likelihood for _, likelihood in found])
        torch.testing.assert_close(likelihood, wanted.likelihood[i], rtol=1e-3, atol=1e-3)


def test_every_press_writes_lines_like_the_studys(asker: Any, sample: Any) -> None:
    found = list(presses.lines(asker, sample, list(presses.PRESSES), [2.0]))
    plan = study.Plan([], [], [Shields()], [5], 64)
    (full,) = study.once(Model(TINY, "cpu", torch.float32), sample, study.HIDDEN, plan)
    assert [line["policy"] for line in found][1:] == [f"kvpress {name}" for name in presses.PRESSES]
    for line in found:
        assert line.keys() == full.keys() and line["tasks"].keys() == {"a", "b"}
        assert all(likelihood < 0 for _, likelihood in line["tasks"].values())
    assert found[0]["tasks"] == {
        task: [right, pytest.approx(likelihood, abs=2e-3)]
        for task, (right, likelihood) in full["tasks"].items()
    }
    assert len({str(line["tasks"]) for line in found}) == len(found)
