# SPDX-License-Identifier: Apache-2.0
"""Options as dataclass fields that say what they accept, for the configuration and the policies."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import field
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]
"""What is accepted, in words and as a test."""

LARGEST_INTEGER = 2**31 - 1
"""Block arithmetic on accepted integers stays within 64 bits."""
LARGEST_NUMBER = 1e18
"""An accepted integer fits 64 bits, so it can be sent to the engine, and converts to a float."""


def option(default: Any, help: str, accepted: str, accepts: Callable[[Any], bool]) -> Any:
    """A dataclass field with its help text and its rule."""
    return field(default=default, metadata={"help": help, "accepted": accepted, "accepts": accepts})


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
        return reprlib.repr(value)
    # Python does not print integers of thousands of digits.
    text = repr(value) if isinstance(value, float) or abs(value) < 10**40 else "10**40 or more"
    return f"{text} (too large)" if value > 0 else "less than -10**9"
