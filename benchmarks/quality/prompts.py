# SPDX-License-Identifier: Apache-2.0
"""Samples as token ids, with the place where the context ends and the question begins."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import longbench, scores
from benchmarks.quality.cells import PERPLEXITY
from benchmarks.retrieval import TASKS, TaskGen
from benchmarks.retrieval.vocab import ASSISTANT, USER

TINY = Path(__file__).parents[2] / "models" / "tiny"
CONTINUATION = 256
"""Tokens whose likelihood is measured, at the end of a text."""
GIVEN = 64
"""Tokens of a sample that are the prompt where the rest is generated. Fewer than min_prompt_tokens
by default, so that nothing is compressed but what was generated."""
ROOM = 4
"""Tokens that an answer may be longer than the right one."""
ROOM_TO_CHAT = 48
ATTEMPTS = 5
"""At the length of a sample in another model's tokens."""
BRIEF = "\nReply with the answer and nothing else."
"""Added for models that were not trained on these tasks."""


@dataclass(frozen=True)
class Prompt:
    """One sample.

    Attributes:
        context_tokens: how many of ``tokens`` are compressed before the question is read.
        metric: ``exact`` (the reply is the answer), ``recall`` (share of ``answers`` that occur in
            the reply), ``nats`` (per token after the context) or one of LongBench's.
    """

    tokens: list[int]
    context_tokens: int
    answers: tuple[str, ...]
    max_tokens: int
    metric: str
    classes: tuple[str, ...] = ()
    first_line: bool = False
    """Only that of the reply counts."""

    @property
    def measured(self) -> range:
        """Positions of plain text whose likelihood counts: those predicted from a compressed
        context. The first one after it is still predicted from all of it."""
        return range(self.context_tokens + 1, len(self.tokens))

    def score(self, reply: str, ended: bool) -> float:
        """Of a reply; ``ended``: the model ended it, not ``max_tokens``."""
        if self.metric == "exact":
            # The whole answer and then the end of text: a longer one would be wrong.
            return float(ended and reply.strip() == self.answers[0])
        if self.metric == "recall":
            found = [scores.recall(reply, answer) for answer in self.answers]
            return sum(found) / len(found)
        if self.first_line:
            reply = reply.lstrip("\n").split("\n")[0]
        return scores.best(self.metric, reply, self.answers, self.classes)


class Prompts:
    """Samples for one model: the generator's, plain text, and rows of LongBench-format files.

    Args:
        model: folder or name of the model; the bundled ones understand the tasks as they are,
            others get them through their chat template.
        tokenizer: of the model.
        max_len: tokens of the longest prompt and reply; longer files are cut in the middle.
        rows: of the files, by data set.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        max_len: int,
        rows: Mapping[str, longbench.DataSet] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_len = max_len
        self._rows = rows or {}
        marks = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
        self.native = marks == [USER, ASSISTANT]
        self._generator = TaskGen.load(model if self.native else TINY)

    def get(self, task: str, length: int, seed: int) -> Prompt:
        """A sample, the same on every call.

        Raises:
            ValueError: there is no such task, or the sample is too long for the model.
        """
        if task in self._rows:
            prompt = self._row(self._rows[task], seed)
        elif task == PERPLEXITY:
            prompt = self._fitted(length, lambda size: self._text(size, seed))
        else:
            prompt = self._fitted(length, lambda size: self._retrieval(task, size, seed))
        if len(prompt.tokens) + prompt.max_tokens > self._max_len:
            raise ValueError(
                f"sample {seed} of {task} at {length} has {len(prompt.tokens)} tokens and "
                f"{prompt.max_tokens} to answer; the model takes {self._max_len} together"
            )
        return prompt

    def _fitted(self, length: int, make: Callable[[int], Prompt]) -> Prompt:
        """What ``make`` gives with at most ``length`` of the model's own tokens, nearly as many.

        The generator counts tokens of the bundled models, of which most others need fewer.
        """
        if self.native:
            return make(length)
        size, prompts = length, []
        for _ in range(ATTEMPTS):
            prompts.append(make(size))
            have = len(prompts[-1].tokens)
            if 0.97 * length <= have <= length:
                break
            size = max(1, int(0.99 * size * length / have))
        # Some tasks have a least length.
        short = [prompt for prompt in prompts if len(prompt.tokens) <= length]
        return max(short or prompts[-1:], key=lambda prompt: len(prompt.tokens))

    def _retrieval(self, task: str, length: int, seed: int) -> Prompt:
        text, answer = self._generator.task(task, length, seed)
        text = text.removeprefix("<|user|>").removesuffix("<|assistant|>")
        cut = text.rindex("\n")  # questions have one line
        if self.native:
            tokens, context = self._chat(text[:cut], text[cut:])
            room = len(self._encode(answer)) + ROOM
            return Prompt(tokens, context, (answer,), room, "exact")
        tokens, context = self._chat(text[:cut], text[cut:] + BRIEF)
        room = len(self._encode(answer)) + ROOM_TO_CHAT
        return Prompt(tokens, context, parts(task, answer), room, "recall")

    def _text(self, length: int, seed: int) -> Prompt:
        text = self._generator.text(length, seed)
        tokens = self._start() + self._encode(text)
        if len(tokens) < 2 * CONTINUATION:
            raise ValueError(
                f"{PERPLEXITY} at {length} tokens is not accepted; with text of {len(tokens)} "
                f"tokens too little comes before the {CONTINUATION} that are measured"
            )
        return Prompt(tokens, len(tokens) - CONTINUATION, (), 1, "nats")

    def _row(self, rows: longbench.DataSet, index: int) -> Prompt:
        form, row = rows.form, rows.rows[index]
        before, after = form.render(row)
        if form.chat and self._tokenizer.chat_template:
            tokens, context = self._chat(before, after)
        else:
            head = self._start() + self._encode(before)
            tokens, context = head + self._encode(after), len(head)
        tokens, context = longbench.truncated(tokens, context, self._max_len - form.max_tokens)
        return Prompt(
            tokens,
            min(context, len(tokens) - 1),  # where nothing is asked: at least a token is read
            tuple(row["answers"]),
            form.max_tokens,
            form.metric,
            tuple(row["all_classes"] or ()),
            form.first_line,
        )

    def _chat(self, context: str, question: str) -> tuple[list[int], int]:
        """Token ids of one user message, and how many of them come before the question.

        Both parts are encoded apart, so that no token spans them.
        """
        content = context + question
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        # Templates strip what they are given.
        start = text.index(content.strip()) - (len(content) - len(content.lstrip()))
        cut = max(0, start + len(context))
        head = self._encode(text[:cut])
        return head + self._encode(text[cut:]), len(head)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _start(self) -> list[int]:
        """What stands before plain text."""
        start = self._tokenizer.bos_token_id
        return [] if start is None else [start]


def parts(task: str, answer: str) -> tuple[str, ...]:
    """What a free reply must name to be right."""
    if task.startswith("vt"):
        return tuple(re.split(r" = |, ", answer))
    if task == "multivalue":
        return tuple(answer.split(", "))
    if task == "multiquery":
        return tuple(item.rpartition(": ")[2] for item in answer.split("; "))
    return (answer,)


def check_tasks(tasks: Sequence[str], data_sets: Sequence[str] = ()) -> None:
    """Refuse unknown tasks.

    Raises:
        ValueError: naming the task and what is accepted.
    """
    known = [*TASKS, PERPLEXITY, *data_sets]
    for task in tasks:
        if task not in known and not re.fullmatch(r"(kv|vt)[1-9]\d*", task):
            raise ValueError(f"no task {task!r}; there are {', '.join(known)}, kvN and vtN")
