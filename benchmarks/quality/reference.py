# SPDX-License-Identifier: Apache-2.0
"""The engine against a literal implementation, policy by policy.

    python -m benchmarks.quality.reference --policies all --tasks single,kv40 --questions visible

The same samples go through the engine (fp32) and through ``transformers`` (fp32, attention written
out below): the literal formulas of ``tests/policies/literal.py`` score the keys in fp64, plain
sorting chooses them, the others are masked per (layer, KV head), and decoding is greedy. Compared
are the kept keys of every head and the answers' tokens.

Each difference is explained, or counted as unexplained. In fp32, keys (and pages of heads that
compete) whose scores differ by rounding may be ordered otherwise, and a share of a budget may be
rounded otherwise. An answer that differs is decoded again with the engine's keys: if it is the
engine's then, it is the kept keys that differ.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from benchmarks.quality.cells import HIDDEN, PERPLEXITY, VISIBLE, Cell, Choice, config_of
from benchmarks.quality.measure import (
    BLOCK_SIZE,
    Settings,
    by_engine,
    by_request,
    configure,
    generate,
    score,
    start,
)
from benchmarks.quality.prompts import TINY, Prompt, Prompts, check_tasks
from benchmarks.quality.report import label
from kvcompress_vllm import policies
from kvcompress_vllm.config.options import KVCompressConfig
from tests.policies import literal, prompts
from tests.policies.test_parity import HEAD_WEIGHTS, LAYER_WEIGHTS, SAME_SCORE, accepted

BASE = "sinks=4,recent=32,query_stride=0"
COMPARED = (VISIBLE, HIDDEN)
"""Question modes with one compression."""
ALL_QUERIES = "query_stride=1"
"""For policies that judge by all queries, beside the last window alone."""
SAME_NATS = 1e-4
TOLERANCE = 1e-4
"""Relative: scores closer than this may be ordered either way in fp32."""

SHARE_TOLERANCE = 1e-5
"""Relative, of a share of the budget."""

Kept = list[list[int]]
"""Kept key positions of every (layer, KV head) in order."""


class Reference:
    """A causal LM of ``transformers`` whose attention can be told which keys were dropped."""

    def __init__(self, model: str) -> None:
        AttentionInterface.register("kv_compress_reference", self._attention)
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="kv_compress_reference"
        )
        config = self._model.config
        self._end = config.eos_token_id
        self._kept: Tensor | None = None
        self._length = 0
        self._seen: list[tuple[Tensor, ...]] | None = None

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> tuple[literal.Attention, DynamicCache, Tensor]:
        """Prefill with full attention.

        Returns:
            What every head saw, the cache, and the logits ``[V]`` of the next token.
        """
        cache = DynamicCache()
        self._seen, self._kept, self._length = [], None, len(tokens)
        logits = self._model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1]
        parts = [torch.stack(part).double() for part in zip(*self._seen, strict=True)]
        self._seen = None
        return literal.Attention(*parts), cache, logits

    @torch.inference_mode()
    def go_on(self, cache: DynamicCache, kept: Kept, tokens: Sequence[int]) -> Tensor:
        """Logits ``[T, V]`` after each of further tokens, over what was kept.

        Args:
            cache: of :meth:`read`; grows by the tokens.
            kept: keys that survive, of the whole blocks that :meth:`read` saw; the others do.
        """
        layers = len(cache.layers)
        mask = torch.zeros(len(kept), self._length, dtype=torch.bool)
        mask[:, self._length // prompts.BLOCK * prompts.BLOCK :] = True
        for row, keys in zip(mask, kept, strict=True):
            row[keys] = True
        self._kept = mask.view(layers, -1, self._length)
        logits: Tensor = self._model(torch.tensor([tokens]), past_key_values=cache).logits[0]
        self._kept = None
        return logits

    def answer(
        self,
        cache: DynamicCache,
        logits: Tensor,
        kept: Kept,
        rest: Sequence[int],
        max_tokens: int,
    ) -> list[int]:
        """Greedy tokens, the end of text included.

        Args:
            cache: of the last :meth:`read`; not changed.
            logits: of :meth:`read`.
            kept: see :meth:`go_on`.
            rest: tokens of the prompt that are read after the others were dropped.
        """
        cache = copy.deepcopy(cache)
        if rest:
            logits = self.go_on(cache, kept, rest)[-1]
        tokens = [int(logits.argmax())]
        while len(tokens) < max_tokens and tokens[-1] != self._end:
            logits = self.go_on(cache, kept, tokens[-1:])[-1]
            tokens.append(int(logits.argmax()))
        return tokens

    def nats(self, cache: DynamicCache, kept: Kept, rest: Sequence[int]) -> float:
        """Mean negative log likelihood of ``rest`` but for its first token; ``cache`` stays."""
        logits = self.go_on(copy.deepcopy(cache), kept, rest[:-1])
        likely = logits.double().log_softmax(-1)
        return -float(likely.gather(1, torch.tensor(rest[1:])[:, None]).mean())

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Of one sequence: query ``[1, H * G, T, D]``, key and value ``[1, H, S, D]``."""
        heads, keys = key.shape[1:3]
        queries = query[0].unflatten(0, (heads, -1))  # [H, G, T, D]
        logits = queries @ key[0, :, None].mT * scaling
        num = logits.shape[2]
        future = torch.ones(num, keys, dtype=torch.bool).triu(keys - num + 1)
        logits = logits.masked_fill(future, -torch.inf)
        if self._kept is not None:
            dropped = ~self._kept[module.layer_idx]  # [H, P]
            old = logits[..., : dropped.shape[1]]
            old.masked_fill_(dropped[:, None, None], -torch.inf)
        p = logits.softmax(-1)
        if self._seen is not None:
            self._seen.append((key[0], value[0], queries, p))
        out = (p @ value[0, :, None]).flatten(0, 1)
        return out.transpose(0, 1)[None].contiguous(), p.flatten(0, 1)[None]


@dataclass
class Comparison:
    """Of one policy and question mode, over samples."""

    samples: int = 0
    same_answers: int = 0
    heads: int = 0
    same_heads: int = 0
    keys: int = 0
    swapped: int = 0
    """Keys that one side keeps in place of another of the same head."""
    moved: int = 0
    """Pages that another head keeps."""
    unexplained: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str, explained: bool) -> None:
        """A difference."""
        (self.notes if explained else self.unexplained).append(text)


@dataclass(frozen=True)
class Asked:
    """A sample and what the engine made of it."""

    choice: Choice
    task: str
    seed: int
    prompt: Prompt
    kept: Kept
    tokens: list[int]
    nats: float | None = None
    """Of plain text, instead of an answer."""

    @property
    def compressed(self) -> int:
        """Tokens of the prompt that are read before the compression; of a context whole blocks."""
        if self.choice.question == HIDDEN:
            return self.prompt.context_tokens // BLOCK_SIZE * BLOCK_SIZE
        return len(self.prompt.tokens)


def ask(
    llm: Any, settings: Settings, choices: Sequence[Choice], samples: Sequence[tuple[str, int, int]]
) -> Iterator[Asked]:
    """Ask an engine everything; (task, length, seed) each. Plain text only where it is hidden."""
    tokenizer = llm.get_tokenizer()
    max_len = llm.llm_engine.vllm_config.model_config.max_model_len
    source = Prompts(settings.model, tokenizer, max_len)
    for choice in choices:
        mine = [s for s in samples if s[0] != PERPLEXITY or choice.question == HIDDEN]
        given = [source.get(*sample) for sample in mine]
        configure(llm, choice, settings.base)
        llm.collective_rpc("quality_record")
        outputs = generate(llm, choice, given)
        ranks = llm.collective_rpc("quality_recorded")
        for (task, _, seed), prompt, output in zip(mine, given, outputs, strict=True):
            kept = [keys for heads in by_request(ranks, output.request_id) for keys in heads]
            tokens = list(output.outputs[0].token_ids)
            nats = score(output, choice, prompt, tokenizer) if prompt.metric == "nats" else None
            yield Asked(choice, task, seed, prompt, kept, tokens, nats)


def compare(settings: Settings, asked: Sequence[Asked]) -> dict[Choice, Comparison]:
    """The comparison of every choice."""
    reference = Reference(settings.model)
    results = {item.choice: Comparison() for item in asked}

    def place(item: Asked) -> tuple[str, int, int]:
        return item.task, item.seed, item.compressed

    for (task, seed, compressed), items in groupby(sorted(asked, key=place), key=place):
        first, *others = items
        attention, cache, logits = reference.read(first.prompt.tokens[:compressed])
        for item in tqdm([first, *others], desc=f"{task} {seed}", leave=False, disable=None):
            result, name = results[item.choice], f"{task} {seed}"
            config = config_of(item.choice, settings.base)
            wanted, scores = expected(config, attention)
            compare_kept(config, attention, item.kept, wanted, scores, name, result)
            compare_answer(reference, cache, logits, item, wanted, name, result)
    return results


def compare_answer(
    reference: Reference,
    cache: DynamicCache,
    logits: Tensor,
    item: Asked,
    wanted: Kept,
    name: str,
    result: Comparison,
) -> None:
    """Count into ``result``; explain a difference by the kept keys, if it is theirs."""
    rest, most = item.prompt.tokens[item.compressed :], item.prompt.max_tokens
    result.samples += 1
    because = "because of the kept keys"
    if item.nats is not None:
        nats = reference.nats(cache, wanted, rest)
        same = abs(nats - item.nats) < SAME_NATS
        result.same_answers += same
        if not same:
            again = reference.nats(cache, item.kept, rest)
            explained = abs(again - item.nats) < SAME_NATS
            text = f"{name}: {item.nats:.5f} nats, literally {nats:.5f}"
            result.note(f"{text}, {because}" if explained else text, explained)
        return
    tokens = reference.answer(cache, logits, wanted, rest, most)
    result.same_answers += tokens == item.tokens
    if tokens != item.tokens:
        explained = reference.answer(cache, logits, item.kept, rest, most) == item.tokens
        text = f"{name}: answer {item.tokens}, literally {tokens}"
        result.note(f"{text}, {because}" if explained else text, explained)


def compare_kept(
    config: KVCompressConfig,
    attention: literal.Attention,
    kept: Kept,
    wanted: Kept,
    scores: Tensor,
    name: str,
    result: Comparison,
) -> None:
    """Count what differs into ``result``, and explain it.

    Args:
        scores: ``[L * H, n]`` literal scores.
    """
    setting = prompts.setting(config, attention.length)
    shielded = setting.shielded(attention.length)
    block = setting.block
    gained: list[float] = []
    lost: list[float] = []
    for index, (mine, theirs) in enumerate(zip(kept, wanted, strict=True)):
        result.heads += 1
        result.keys += len(theirs)
        result.same_heads += mine == theirs
        score = scores[index].tolist()
        pages = len(mine) // block - len(theirs) // block
        if pages:
            order = sorted(range(len(score)), key=lambda j: (shielded[j], score[j], j))
            few, many = sorted((len(mine), len(theirs)))
            # Dearest first: the page that goes last costs most.
            costs = [score[order[len(order) - size - 1]] for size in range(few, many, block)]
            (gained if pages > 0 else lost).extend(costs)
            result.moved += max(0, pages)
        extra, missing = {*mine} - {*theirs}, {*theirs} - {*mine}
        swapped = min(len(extra), len(missing))
        if not swapped:
            continue
        result.swapped += swapped
        ours = sorted(score[j] for j in extra)[-swapped:]
        others = sorted(score[j] for j in missing)[-swapped:]
        gap = max(map(distance, ours, others))
        where = f"{name}, head {index}: {swapped} keys, scores {gap:.1e} apart"
        result.note(where, gap < TOLERANCE)
    if gained or lost:
        gap = max((distance(a, b) for a in gained for b in lost), default=torch.inf)
        where = f"{name}: {len(gained)} pages moved, costs {gap:.1e} apart"
        if rounded_otherwise(config, attention, scores, kept, wanted):
            result.note(f"{name}: {len(gained)} pages moved, a share was rounded otherwise", True)
        else:
            result.note(where, gap < TOLERANCE)


def literal_setting(config: KVCompressConfig, length: int) -> literal.Setting:
    """The literal formulas judge by a window: of all queries, where the policy does."""
    setting, policy = prompts.setting(config, length), policies.find(config.policy)
    if policy.observes_all and config.query_stride:
        if config.query_stride != 1:
            raise ValueError("there are no literal formulas for a sample of the queries")
        setting.window = min(length, policy.history or length)
    return setting


def shares(config: KVCompressConfig, attention: literal.Attention) -> dict[str, Any]:
    """Literal weights of layers and heads, where the policy has some."""
    setting = literal_setting(config, attention.length)
    weights = {}
    for name, known in (("layer_weights", LAYER_WEIGHTS), ("head_weights", HEAD_WEIGHTS)):
        function = known.get(config.policy)
        if function is not None:
            weights[name] = function(
                attention, setting, **accepted(function, config.policy_options)
            )
    return weights


def expected(config: KVCompressConfig, attention: literal.Attention) -> tuple[Kept, Tensor]:
    """Kept keys, and the scores ``[L * H, n]`` by which they were chosen."""
    setting = literal_setting(config, attention.length)
    function = SAME_SCORE.get(config.policy) or getattr(literal, config.policy)
    scores = function(attention, setting, **accepted(function, config.policy_options))
    weights = shares(config, attention)
    kept = literal.kept_keys(attention, setting, scores, config.allocator, **weights)
    return kept, scores.flatten(0, 1)


def rounded_otherwise(
    config: KVCompressConfig,
    attention: literal.Attention,
    scores: Tensor,
    kept: Kept,
    wanted: Kept,
) -> bool:
    """Whether shares that differ by a rounding error give every head what it kept."""
    setting, (layers, heads) = prompts.setting(config, attention.length), attention.keys.shape[:2]
    nudges = torch.tensor([len(k) - len(w) for k, w in zip(kept, wanted, strict=True)]).sign()
    nudges = 1 + SHARE_TOLERANCE * nudges.view(layers, heads).double()
    nudge = {"layer_weights": nudges.mean(1), "head_weights": nudges}
    weights = {
        name: (torch.tensor(own, dtype=torch.float64) * nudge[name]).tolist()
        for name, own in shares(config, attention).items()
    }
    each = scores.view(layers, heads, -1)
    again = literal.kept_keys(attention, setting, each, config.allocator, **weights)
    return [len(keys) for keys in again] == [len(keys) for keys in kept]


def distance(a: float, b: float) -> float:
    """Relative."""
    return abs(a - b) / max(abs(a), abs(b), 1e-9)


def print_row(choice: Choice, result: Comparison) -> None:
    print(
        f"{label(choice):>30} {choice.question:>8} {result.same_answers:>5}/{result.samples:<3}"
        f"{result.same_heads:>6}/{result.heads:<5} {result.swapped:>6}/{result.keys:<7}"
        f"{result.moved:>6} {len(result.unexplained):>12}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=str(TINY), help="a Llama; default: the bundled model")
    parser.add_argument("--policies", default="all")
    parser.add_argument("--allocators", default="auto")
    parser.add_argument("--tasks", default="single,multikey,kv40,qa")
    parser.add_argument("--length", type=int, default=1500)
    parser.add_argument("--samples", type=int, default=1, help="per task")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--ratio", type=float, default=6.0)
    parser.add_argument("--questions", default=",".join(COMPARED))
    args = parser.parse_args()
    for question in args.questions.split(","):
        if question not in COMPARED:
            parser.error(
                f"--questions {question!r} is not accepted; it must be one of {', '.join(COMPARED)}"
            )
    names = policies.BUILT_IN if args.policies == "all" else args.policies.split(",")
    choices = [
        Choice(policy, allocator, args.ratio, question, options)
        for policy in names
        for options in ("", *[ALL_QUERIES] * policies.find(policy).observes_all)
        for allocator in args.allocators.split(",")
        for question in args.questions.split(",")
    ]
    seeds = range(args.first_seed, args.first_seed + args.samples)
    samples = [(task, args.length, seed) for task in args.tasks.split(",") for seed in seeds]
    settings = Settings(args.model, BASE, {"dtype": "float32"})
    cells = [Cell(*choice, *sample[:2]) for choice in choices for sample in samples]
    asked: list[Asked] = []
    try:
        check_tasks(args.tasks.split(","))
        groups = by_engine(cells, settings.base)
    except ValueError as error:
        parser.error(str(error))
    for group in groups:
        llm = start(settings, group)
        asked += ask(llm, settings, list(dict.fromkeys(c.choice for c in group)), samples)
        llm.llm_engine.engine_core.shutdown()
    results = compare(settings, asked)
    print(
        f"{'policy':>30} {'question':>8}   answers  heads equal  keys swapped  pages  unexplained"
    )
    for choice, result in results.items():
        print_row(choice, result)
    for choice, result in results.items():
        for text in result.unexplained:
            print(f"{label(choice)} {choice.question}: UNEXPLAINED {text}")
        for text in result.notes:
            print(f"{label(choice)} {choice.question}: {text}")


if __name__ == "__main__":
    main()
