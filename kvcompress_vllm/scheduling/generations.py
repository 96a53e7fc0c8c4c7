# SPDX-License-Identifier: Apache-2.0
"""Which decoding requests are observed again: those that soon will have outgrown their budget, when
the pool runs short those that lose least, and the others while there are slots to listen with."""

from __future__ import annotations

from collections.abc import Mapping

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.scheduling import observation, pressure
from kvcompress_vllm.scheduling.course import Course
from kvcompress_vllm.scheduling.limits import Limits
from kvcompress_vllm.scheduling.observers import ObservationSlots
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.unverified import Unverified


class Generations:
    """Asked on each step, before what is due is compressed. ``num_computed`` is how many tokens of
    each running request are computed.

    Args:
        config: the resolved options.
        limits: of all requests.
        requests: all that are tracked, by id; changed by the owner.
        observers: hands out the slots.
        course: prepares compressions.
        unverified: what is drafted in steps in flight.
        drafts: tokens that a step of a generation may compute beyond its next.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        limits: Limits,
        requests: Mapping[str, Tracked],
        observers: ObservationSlots,
        course: Course,
        unverified: Unverified,
        drafts: int,
    ) -> None:
        self._limits, self._window, self._max_ratio = limits, config.window, config.max_ratio
        self._requests, self._observers, self._course = requests, observers, course
        self._unverified, self._drafts = unverified, drafts

    def watch(self, num_computed: Mapping[str, int]) -> None:
        """Give observation slots to decoding requests that will soon have outgrown their budget."""
        if not self._observers.available:
            return
        ahead = self._window + self._drafts
        near = observation.outgrowing(self._requests.values(), num_computed, ahead)
        for computed, tracked in near:
            if not self._observers.available:
                return
            # Late (no slot was free, or a prefill passed the mark): a whole window from now.
            counted = computed + self._unverified[tracked.request_id]
            due_at = max(tracked.due_at, counted + self._window)
            if due_at > tracked.due_at or (tracked.reads_echo and tracked.listen_slot is None):
                self._course.leave_stride(tracked)
            if not tracked.sizes.stride:
                later = tracked.outgrown_at(due_at)
                if later > due_at:
                    tracked.due_at = later  # it was not heard meanwhile, so it would keep more
                    continue
            self._course.prepare(tracked, due_at)

    def press(self, num_computed: Mapping[str, int], num_free: int) -> None:
        """When the pool runs short, prepare early compressions, lowest loss per block first.

        Short means: fewer free blocks than the running requests will take until a compression that
        is prepared now is carried out, and than its copy takes.

        Args:
            num_free: free blocks of the pool.
        """
        early = pressure.early(
            self._requests.values(),
            self._counted(num_computed),
            num_free,
            self._limits,
            self._window,
            self._drafts,
            self._max_ratio,
            self._observers.available,
        )
        for item in early:
            tracked = item.tracked
            tracked.usual_due = tracked.due_at
            self._course.leave_stride(tracked)
            self._course.prepare(tracked, item.due_at)
            tracked.ratio, tracked.trigger = item.ratio, "pressure"

    def listen(self, num_computed: Mapping[str, int]) -> None:
        """Give observation slots that nobody needs to decoding requests, see ``observers``."""
        self._observers.listen(self._counted(num_computed))

    def _counted(self, num_computed: Mapping[str, int]) -> Mapping[str, int]:
        """With what steps in flight drafted: what is observed from now on begins behind it."""
        if not self._unverified:
            return num_computed
        return {name: n + self._unverified[name] for name, n in num_computed.items()}
