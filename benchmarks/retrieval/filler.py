# SPDX-License-Identifier: Apache-2.0
"""What the facts hide in: natural text, or sentences made from templates."""

from __future__ import annotations

import lzma
import random
from pathlib import Path

import numpy as np

from .vocab import BOS, EOS, Positions, Tokens, Vocab, join
from .words import ADJECTIVES, NOUNS, PLACES, PLAIN_SENTENCES, VERBS

MIN_FILLER = 24
"""Tokens; a smaller budget is left empty."""
_NOTHING: tuple[Tokens, Positions] = (np.zeros(0, np.uint16), np.zeros(0, np.int64))


class NaturalText:
    """Documents as one token stream, with the places where it may be cut.

    Slices start at a line start and end at a sentence or line end, so that decoding and encoding
    again gives the same tokens.
    """

    def __init__(self, vocab: Vocab, path: Path) -> None:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            documents = file.read().split("\x0c")
        self._newline = vocab.newline
        self._ids = ids = join(*(join([BOS], vocab.encode(d), [EOS]) for d in documents))
        left, right = ids[:-1], ids[1:]
        line_end = vocab.is_newline[right] & ~vocab.is_newline[left] & ~vocab.is_special[left]
        sentence_end = vocab.ends_sentence[left] & vocab.starts_sentence[right]
        self._cuts = np.flatnonzero(line_end | sentence_end) + 1
        self._starts = 1 + np.flatnonzero(
            (vocab.is_newline[left] | (left == BOS))
            & ~vocab.is_newline[right]
            & ~vocab.is_special[right]
        )
        ends = np.flatnonzero(vocab.is_newline[ids] | vocab.is_special[ids])
        ends = ends[np.minimum(np.searchsorted(ends, self._starts), len(ends) - 1)]
        length = ends - self._starts
        prose = (
            (length >= 20)
            & (length <= 90)
            & vocab.ends_sentence[ids[np.maximum(ends - 1, 0)]]
            & vocab.is_capital[ids[self._starts]]
        )
        self._lines = np.stack([self._starts[prose], ends[prose]], 1)

    def slice(self, budget: int, rng: random.Random) -> tuple[Tokens, Positions]:
        """At most ``budget`` tokens from a random place, and the cuts in them."""
        for _ in range(20):
            start = int(self._starts[int(rng.random() * len(self._starts))])
            if start + budget >= len(self._ids):
                continue
            first = int(np.searchsorted(self._cuts, start + 1))
            last = int(np.searchsorted(self._cuts, start + budget, side="right"))
            if last <= first:
                continue
            end = int(self._cuts[last - 1])
            if end - start < 0.7 * budget and budget > 100:
                continue
            tokens = self._ids[start:end]
            bound = (tokens == BOS) | (tokens == EOS)
            tokens = np.where(bound, np.uint16(self._newline), tokens)
            return tokens, self._cuts[first:last] - start
        return _NOTHING

    def line(self, rng: random.Random) -> Tokens:
        """A line of prose of 20 to 90 tokens."""
        start, end = self._lines[int(rng.random() * len(self._lines))]
        return self._ids[start:end]


class Filler:
    """Draws filler: natural text three times in four, else template sentences."""

    def __init__(self, vocab: Vocab, natural: NaturalText) -> None:
        self.natural = natural
        self._newline = np.array([vocab.newline], np.uint16)
        self._sentences = [
            (vocab.encode(s), vocab.encode(" " + s)) for s in _template_sentences(3000)
        ]

    def draw(self, budget: int, rng: random.Random) -> tuple[Tokens, Positions]:
        """At most ``budget`` tokens, and the positions where a fact may be put in between."""
        if budget < MIN_FILLER:
            return _NOTHING
        if rng.random() < 0.75:
            return self.natural.slice(budget, rng)
        return self._templates(budget, rng)

    def _templates(self, budget: int, rng: random.Random) -> tuple[Tokens, Positions]:
        repetitive = rng.random() < 0.3
        pool = self._sentences[: len(PLAIN_SENTENCES)] if repetitive else self._sentences
        parts: list[Tokens] = []
        cuts: list[int] = []
        used, at_line_start = 0, True
        while True:
            bare, with_blank = pool[int(rng.random() * len(pool))]
            sentence = bare if at_line_start else with_blank
            if used + len(sentence) > budget:
                break
            parts.append(sentence)
            used += len(sentence)
            cuts.append(used)
            at_line_start = rng.random() < 0.15 and used + 1 < budget
            if at_line_start:
                parts.append(self._newline)
                used += 1
        if not parts:
            return _NOTHING
        if at_line_start:
            parts.pop()
        return join(*parts), np.array(cuts, np.int64)


def _template_sentences(count: int) -> list[str]:
    """The plain sentences, then ``count`` made from words; the same ones every time."""
    rng = random.Random(12345)
    pick = rng.choice
    sentences = list(PLAIN_SENTENCES)
    for _ in range(count):
        kind = rng.random()
        adjective, noun, place = pick(ADJECTIVES), pick(NOUNS), pick(PLACES)
        if kind < 0.35:
            text = f"The {adjective} {noun} {pick(VERBS)} the {pick(NOUNS)} near the {place}."
        elif kind < 0.6:
            text = (f"In the {place}, a {adjective} {noun} {pick(VERBS)} the {pick(ADJECTIVES)} "
                    f"{pick(NOUNS)}.")  # fmt: skip
        elif kind < 0.8:
            text = (f"Every {pick(NOUNS)} {pick(VERBS)} a {adjective} {noun}, but no {pick(NOUNS)} "
                    f"{pick(VERBS)} the {place}.")  # fmt: skip
        else:
            text = (f"A {noun} in the {place} is {adjective} and the {pick(NOUNS)} is "
                    f"{pick(ADJECTIVES)}.")  # fmt: skip
        sentences.append(text)
    return sentences
