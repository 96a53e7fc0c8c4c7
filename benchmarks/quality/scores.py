# SPDX-License-Identifier: Apache-2.0
"""Scores of a reply, 0 to 1. Those of LongBench follow the rules of its evaluation."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Score = Callable[[str, str, Sequence[str]], float]
"""Of a reply against one answer; the last argument is all classes, where there are any."""


def recall(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Whether the answer occurs in the reply."""
    return float(answer.lower() in reply.lower())


def f1(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Of the words, without case, punctuation and articles."""
    mine, theirs = _words(reply), _words(answer)
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs)) if common else 0.0


def rouge_l(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F measure of the longest common subsequence of words."""
    from rapidfuzz.distance import LCSseq

    mine, theirs = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reply, answer))
    common = LCSseq.similarity(mine, theirs)
    return 2 * common / (len(mine) + len(theirs)) if common else 0.0


def class_match(reply: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of the classes that the reply names, if the answer is among them.

    A class whose name is part of the answer's does not count.
    """
    named = [name for name in classes if name in reply]
    named = [name for name in named if name == answer or name not in answer]
    return 1 / len(named) if answer in named else 0.0


def edit_similarity(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Of the first line of code in the reply."""
    from rapidfuzz import fuzz

    lines = reply.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    return fuzz.ratio(next(code, ""), answer) / 100


def number_match(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the reply's numbers that are the answer's (``Paragraph 12`` or ``12``)."""
    wanted = re.search(r"\d+", answer)
    found = re.findall(r"\d+", reply)
    return found.count(wanted[0]) / len(found) if wanted and found else 0.0


LONGBENCH: dict[str, Score] = {
    "f1": f1,
    "rouge_l": rouge_l,
    "class": class_match,
    "edit": edit_similarity,
    "number": number_match,
}
"""By the name that results and templates give them."""


def best(metric: str, reply: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """The score against the answer that fits best."""
    return max((LONGBENCH[metric](reply, answer, classes) for answer in answers), default=0.0)


def _words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]
