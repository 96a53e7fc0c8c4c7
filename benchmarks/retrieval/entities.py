# SPDX-License-Identifier: Apache-2.0
"""Random names and values, and the sentences that state and ask facts."""

from __future__ import annotations

import random
from typing import NamedTuple

from .words import ADJECTIVES, CITIES, LAST_SYLLABLES, NAMES, NOUNS, SYLLABLES


class Needle(NamedTuple):
    """One kind of fact: ``{e}`` stands for the entity, ``{v}`` for its value."""

    statement: str
    one_of: str
    """Statement of one of several values."""
    question: str
    question_all: str
    """Question after all values."""
    kind: str
    """Of entity."""


NEEDLES = (
    Needle(
        "The secret code for {e} is {v}.",
        "One of the secret codes for {e} is {v}.",
        "What is the secret code for {e}?",
        "What are the secret codes for {e}?",
        "city",
    ),
    Needle(
        "The special magic number for {e} is: {v}.",
        "One of the special magic numbers for {e} is: {v}.",
        "What is the special magic number for {e}?",
        "What are the special magic numbers for {e}?",
        "pair",
    ),
    Needle(
        "The badge number of {e} is {v}.",
        "One of the badge numbers of {e} is {v}.",
        "What is the badge number of {e}?",
        "What are the badge numbers of {e}?",
        "name",
    ),
    Needle(
        "The access key of project {e} is {v}.",
        "One of the access keys of project {e} is {v}.",
        "What is the access key of project {e}?",
        "What are the access keys of project {e}?",
        "pseudo",
    ),
    Needle(
        "{e} keeps the locker number {v}.",
        "{e} keeps, among others, the locker number {v}.",
        "Which locker number does {e} keep?",
        "Which locker numbers does {e} keep?",
        "name",
    ),
    Needle(
        "The ticket for the trip to {e} has the number {v}.",
        "A ticket for the trip to {e} has the number {v}.",
        "Which number has the ticket for the trip to {e}?",
        "Which numbers have the tickets for the trip to {e}?",
        "city",
    ),
)


def number(rng: random.Random) -> str:
    """5 to 7 digits."""
    digits = rng.choice((5, 5, 6, 6, 7))
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def hexadecimal(rng: random.Random, digits: int) -> str:
    """Hexadecimal digits."""
    return "".join(rng.choice("0123456789abcdef") for _ in range(digits))


def pseudo_word(rng: random.Random) -> str:
    """A made-up proper name of two or three syllables."""
    first = rng.choice(SYLLABLES)
    middle = rng.choice(SYLLABLES) if rng.random() < 0.5 else ""
    return (first + middle + rng.choice(LAST_SYLLABLES)).capitalize()


def word_pair(rng: random.Random, separator: str = "-") -> str:
    """Adjective and noun."""
    return rng.choice(ADJECTIVES) + separator + rng.choice(NOUNS)


def entity(rng: random.Random, kind: str) -> str:
    """Something that facts are stated about."""
    if kind == "city":
        return rng.choice(CITIES) if rng.random() < 0.8 else pseudo_word(rng)
    if kind == "name":
        if rng.random() < 0.7:
            return rng.choice(NAMES)
        return rng.choice(NAMES) + " " + pseudo_word(rng)
    return word_pair(rng) if kind == "pair" else pseudo_word(rng)


def entities(rng: random.Random, kind: str, count: int) -> list[str]:
    """Different entities; word pairs once the kind seems exhausted."""
    found: dict[str, None] = {}
    tries = 0
    while len(found) < count:
        candidate = entity(rng, kind)
        tries += 1
        if tries > 4 * count + 40:
            kind = "pair"
        found.setdefault(candidate)
    return list(found)


def value(rng: random.Random, only_numbers: bool = False) -> str:
    """Mostly a number, else a word pair or hexadecimal."""
    kind = rng.random()
    if only_numbers or kind < 0.75:
        return number(rng)
    return word_pair(rng) if kind < 0.87 else hexadecimal(rng, rng.choice((6, 8)))
