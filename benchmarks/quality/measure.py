# SPDX-License-Identifier: Apache-2.0
"""One engine answers the questions of many cells."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from benchmarks.quality import longbench
from benchmarks.quality.cells import DECODED, FULL, HIDDEN, Cell, Choice, config_of, runs
from benchmarks.quality.prompts import GIVEN, Prompt, Prompts
from kvcompress_vllm import policies
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.integration.start.flags import KEY as KV_COMPRESS

BLOCK_SIZE = 16
SWAPPED = ("policy", "policy_options", "allocator", "pool", "window", "ratio", "budget_tokens")
"""Options that change between two calls of a running engine."""
CACHE_SHARE = 0.5
"""Of the KV cache, for the prompts of a slice: the prefix cache then computes each only once."""
FEWEST = 8
"""Samples of each task in a slice."""
RECORDED = 8
"""Samples of each task whose kept pages are recorded."""


@dataclass(frozen=True)
class Settings:
    """What is common to all cells of a run; JSON-serialisable.

    Attributes:
        base: options as ``key=value,...``.
        llm: further arguments of the engine.
        record: whether results say how many pages were kept.
    """

    model: str
    base: str = ""
    llm: Mapping[str, Any] | None = None
    record: bool = False
    longbench: tuple[str, ...] = ()
    templates: str | None = None

    def data_sets(self) -> dict[str, longbench.DataSet]:
        """Rows of the LongBench-format files."""
        files = [Path(file) for file in self.longbench]
        return longbench.read(files, Path(self.templates) if self.templates else None)


def engine_of(choice: Choice, base: str) -> str:
    """Choices with the same answer can share an engine: the options it is started with, as JSON."""
    config = config_of(choice, base)
    options = config.to_dict()
    kept = {key: options[key] for key in sorted(options) if key not in SWAPPED}
    return json.dumps(kept | {"policy": _started_with(config)})


def _started_with(config: KVCompressConfig) -> str:
    """A policy that makes the scheduler observe what this one needs."""
    if config.exact != "off":
        return config.policy
    policy = policies.find(config.policy)
    if not (config.query_stride and policy.observes_all):
        return "streaming"
    alike = (
        name for name in policies.observing_all() if policies.find(name).history == policy.history
    )
    return next(alike, config.policy)


def by_engine(cells: Iterable[Cell], base: str) -> list[list[Cell]]:
    """The cells of each engine that is needed; any of them can answer for the full cache.

    Raises:
        ValueError: options that are not accepted.
    """
    engines: dict[str, list[Cell]] = {}
    full = []
    for cell in cells:
        if cell.policy == FULL:
            full.append(cell)
        else:
            engines.setdefault(engine_of(cell.choice, base), []).append(cell)
    groups = list(engines.values())
    if full:
        groups[:1] = [full + (groups[0] if groups else [])]
    return groups


def start(settings: Settings, cells: Iterable[Cell]) -> Any:
    """The engine for cells of one :func:`by_engine` group."""
    from kvcompress_vllm import LLM

    # The full cache needs nothing: any other policy will do to start.
    choices = {cell.choice for cell in cells if cell.policy != FULL} or {Choice("streaming")}
    widest = max(config_of(choice, settings.base).window for choice in choices)
    (engine,) = {engine_of(choice, settings.base) for choice in choices}
    options = _with_echo(json.loads(engine), choices, settings.base)
    arguments = {
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        **(settings.llm or {}),
    }
    llm = LLM(
        settings.model,
        # Every sample is compressed itself, so that its kept keys are recorded; except where only
        # what is shared can be compressed so.
        kv_compress={
            **options,
            "share": "off" if options.get("exact", "off") == "off" else "context",
            "window": widest,
        },
        worker_extension_cls="benchmarks.quality.worker.QualityWorker",
        **arguments,
    )
    if any(choice.question == DECODED for choice in choices):
        llm.collective_rpc("quality_force")
    return llm


def _with_echo(options: dict[str, Any], choices: Iterable[Choice], base: str) -> Mapping[str, Any]:
    """Options of an engine that stores echo scores if a choice reads them."""
    started = KVCompressConfig.from_dict(options)
    reading = sorted({c.policy for c in choices if config_of(c, base).reads_echo()})
    if not reading or started.stores_echo:
        return options
    return options | {"allow_policies": [*started.allowed_policies(), *reading]}


def configure(llm: Any, choice: Choice, base: str) -> None:
    """Have the engine compress as the choice says.

    The front end resolves the budgets of requests, which name the policy, and the workers have its
    options; the scheduler goes by the budgets.
    """
    if choice.policy == FULL:
        return
    options = config_of(choice, base).to_dict()
    llm.collective_rpc("quality_configure", args=(options,))
    processor = llm.llm_engine.input_processor
    # A copy: an engine core in this process has the same object, which says how it was started.
    processor.vllm_config = copy.copy(processor.vllm_config)
    additional = processor.vllm_config.additional_config
    processor.vllm_config.additional_config = {**additional, KV_COMPRESS: options}


def request(choice: Choice, prompt: Prompt) -> Any:
    """``SamplingParams`` of one sample."""
    from vllm import SamplingParams

    extra: dict[str, Any] = {"kv_compress": False}
    if choice.policy != FULL:
        extra = {"kv_compress_ratio": choice.ratio}
        if choice.question == HIDDEN:
            extra["kv_compress_context_tokens"] = prompt.context_tokens
    forced = generated(choice, prompt)
    plain = prompt.metric == "nats"
    if forced:
        from benchmarks.quality.forcing import KEY

        extra[KEY] = forced
    return SamplingParams(
        temperature=0,
        max_tokens=len(forced) if forced and plain else len(forced) + prompt.max_tokens,
        min_tokens=len(forced),  # chat templates hold what ends an output otherwise
        logprobs=0 if forced and plain else None,
        prompt_logprobs=0 if plain and not forced else None,
        flat_logprobs=True,
        detokenize=False,
        extra_args=extra,
    )


def generated(choice: Choice, prompt: Prompt) -> list[int]:
    """What the engine is made to generate of a sample.

    Raises:
        ValueError: it is too short to generate anything.
    """
    if choice.question != DECODED:
        return []
    if len(prompt.tokens) <= GIVEN:
        raise ValueError(
            f"a sample of {len(prompt.tokens)} tokens is not accepted with the question decoded; "
            f"it must have more than the {GIVEN} that are the prompt"
        )
    return prompt.tokens[GIVEN:]


def generate(llm: Any, choice: Choice, prompts: list[Prompt]) -> list[Any]:
    """The outputs, in order."""
    from vllm.inputs import TokensPrompt

    given = [
        prompt.tokens[: len(prompt.tokens) - len(generated(choice, prompt))] for prompt in prompts
    ]
    return llm.generate(  # type: ignore[no-any-return]
        [TokensPrompt(prompt_token_ids=tokens) for tokens in given],
        [request(choice, prompt) for prompt in prompts],
        use_tqdm=False,
    )


def measure(
    llm: Any,
    settings: Settings,
    missing: Mapping[Cell, Sequence[int]],
    most_tokens: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Ask an engine, and yield lines of results.

    Args:
        llm: see :func:`start`.
        missing: seeds to measure by cell (row numbers for files).
        most_tokens: of the prompts that are asked about together; None: what the cache holds.
    """
    tokenizer = llm.get_tokenizer()
    config = llm.llm_engine.vllm_config
    if most_tokens is None:
        blocks = config.cache_config.num_gpu_blocks
        most_tokens = int(CACHE_SHARE * blocks * config.cache_config.block_size)
    max_len = config.model_config.max_model_len
    prompts = Prompts(settings.model, tokenizer, max_len, settings.data_sets())
    kinds = {(cell.task, cell.length) for cell in missing}
    size = max(FEWEST, most_tokens // sum(length or max_len for _, length in kinds))
    seeds = sorted({seed for wanted in missing.values() for seed in wanted})
    for begin in range(0, len(seeds), size):
        some = {*seeds[begin : begin + size]}
        known: dict[tuple[str, int, int], Prompt] = {}
        for choice, cells in groupby(sorted(missing), key=lambda cell: cell.choice):
            items = []
            for cell in cells:
                for seed in sorted(some.intersection(missing[cell])):
                    key = cell.task, cell.length, seed
                    if key not in known:
                        known[key] = prompts.get(*key)
                    items.append((cell, seed, known[key]))
            if items:
                configure(llm, choice, settings.base)
                yield from answers(llm, choice, items, settings.record)


def answers(
    llm: Any, choice: Choice, items: list[tuple[Cell, int, Prompt]], record: bool
) -> Iterator[dict[str, Any]]:
    """Ask an engine that is configured for the choice; yield lines of results."""
    first, rest = [], []
    counts: Counter[Cell] = Counter()
    for item in items:
        counts[item[0]] += 1
        recorded = record and choice.policy != FULL and counts[item[0]] <= RECORDED
        (first if recorded else rest).append(item)
    scores: dict[tuple[Cell, int], float] = {}
    times: dict[Cell, list[int]] = {}
    shares: dict[Cell, list[list[list[float]]]] = {}
    tokenizer = llm.get_tokenizer()
    for asked in (first, rest):
        if asked is first and first:
            llm.collective_rpc("quality_record")
        outputs = generate(llm, choice, [prompt for _, _, prompt in asked])
        if asked is first and first:
            ranks = llm.collective_rpc("quality_recorded_pages")
            for output, (cell, _, _) in zip(outputs, asked, strict=True):
                kept = kept_share(ranks, output.request_id, output.kv_compress)
                if kept:
                    shares.setdefault(cell, []).append(kept)
        for output, (cell, seed, prompt) in zip(outputs, asked, strict=True):
            scores[cell, seed] = score(output, choice, prompt, tokenizer)
            times.setdefault(cell, []).append(output.kv_compress.compressions)
    metrics = {cell: prompt.metric for cell, _, prompt in items}
    for cell in metrics:
        for some in runs(seed for c, seed in scores if c == cell):
            line: dict[str, Any] = cell._asdict() | {
                "metric": metrics[cell],
                "first_seed": some[0],
                "scores": [round(scores[cell, seed], 4) for seed in some],
            }
            if choice.question == DECODED:
                line["compressions"] = round(sum(times[cell]) / len(times[cell]), 1)
            if shares.get(cell):
                maps = shares.pop(cell)
                line |= {"kept_samples": len(maps), "kept": _mean(maps)}
            yield line


def score(output: Any, choice: Choice, prompt: Prompt, tokenizer: Any) -> float:
    """Of one output; nats per token where the prompt is plain text.

    Raises:
        RuntimeError: the engine did not generate what it was made to.
    """
    forced = generated(choice, prompt)
    tokens = list(output.outputs[0].token_ids)
    if tokens[: len(forced)] != forced:
        raise RuntimeError(f"{output.request_id} did not generate the {len(forced)} tokens given")
    if prompt.metric == "nats":
        known = output.outputs[0].logprobs if forced else output.prompt_logprobs
        first = len(prompt.tokens) - len(forced) if forced else 0
        found = [known[i - first][prompt.tokens[i]].logprob for i in prompt.measured]
        return -math.fsum(found) / len(found)
    reply = tokenizer.decode(tokens[len(forced) :], skip_special_tokens=True)
    return prompt.score(reply, ended=output.outputs[0].finish_reason == "stop")


def kept_share(
    ranks: list[dict[str, list[list[int]]]], request_id: str, usage: Any
) -> list[list[float]] | None:
    """Pages kept by the last compression of those there would be, ``[L][H]`` over all ranks; None:
    not compressed.

    Args:
        usage: the output's ``kv_compress``.
    """
    pages = by_request(ranks, request_id)
    if not pages:
        return None
    every = [*chain(*pages)]
    # All blocks but those of the tail, which are no pages of the last compression.
    blocks = usage.blocks_before - usage.blocks_after + sum(every) // len(every)
    return [[count / blocks for count in heads] for heads in pages]


def by_request(ranks: list[dict[str, Any]], request_id: str) -> Any:
    """What the ranks recorded of a request, ``[L][H]``, the heads of all ranks side by side.

    vLLM appends a random word to the ids of requests.
    """
    found = [
        layers
        for rank in ranks
        for name, layers in rank.items()
        if name == request_id or name.rpartition("-")[0] == request_id
    ]
    return [[*chain(*heads)] for heads in zip(*found, strict=True)] or None


def _mean(maps: list[list[list[float]]]) -> list[list[float]]:
    return [
        [round(sum(values) / len(maps), 3) for values in zip(*heads, strict=True)]
        for heads in zip(*maps, strict=True)
    ]


def main() -> None:
    """Reads settings and cells as JSON on stdin; writes one JSON line per result."""
    given = json.load(sys.stdin)
    missing = {Cell(*cell): seeds for cell, seeds in given["missing"]}
    settings = Settings(**given["settings"])
    for line in measure(start(settings, missing), settings, missing):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
