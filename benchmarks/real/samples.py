# SPDX-License-Identifier: Apache-2.0
"""Questions about facts in real text, as token ids.

A context is running text of one source with facts between its sentences; each is asked for one of
them in every task of :data:`TASKS`. The reply is begun, as RULER does, and the model completes it.
Every answer has several tokens: the first token of a reply comes from the uncompressed prompt when
the question stands in it, so an answer of one token would be free.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

TASKS = ("passkey", "person", "fruits", "words", "city", "phone", "car", "meeting")
SOURCES = ("essays", "shakespeare")
"""Folders that ``python -m benchmarks.models text`` writes."""
TEXT = "text"
"""The kind of a sample without questions: text and how it goes on."""


def _items(text: str, separator: str = " ") -> list[str]:
    return text.split(separator)


_FIRST = _items(
    "Alice Brian Clara Daniel Emma Frank Grace Henry Irene James Karen Louis Maria Nathan "
    "Olivia Peter Rachel Samuel Tina Victor"
)
_LAST = _items(
    "Adams Baker Carter Dixon Evans Foster Grant Hughes Irving Jensen Keller Lopez Mason "
    "Norris Owens Porter Quinn Rivera Stone Turner"
)
_JOBS = _items(
    "dentist baker pilot lawyer carpenter nurse librarian plumber photographer florist tailor "
    "farmer barber jeweler mechanic butcher gardener translator"
)
_FRUITS = _items("apples cherries mangoes grapes lemons peaches plums oranges bananas melons")
_CITIES = _items(
    "Paris London Berlin Madrid Vienna Lisbon Dublin Athens Prague Warsaw Boston Chicago "
    "Denver Seattle Toronto Sydney"
)
_CARS = _items(
    "a green truck;a red van;a blue bus;a white taxi;a black jeep;a yellow tractor;"
    "a silver sedan;a brown wagon",
    ";",
)
_DAYS = _items("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_WORDS = _items(
    "apple river stone cloud tiger piano window garden bridge candle forest mirror pepper "
    "rocket saddle timber violin walnut yellow zebra anchor basket copper dragon engine "
    "fabric guitar hammer island jacket"
)


@dataclass(frozen=True)
class Question:
    """Token ids of the question with the begun reply, and of the answer."""

    task: str
    asked: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Sample:
    """A context as token ids, and what comes after it."""

    source: str
    length: int
    """Tokens of the context."""
    seed: int
    context: list[int]
    questions: list[Question] = field(default_factory=list)
    continuation: list[int] = field(default_factory=list)
    """How the text goes on, in samples without questions."""


def write(samples: Iterable[Sample], path: Path) -> int:
    """JSON lines; returns how many."""
    count = 0
    with path.open("w") as file:
        for sample in samples:
            file.write(json.dumps(asdict(sample), separators=(",", ":")) + "\n")
            count += 1
    return count


def write_text(samples: Iterable[Sample], path: Path, decode: Callable[[list[int]], str]) -> int:
    """A JSON line per question with ``context``, ``asked``, ``answer`` and ``task``, for harnesses
    that take text; returns how many samples."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            count += 1
            for question in sample.questions:
                row = {
                    "context": decode(sample.context),
                    "asked": decode(question.asked),
                    "answer": decode(question.answer),
                    "task": question.task,
                }
                file.write(json.dumps(row) + "\n")
    return count


def read(path: Path) -> Iterator[Sample]:
    """What :func:`write` wrote."""
    with path.open() as file:
        for line in file:
            fields = json.loads(line)
            questions = [Question(**question) for question in fields.pop("questions")]
            yield Sample(questions=questions, **fields)


def facts(rng: random.Random) -> tuple[list[str], dict[str, tuple[str, str, str]]]:
    """Sentences to put into a text, and by task the question, the begun reply and the answer.

    Of persons, fruits and cities there are two each, so that the name in the question matters.
    """
    key = str(rng.randint(10000, 99999))
    first, last = rng.sample(_FIRST, 12), rng.sample(_LAST, 12)
    names = [f"{a} {b}" for a, b in zip(first, last, strict=True)]
    jobs, fruits = rng.sample(_JOBS, 2), rng.sample(_FRUITS, 4)
    cities, years = rng.sample(_CITIES, 2), rng.sample(range(1900, 2000), 2)
    words, cars = rng.sample(_WORDS, 3), rng.sample(_CARS, 2)
    phones = [str(rng.randint(100000, 999999)) for _ in range(2)]
    days = [f"{day} at {rng.randint(2, 11)} o'clock" for day in rng.sample(_DAYS, 2)]
    likes = [f"{fruits[2 * i]} and {fruits[2 * i + 1]}" for i in range(2)]
    homes = [f"{cities[i]} in {years[i]}" for i in range(2)]
    phrase = f"{words[0]}, {words[1]} and {words[2]}"
    sentences = [f"The pass key is {key}. Remember it. {key} is the pass key."]
    sentences += [f"{names[i]} works as a {jobs[i]}." for i in range(2)]
    sentences += [f"{names[2 + i]} likes {likes[i]}." for i in range(2)]
    sentences += [f"{names[4 + i]} was born in {homes[i]}." for i in range(2)]
    sentences += [f"The phone number of {names[6 + i]} is {phones[i]}." for i in range(2)]
    sentences += [f"{names[8 + i]} drives {cars[i]}." for i in range(2)]
    sentences += [f"The meeting with {names[10 + i]} is on {days[i]}." for i in range(2)]
    sentences += [f"The three secret words are {phrase}."]
    return sentences, {
        "passkey": ("What is the pass key?", "The pass key is", key),
        "person": (f"What does {names[0]} work as?", f"{names[0]} works as", f"a {jobs[0]}"),
        "fruits": (f"What does {names[2]} like?", f"{names[2]} likes", likes[0]),
        "words": ("What are the three secret words?", "The three secret words are", phrase),
        "city": (
            f"Where and when was {names[4]} born?", f"{names[4]} was born in", homes[0],
        ),
        "phone": (
            f"What is the phone number of {names[6]}?",
            f"The phone number of {names[6]} is", phones[0],
        ),
        "car": (f"What does {names[8]} drive?", f"{names[8]} drives", cars[0]),
        "meeting": (
            f"When is the meeting with {names[10]}?",
            f"The meeting with {names[10]} is on", days[0],
        ),
    }  # fmt: skip


@lru_cache
def documents(directory: Path, held_out: bool | None = None) -> tuple[str, ...]:
    """The texts of a source.

    Args:
        held_out: only every fifth of them, or only the others; None: all.

    Raises:
        ValueError: there are none.
    """
    texts = tuple(
        path.read_text(encoding="utf-8")
        for index, path in enumerate(sorted(directory.glob("*.txt")))
        if held_out is None or held_out is (index % 5 == 0)
    )
    if not texts:
        raise ValueError(
            f"no texts in {directory}; python -m benchmarks.models text {directory.parent} "
            "fetches them"
        )
    return texts


def running_text(texts: tuple[str, ...], characters: int, rng: random.Random) -> str:
    """From the end of a random sentence on, document after document."""
    place = rng.randrange(sum(map(len, texts)))
    index = 0
    while place >= len(texts[index]):
        place -= len(texts[index])
        index += 1
    text = texts[index][place:]
    sentence = re.search(r"[.!?\n]\s+(?=\S)", text)
    text = text[sentence.end() :] if sentence else ""
    while len(text) < characters:
        index = (index + 1) % len(texts)
        text = f"{text}\n\n{texts[index]}".lstrip()
    return text[:characters]


class Maker:
    """Samples of a tokenizer (``transformers``'s) and a directory of texts per source.

    Args:
        held_out: as of :func:`documents`.
    """

    def __init__(self, tokenizer: Any, texts: Path, held_out: bool | None = None) -> None:
        self._tokenizer = tokenizer
        self._texts, self._held_out = texts, held_out
        start = tokenizer("a").input_ids[:1]
        self._start = [i for i in start if i == tokenizer.bos_token_id]

    def _documents(self, source: str) -> tuple[str, ...]:
        return documents(self._texts / source, self._held_out)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def facts(self, source: str, length: int, seed: int) -> Sample:
        """A context of exactly ``length`` tokens with its questions.

        Raises:
            ValueError: the facts leave no room for text.
        """
        rng = random.Random(f"facts-{source}-{length}-{seed}")
        sentences, asked = facts(rng)
        room = length - len(self._ids(" ".join(sentences))) - len(sentences) - len(self._start)
        if room < 64:
            raise ValueError(f"length {length} is not accepted; facts and text need more tokens")
        text = running_text(self._documents(source), 8 * length, rng)
        # The last tokens are text: nothing that is asked for lies within a recent window.
        front = self._tokenizer.decode(self._ids(text)[: room - 40])
        places = [found.end() for found in re.finditer(r"[.!?]\s+", front)] or [0]
        while len(places) < len(sentences):
            places.append(rng.choice(places))
        chosen = sorted(rng.sample(places, len(sentences)))
        rng.shuffle(sentences)
        parts, last = [], 0
        for place, sentence in zip(chosen, sentences, strict=True):
            parts += [text[last:place], sentence, " "]
            last = place
        context = (self._start + self._ids("".join(parts) + text[last:]))[:length]
        questions = [self._question(task, *words) for task, words in asked.items()]
        return Sample(source, length, seed, context, questions)

    def _question(self, task: str, question: str, begun: str, answer: str) -> Question:
        before = f"\n\nQuestion: {question}\nAnswer: {begun}"
        asked = self._ids(before)
        whole = self._ids(f"{before} {answer}")
        if whole[: len(asked)] != asked:
            raise RuntimeError(f"the tokens of {before!r} change when {answer!r} follows")
        return Question(task, asked, whole[len(asked) :])

    def text(self, source: str, length: int, continuation: int, seed: int) -> Sample:
        """Text and the ``continuation`` tokens that follow."""
        rng = random.Random(f"text-{source}-{length}-{seed}")
        text = running_text(self._documents(source), 8 * (length + continuation), rng)
        tokens = (self._start + self._ids(text))[: length + continuation]
        return Sample(source, length, seed, tokens[:length], [], tokens[length:])
