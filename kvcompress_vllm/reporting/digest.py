# SPDX-License-Identifier: Apache-2.0
"""The log's account of compressions: one line per second at most. No vLLM types."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

SECONDS = 1.0
"""Least time between two lines."""


class Digest:
    """Adds compressions up and writes a line about them: at once, if there was none within the
    last second, otherwise when that second is over.

    Args:
        write: takes a line. May be called in another thread: nobody else may come by to say that
            the second is over.
        now: a clock, in seconds.
        after: calls a function after so many seconds, in another thread.
    """

    def __init__(
        self,
        write: Callable[[str], Any],
        now: Callable[[], float] = time.monotonic,
        after: Callable[[float, Callable[[], None]], Any] | None = None,
    ) -> None:
        self._write = write
        self._now = now
        self._after = after or _after
        self._lock = threading.Lock()
        self._last = -SECONDS
        self._waits = False
        self._requests = self._tokens = self._before = self._blocks = 0

    def add(self, tokens: int, before: int, after: int) -> None:
        """Count a request of ``tokens`` tokens whose blocks went from ``before`` to ``after``."""
        with self._lock:
            self._requests += 1
            self._tokens += tokens
            self._before += before
            self._blocks += after
            left = self._last + SECONDS - self._now()
            if self._waits:
                return
            if left > 0:
                self._waits = True
                self._after(left, self._over)
                return
            line = self._take()
        self._write(line)

    def _over(self) -> None:
        with self._lock:
            self._waits = False
            line = self._take()
        self._write(line)

    def _take(self) -> str:
        self._last = self._now()
        line = (
            f"{self._requests} request{'s' if self._requests > 1 else ''} compressed: "
            f"{self._tokens} tokens in {self._before} -> {self._blocks} blocks"
        )
        self._requests = self._tokens = self._before = self._blocks = 0
        return line


def _after(seconds: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True  # a line is not worth waiting for at the end
    timer.start()
