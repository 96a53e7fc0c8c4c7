# SPDX-License-Identifier: Apache-2.0
"""Options as dataclass fields that say what they accept, for the configuration and the policies."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]
"""What is accepted, in words and as a test."""

LARGEST_INTEGER = 2**31 - 1
"""Block arithmetic on accepted integers stays within 64 bits."""
LARGEST_NUMBER = 1e18
"""An accepted integer fits 64 bits, so it can be sent to the engine, and converts to a float."""

WIDEST_POOL = 4095
"""Every score is read so many times: with millions, a compression would take minutes."""

LONGEST_SHOWN = 120
"""Characters of a user's text that an error message repeats."""


def option(
    default: Any, help: str, accepted: str, accepts: Callable[[Any], bool], optional: bool = False
) -> Any:
    """A dataclass field with its help text and its rule; ``optional``: None is accepted, too."""
    metadata = {"help": help, "accepted": accepted, "accepts": accepts, "optional": optional}
    return field(default=default, metadata=metadata)


def integer(low: int, high: int | None = None, odd: bool = False) -> Rule:
    """Integers in ``[low, high]``."""
    accepted = f"an {'odd ' if odd else ''}integer >= {low}" + (
        "" if high is None else f" and <= {high}"
    )

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and low <= value <= (LARGEST_INTEGER if high is None else high)
            and (not odd or value % 2 == 1)
        )

    return accepted, accepts


def multiple(of: int) -> Rule:
    """Integers above 0 that are a multiple of another."""
    bounded = integer(of)[1]
    return f"a multiple of {of}", lambda value: bounded(value) and value % of == 0


def number(low: float, high: float | None = None, above: bool = False) -> Rule:
    """Finite numbers in ``[low, high]``; with ``above``, ``low`` itself is not one of them."""
    accepted = f"a number {'>' if above else '>='} {low:g}" + (
        "" if high is None else f" and <= {high:g}"
    )

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (value > low if above else value >= low)
            and value <= (LARGEST_NUMBER if high is None else high)
        )

    return accepted, accepts


def flag() -> Rule:
    """True or false, and no number in their place."""
    return "true or false", lambda value: isinstance(value, bool)


def choice(*values: str) -> Rule:
    """One of some words."""
    return f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values


def refusal(name: str, value: Any, accepted: str) -> ValueError:
    """The error for a value that is not accepted, worded as everywhere."""
    return ValueError(f"kv_compress: {name}={shown(value)} is not accepted; it must be {accepted}")


def shown(value: Any) -> str:
    """A value as error messages show it: not longer than a line, and marked where its size is
    what is wrong."""
    if not isinstance(value, int | float) or not abs(value) > LARGEST_INTEGER:
        return shortened(reprlib.repr(value))  # which bounds each level, not what nests
    # Python does not print integers of thousands of digits.
    text = repr(value) if isinstance(value, float) or abs(value) < 10**40 else "10**40 or more"
    return f"{text} (too large)" if value > 0 else "less than -10**9"


def shortened(text: str, longest: int = LONGEST_SHOWN) -> str:
    """The text, its middle left out where it is longer than an error message should be."""
    if len(text) <= longest:
        return text
    half = (longest - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def printable(text: str, longest: int = LONGEST_SHOWN) -> str:
    """Text of a client's, such as a request id, as logs and errors show it: on one line, of bounded
    length, and without characters that a terminal obeys."""
    text = shortened(text, longest)
    return text if text.isprintable() else ascii(text)[1:-1]


def closeness(one: str, other: str) -> float:
    """How alike two words are, from 0 to 1."""
    return difflib.SequenceMatcher(None, one[:LONGEST_SHOWN], other).ratio()


def unknown(what: str, name: Any, known: Iterable[str]) -> str:
    """``unknown WHAT 'NAME'``, and which known one it probably stands for."""
    text = f"unknown {what} {shown(name)}"
    # Matching takes time that grows with the square of the length.
    near = difflib.get_close_matches(str(name)[:LONGEST_SHOWN].lower(), list(known), 1, 0.6)
    return f"{text} (did you mean {near[0]!r}?)" if near else text
