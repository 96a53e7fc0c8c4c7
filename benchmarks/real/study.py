# SPDX-License-Identifier: Apache-2.0
"""Answers and likelihoods over the keys that each score keeps: one prefill, all settings masked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.real import decoded
from benchmarks.real.calibration import Table, tables
from benchmarks.real.formats import AUTO, FORMATS
from benchmarks.real.masks import Shields, count, keep
from benchmarks.real.model import Context, Model
from benchmarks.real.policies import POLICIES, TABLES, Evidence
from benchmarks.real.samples import Sample

MODES = HIDDEN, VISIBLE, DECODED = ("hidden", "visible", "decoded")
"""The question comes after the compression, stands before it, or follows a context that was
generated. Samples of text have no question; they are hidden or decoded."""
FULL = "full"
PRODUCT = {
    HIDDEN: "vnorm_window_w15_half",
    VISIBLE: "vnorm_window_w15_half",
    DECODED: "echo64_vnorm_window_w15_half",
}
"""The policy ``echo`` of the product, whose segments are shorter where they are decoded."""


class Setting(NamedTuple):
    """A score, and how much stays."""

    policy: str
    ratio: float
    """In bytes: with more keys in a page, fewer of them are dropped."""
    shields: Shields
    page_dtype: str = AUTO

    @property
    def paged(self) -> tuple[float, Shields]:
        """The ratio in keys, and shields of the keys that a page has."""
        packing = FORMATS[self.page_dtype].packing
        return self.ratio / packing, replace(self.shields, page=round(self.shields.page * packing))


@dataclass(frozen=True)
class Plan:
    """What is measured of every sample."""

    policies: Sequence[str]
    ratios: Sequence[float]
    shields: Sequence[Shields]
    repeat: Sequence[int]
    """Tokens of KVzip's prompt."""
    rows: int
    """Rows of tokens that follow at once; bounds the memory."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """Of a calibration."""
    page_dtypes: Sequence[str] = (AUTO,)

    def settings(self) -> list[Setting]:
        """The full cache first."""
        return [
            Setting(FULL, 1.0, self.shields[0]),
            *(
                Setting(policy, ratio, shields, page_dtype)
                for shields in self.shields
                for page_dtype in self.page_dtypes
                for ratio in self.ratios
                for policy in self.policies
            ),
        ]


def masks(evidence: Evidence, settings: Sequence[Setting]) -> Tensor:
    """``[K, L, H, P]`` bool."""
    result = torch.ones(
        len(settings), *evidence.keys.shape[:-1], dtype=torch.bool, device=evidence.keys.device
    )
    groups: dict[tuple[float, Shields, str], list[int]] = {}
    for i, setting in enumerate(settings):
        if setting.policy != FULL:
            allocator = POLICIES[setting.policy].allocator
            groups.setdefault((*setting.paged, allocator), []).append(i)
    for (ratio, shields, allocator), members in groups.items():
        evidence.shields = shields
        stack = [POLICIES[settings[i].policy].score(evidence, ratio) for i in members]
        result[members] = keep(torch.stack(stack), ratio, shields, allocator)
    return result


@torch.inference_mode()
def calibrate(
    model: Model, contexts: Iterable[Sequence[int]], repeat: Sequence[int]
) -> dict[str, Table]:
    """Tables of a few contexts, each repeated for real."""
    foreseen, exact = [], []
    for tokens in contexts:
        row = torch.tensor([tokens], device=model.device)
        evidence = Evidence(model, model.prefill(row), row, repeat, Shields())
        foreseen.append({name: evidence.foreseen(name) for name in TABLES})
        exact.append(evidence.kvzip)
    return tables(foreseen, exact)


class Asked(NamedTuple):
    """What follows each of S contexts: M continuations of T tokens, W of them judged."""

    tokens: Tensor  # [S, M, T], all but the last
    places: Tensor  # [S, M, W], whose logits predict what is judged
    answers: Tensor  # [S, M, W]
    real: Tensor  # [S, M, W], False where an answer is shorter than W


def asked(continuations: Sequence[Sequence[tuple[list[int], list[int]]]], device: Any) -> Asked:
    """Batch what is given and what is judged, per context and question; padded with what is
    harmless."""
    longest = max(len(a) + len(b) for row in continuations for a, b in row) - 1
    width = max(len(b) for row in continuations for _, b in row)

    def batch(values: list[list[list[int]]]) -> Tensor:
        return torch.tensor(values, device=device)

    def padded(values: list[int], size: int) -> list[int]:
        return values + [0] * (size - len(values))

    return Asked(
        batch([[padded([*a, *b[:-1]], longest) for a, b in row] for row in continuations]),
        batch(
            [
                [padded(list(range(len(a) - 1, len(a) + len(b) - 1)), width) for a, b in row]
                for row in continuations
            ]
        ),
        batch([[padded(b, width) for _, b in row] for row in continuations]),
        batch([[padded([1] * len(b), width) for _, b in row] for row in continuations]).bool(),
    )


def continuations(sample: Sample) -> list[tuple[list[int], list[int]]]:
    """What is given and what is judged after a context."""
    if sample.questions:
        return [(question.asked, question.answer) for question in sample.questions]
    # The first token comes from the uncompressed context.
    return [(sample.continuation[:1], sample.continuation[1:])]


class Judged(NamedTuple):
    """``[..., M]``: whether greedy decoding gives exactly the answer, and the answer's log
    likelihood, in nats."""

    right: Tensor
    likelihood: Tensor


def judged(logits: Tensor, answers: Tensor, real: Tensor) -> Judged:
    """Logits ``[..., M, W, V]`` that predict ``answers`` ``[..., M, W]``."""
    right = ((logits.argmax(-1) == answers) | ~real).all(-1)
    index = answers.expand(logits.shape[:-1])[..., None]
    chosen = logits.gather(-1, index)[..., 0].float() - logits.float().logsumexp(-1)
    return Judged(right, (chosen * real).sum(-1))


def masked(
    model: Model, context: Context, kept: Tensor, given: Asked, position: int, plan: Plan
) -> Judged:
    """Judge the masks ``[K, L, H, P]`` of a plan's settings by the continuations of their one
    context, ``rows`` tokens that are judged at once: ``[K, M]``."""
    settings = plan.settings()
    shape = len(settings), given.answers.shape[1]
    right = torch.zeros(shape, dtype=torch.bool, device=model.device)
    likelihood = torch.zeros(shape, device=model.device)
    step = max(1, plan.rows // given.answers.numel())
    exact = [i for i, setting in enumerate(settings) if setting.page_dtype == AUTO]
    for begin in range(0, len(exact), step):
        mine = exact[begin : begin + step]
        logits, _ = model.follow(
            context.keys, context.values, kept[None, mine], given.tokens, position, given.places
        )
        assert logits is not None
        right[mine], likelihood[mine] = judged(logits[0], given.answers[0], given.real[0])
    for i, setting in enumerate(settings):
        if setting.page_dtype != AUTO:
            stored = packed(model, context, kept[i], setting)
            logits, _ = model.follow(*stored, kept[None, [i]], given.tokens, position, given.places)
            assert logits is not None
            found = judged(logits[0, 0], given.answers[0], given.real[0])
            right[i], likelihood[i] = found
    return Judged(right, likelihood)


def packed(model: Model, context: Context, kept: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Keys and values of a context as packed pages give them back; the tail is as it was.

    Args:
        kept: ``[L, H, P]`` bool.
    """
    form, (ratio, shields) = FORMATS[setting.page_dtype], setting.paged
    end = count(context.length, ratio, shields).candidates
    result = []
    for whole, quantise in ((context.keys, form.keys), (context.values, form.values)):
        stored = whole.clone()
        some = stored[0, model.layers, :, :end]
        stored[0, model.layers, :, :end] = quantise(some.float(), kept[..., :end]).to(some.dtype)
        result.append(stored)
    return result[0], result[1]


def _line(mode: str, sample: Sample, setting: Setting, outcome: dict[str, Any]) -> dict[str, Any]:
    shields = setting.shields
    return {
        "mode": mode, "source": sample.source, "length": sample.length, "seed": sample.seed,
        "policy": setting.policy, "ratio": setting.ratio, "page": shields.page,
        "recent": shields.recent, "floor": shields.floor, "min_budget": shields.min_budget,
        "page_dtype": setting.page_dtype, **outcome,
    }  # fmt: skip


@torch.inference_mode()
def once(model: Model, sample: Sample, mode: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """A context that was read at once: result lines of one sample."""
    settings = plan.settings()
    outcomes: list[dict[str, Any]] = [{} for _ in settings]

    def read(tokens: Sequence[int]) -> tuple[Context, Tensor]:
        row = torch.tensor([tokens], device=model.device)
        context = model.prefill(row, details=True)
        evidence = Evidence(model, context, row, plan.repeat, plan.shields[0], plan.tables)
        return context, masks(evidence, settings)

    if mode == VISIBLE:
        for question in sample.questions:
            whole = [*sample.context, *question.asked]
            context, kept = read(whole)
            # The first token of the answer comes from the uncompressed prompt.
            given = asked([[(question.answer[:1], question.answer[1:])]], model.device)
            found = masked(model, context, kept, given, len(whole), plan)
            first = context.last[0].float().log_softmax(-1)
            right = found.right & (first.argmax() == question.answer[0])
            likelihood = found.likelihood + first[question.answer[0]]
            _note(outcomes, [question.task], Judged(right, likelihood))
    else:
        context, kept = read(sample.context)
        given = asked([continuations(sample)], model.device)
        found = masked(model, context, kept, given, sample.length, plan)
        _note(outcomes, [question.task for question in sample.questions], found, given)
    for setting, outcome in zip(settings, outcomes, strict=True):
        yield _line(mode, sample, setting, outcome)


def _note(
    outcomes: Sequence[dict[str, Any]], tasks: Sequence[str], found: Judged,
    given: Asked | None = None,
) -> None:  # fmt: skip
    right, likelihood = found.right.tolist(), found.likelihood.tolist()
    for i, outcome in enumerate(outcomes):
        if not tasks:
            assert given is not None
            outcome["nats"] = round(-likelihood[i][0] / given.answers.shape[-1], 5)
            continue
        noted = outcome.setdefault("tasks", {})
        for j, task in enumerate(tasks):
            noted[task] = [int(right[i][j]), round(likelihood[i][j], 3)]


@torch.inference_mode()
def generated(model: Model, samples: Sequence[Sample], plan: Plan) -> Iterator[dict[str, Any]]:
    """Contexts of the same length that were generated: result lines."""
    tokens = torch.tensor([sample.context for sample in samples], device=model.device)
    given = asked([continuations(sample) for sample in samples], model.device)
    whole = model.prefill(tokens)
    everything = [Setting(FULL, 1.0, plan.shields[0])]
    yield from _answers(model, samples, given, everything, whole.keys, whole.values, None)
    del whole
    for shields, page_dtype, ratio in product(plan.shields, plan.page_dtypes, plan.ratios):
        settings = [Setting(policy, ratio, shields, page_dtype) for policy in plan.policies]
        keys, values, present = decoded.generate(
            model, tokens, plan.policies, *settings[0].paged, plan.tables, FORMATS[page_dtype]
        )
        yield from _answers(model, samples, given, settings, keys, values, present)
        del keys, values, present


def _answers(
    model: Model, samples: Sequence[Sample], given: Asked, settings: Sequence[Setting],
    keys: Tensor, values: Tensor, present: Tensor | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Keys of every setting and, within it, of every sample."""
    count = len(samples)
    for i, setting in enumerate(settings):
        mine = slice(i * count, (i + 1) * count)
        kept = None if present is None else present[mine, None]
        logits, _ = model.follow(
            keys[mine], values[mine], kept, given.tokens, samples[0].length, given.places
        )
        assert logits is not None
        found = judged(logits[:, 0], given.answers, given.real)
        for j, sample in enumerate(samples):
            outcome: dict[str, Any] = {}
            one = Judged(found.right[j : j + 1], found.likelihood[j : j + 1])
            _note([outcome], [question.task for question in sample.questions], one, given)
            if present is not None:
                outcome["held"] = round(float(present[mine][j].float().mean()), 4)
            yield _line(DECODED, sample, setting, outcome)
