# SPDX-License-Identifier: Apache-2.0
"""The grid, and the file of results. One cell is a choice of what to keep, a task and a length."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

from benchmarks.intervals import interval
from kvcompress_vllm import policies
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.spelling import parse_spec

FULL = "full"
"""The policy name of the control that keeps everything; it has one allocator and ratio 1."""
CONTROLS = (FULL, "streaming", "random")
VISIBLE, HIDDEN, DECODED = QUESTIONS = ("visible", "hidden", "decoded")
"""Whether the question is in what is compressed, or read over the compressed context, or context
and question are generated, and compressed on the way as generations are."""
EITHER = "either"
"""The question mode of the full cache, for which it makes no difference."""
PERPLEXITY = "perplexity"
"""A task: how likely text is after its beginning was compressed. Never visible, of course."""
IGNORED_BY_CONTROLS = ("window", "pool", "policy_options.")
"""Options that ``streaming`` and ``random`` take no notice of."""


class Choice(NamedTuple):
    """What is kept of a prompt, and when that is decided."""

    policy: str
    allocator: str = "auto"
    ratio: float = 1.0
    question: str = EITHER
    options: str = ""
    """Further options as ``key=value,...``."""


class Cell(NamedTuple):
    """What is measured together."""

    policy: str
    allocator: str
    ratio: float
    question: str
    options: str
    task: str
    length: int
    """Tokens, answer included; 0 where the samples of a file have the length they have."""

    @property
    def choice(self) -> Choice:
        return Choice(*self[:5])


def grid(
    names: Iterable[str],
    allocators: Iterable[str],
    ratios: Iterable[float],
    questions: Iterable[str],
    variants: Iterable[str],
    tasks: Iterable[tuple[str, int]],
) -> Iterator[Cell]:
    """Every cell, the controls first and always.

    Args:
        names: of the policies.
        variants: options as ``key=value,...``, each a variant of every policy that has them.
        tasks: names and lengths.
    """
    tasks, ratios, questions = list(tasks), list(ratios), list(questions)
    seen: dict[Cell, None] = {}
    for task, length in tasks:
        seen[Cell(*Choice(FULL), task, length)] = None
    every = dict.fromkeys([*CONTROLS[1:], *names])
    for policy, allocator, variant in product(every, allocators, variants):
        options = _own(policy, variant)
        for ratio, question, (task, length) in product(ratios, questions, tasks):
            if task != PERPLEXITY or question != VISIBLE:
                cell = Cell(policy, allocator, float(ratio), question, options, task, length)
                seen[cell] = None
    yield from seen


def _own(policy: str, variant: str) -> str:
    """What of a variant concerns the policy."""
    found = policies.find(policy)
    known = found.options()

    def concerns(item: str) -> bool:
        name = item.partition("=")[0]
        if policy in CONTROLS and name.startswith(IGNORED_BY_CONTROLS):
            return False
        if name == "query_stride" and not found.observes_all:
            return False
        prefix, _, option = name.partition(".")
        return prefix != "policy_options" or option in known

    return ",".join(item for item in variant.split(",") if item and concerns(item))


def config_of(choice: Choice, base: str) -> KVCompressConfig:
    """The resolved options of a choice; ``base`` as ``key=value,...`` applies to all.

    Raises:
        ValueError: options that are not accepted.
    """
    # Short answers over a fixed cache: nothing is compressed that the cell does not name, and in 16
    # bits unless it says otherwise.
    options: dict[str, Any] = {"decode": choice.question == DECODED, "on_pressure": False}
    options["page_dtype"] = "auto"
    options |= parse_spec(base) | parse_spec(choice.options)
    if choice.question == DECODED and options["decode"] is False:
        raise ValueError(
            "decode=False is not accepted with the question decoded, which measures what decode "
            "compresses; it must be true"
        )
    chosen = {"policy": choice.policy, "allocator": choice.allocator, "ratio": choice.ratio}
    return KVCompressConfig.from_dict(options | chosen)


@dataclass
class Result:
    """What was measured of a cell, or of several."""

    metric: str
    scores: dict[Any, float] = field(default_factory=dict)
    """By seed; by row number for files."""
    kept: list[tuple[int, list[list[float]]]] = field(default_factory=list)
    """Number of samples and mean share of pages kept, ``[L][H]``."""

    @property
    def samples(self) -> int:
        return len(self.scores)

    @property
    def mean(self) -> float:
        return math.fsum(self.scores.values()) / max(1, self.samples)

    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the mean."""
        if self.metric == "exact":
            return interval(round(sum(self.scores.values())), self.samples)
        if self.samples < 2:
            return -math.inf, math.inf
        half = 1.96 * stdev(self.scores.values()) / math.sqrt(self.samples)
        return self.mean - half, self.mean + half

    def minus(self, other: Result) -> Result:
        """The differences on the samples that both have."""
        both = self.scores.keys() & other.scores.keys()
        return Result("difference", {key: self.scores[key] - other.scores[key] for key in both})

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a line in.

        Raises:
            ValueError: it has another metric, or samples that were counted already.
        """
        scores = dict(enumerate(line["scores"], line["first_seed"]))
        if line["metric"] != self.metric or scores.keys() & self.scores.keys():
            raise ValueError(f"measured twice, or with two metrics: {json.dumps(line)}")
        self.scores |= scores
        if "kept" in line:
            self.kept.append((line["kept_samples"], line["kept"]))


RUN = ("model", "dtype", "base", "seeds")
"""What all lines of a file have in common: ``base`` are the options of every cell, ``seeds`` is
``tuning`` or ``test``."""


def load(paths: Sequence[Path], run: Mapping[str, str] | None = None) -> dict[Cell, Result]:
    """Add up what was measured before.

    Args:
        run: what they all must say of :data:`RUN`; None: whatever the first line says.

    Raises:
        ValueError: lines of another run or of another kind, or samples that are there twice.
    """
    results: dict[Cell, Result] = {}
    for path in paths:
        for text in path.read_text().splitlines() if path.exists() else ():
            line = json.loads(text)
            if not {*RUN, *Cell._fields, "metric", "first_seed", "scores"} <= line.keys():
                raise ValueError(f"{path}: not a result of this benchmark: {text[:200]}")
            found = {key: line[key] for key in RUN}
            run = found if run is None else run
            if found != dict(run):
                raise ValueError(f"{path}: measured with {found}, not {dict(run)}")
            cell = Cell(*(line[name] for name in Cell._fields))
            results.setdefault(cell, Result(line["metric"])).add(line)
    return results


def kind_of_seeds(seeds: range) -> str:
    """``tuning`` or ``test``, see benchmarks/retrieval/README.md.

    Raises:
        ValueError: no seed, seeds of both kinds, or of none.
    """
    if not seeds:
        raise ValueError("no samples are asked for; --samples must be >= 1")
    for kind, known in (("tuning", range(100_000)), ("test", range(100_000, 200_000))):
        if seeds[0] in known and seeds[-1] in known:
            return kind
    raise ValueError(
        f"seeds {seeds[0]} to {seeds[-1]} are not accepted; they must lie within 0 to 99999 "
        "(tuning) or 100000 to 199999 (test)"
    )


def runs(numbers: Iterable[int]) -> Iterator[range]:
    """Consecutive numbers as ranges."""
    begin = end = None
    for number in sorted(numbers):
        if number != end:
            if begin is not None and end is not None:
                yield range(begin, end)
            begin = number
        end = number + 1
    if begin is not None and end is not None:
        yield range(begin, end)
