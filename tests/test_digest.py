# SPDX-License-Identifier: Apache-2.0
"""One line per second at most, and nothing is left out of them."""

from __future__ import annotations

from collections.abc import Callable

from kvcompress_vllm.reporting.digest import Digest


class Clock:
    """Time that passes when told to, and what is to be done then."""

    def __init__(self) -> None:
        self.time = 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.due.append((self.time + seconds, call))

    def pass_to(self, time: float) -> None:
        self.time = time
        due, self.due = self.due, []
        for at, call in due:
            if at <= time:
                call()
            else:
                self.due.append((at, call))


def test_a_lone_request_is_told_at_once_and_a_burst_once_a_second() -> None:
    clock, lines = Clock(), list[str]()
    digest = Digest(lines.append, lambda: clock.time, clock.after)
    digest.add(1483, 93, 13)
    assert lines == ["1 request compressed: 1483 tokens in 93 -> 13 blocks"]
    for tenth in range(1, 40):
        clock.pass_to(tenth / 10)
        digest.add(100, 7, 2)
    assert len(lines) == 4 and len(clock.due) == 1
    clock.pass_to(4.0)
    assert len(lines) == 5 and not clock.due, "the last ones do not wait for another request"
    told = [int(line.split()[0]) for line in lines]
    assert sum(told) == 40 and lines[1] == "9 requests compressed: 900 tokens in 63 -> 18 blocks"
    clock.pass_to(60.0)
    digest.add(5, 4, 3)
    assert lines[-1] == "1 request compressed: 5 tokens in 4 -> 3 blocks"


def test_the_real_timer_tells_the_rest() -> None:
    import threading

    done, lines = threading.Event(), list[str]()

    def write(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            done.set()

    digest = Digest(write)
    for _ in range(3):
        digest.add(1, 2, 1)
    assert done.wait(60) and lines[1].startswith("2 requests")
