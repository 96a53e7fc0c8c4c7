# SPDX-License-Identifier: Apache-2.0
"""The same samples through vLLM with the product; prompts are the study's, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from benchmarks.quality import measure
from benchmarks.quality.cells import DECODED, EITHER, FULL, Cell, Choice
from benchmarks.quality.prompts import Prompt
from benchmarks.real.masks import Shields
from benchmarks.real.samples import TEXT, Question, Sample


def choices(
    policies: Iterable[str], ratios: Iterable[float], modes: Iterable[str]
) -> Iterator[Choice]:
    """The full cache, then every combination; a policy may have options, ``NAME:KEY=VALUE;...``."""
    yield Choice(FULL)
    for mode, ratio, policy in product(modes, ratios, policies):
        name, _, options = policy.partition(":")
        parts = [part for part in options.split(";") if part]
        allocators = [part for part in parts if part.startswith("allocator=")]
        others = ",".join(part for part in parts if part not in allocators)
        allocator = allocators[-1].partition("=")[2] if allocators else "auto"
        yield Choice(name, allocator, ratio, mode, others)


def prompts(sample: Sample) -> Iterator[tuple[Question | None, Prompt]]:
    """What is asked of a sample; None: nothing, its text goes on."""
    size = len(sample.context)
    for question in sample.questions:
        tokens = [*sample.context, *question.asked]
        yield question, Prompt(tokens, size, (), len(question.answer), TEXT)
    if not sample.questions:
        yield None, Prompt([*sample.context, *sample.continuation], size, (), 1, "nats")


def run(
    model: str,
    samples: Sequence[Sample],
    wanted: Sequence[Choice],
    shields: Shields,
    llm: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Result lines as the study's, answers without a likelihood. The full cache's have every mode
    of ``wanted``.

    Raises:
        ValueError: options that are not accepted.
    """
    base = (
        f"sinks={shields.sinks},recent={shields.recent},min_tokens_per_head={shields.floor},"
        f"min_budget_tokens={shields.min_budget}"
    )
    settings = measure.Settings(model, base, llm)
    modes = list(dict.fromkeys(c.question for c in wanted if c.question != EITHER))
    for cells in measure.by_engine((Cell(*choice, TEXT, 0) for choice in wanted), base):
        engine = measure.start(settings, cells)
        for choice in dict.fromkeys(cell.choice for cell in cells):
            measure.configure(engine, choice, base)
            items = [(sample, *asked) for sample in samples for asked in prompts(sample)]
            items = [x for x in items if x[1] is not None or choice.question != "visible"]
            outputs = measure.generate(engine, choice, [prompt for *_, prompt in items])
            lines: dict[tuple[str, int, int], dict[str, Any]] = {}
            for output, (sample, question, prompt) in zip(outputs, items, strict=True):
                key = sample.source, sample.length, sample.seed
                line = lines.setdefault(key, _line(sample, choice, shields))
                if question is None:
                    line["nats"] = round(measure.score(output, choice, prompt, None), 5)
                    continue
                forced = len(measure.generated(choice, prompt))
                reply = list(output.outputs[0].token_ids)[forced:]
                right = reply[: len(question.answer)] == question.answer
                line.setdefault("tasks", {})[question.task] = [int(right), 0.0]
                if choice.question == DECODED:
                    line["compressions"] = output.kv_compress.compressions
            for mode in modes if choice.policy == FULL else [choice.question]:
                yield from (line | {"mode": mode} for line in lines.values())
        del engine


def _line(sample: Sample, choice: Choice, shields: Shields) -> dict[str, Any]:
    options = [choice.options] if choice.options else []
    if choice.allocator != "auto" and choice.policy != FULL:
        options.append(f"allocator={choice.allocator}")
    name = ":".join([choice.policy, *filter(None, [",".join(options)])])
    return {
        "source": sample.source, "length": sample.length, "seed": sample.seed, "policy": name,
        "ratio": choice.ratio, "page": measure.BLOCK_SIZE, "recent": shields.recent,
        "floor": shields.floor, "min_budget": shields.min_budget, "engine": True,
    }  # fmt: skip
