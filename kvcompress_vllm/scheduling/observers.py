# SPDX-License-Identifier: Apache-2.0
"""Who holds an observation slot: requests that are to be compressed; and, while nobody needs it for
that, decoding ones whose policy reads echo scores, so that what they decode gets some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.segments import DECODED, SEGMENT
from kvcompress_vllm.scheduling.sizes import NEVER
from kvcompress_vllm.scheduling.slots import Slots


class ObservationSlots:
    """Hands observation slots to requests, and takes them back.

    Args:
        config: the resolved options.
        count: slots that there are.
        requests: all that are tracked, by id; changed by the owner.
    """

    def __init__(
        self, config: KVCompressConfig, count: int, requests: Mapping[str, Tracked]
    ) -> None:
        self.count = count
        self._slots = Slots(count)
        self._requests = requests
        self._observed: dict[str, Tracked] = {}
        self._by_age: list[Tracked] | None = []
        """The same in order; None: to be sorted anew."""
        self._listening: dict[str, Tracked] = {}
        """Requests that would give their slot to one that is to be compressed."""
        self._computed: Mapping[str, int] = {}
        """Computed tokens of running requests, before the step that is planned now."""
        self._lost: list[tuple[Tracked, int, int, int]] = []
        """Who lost its slot in that step, with what it had heard: see :meth:`heard`."""
        self._promised: set[str] = set()
        """Requests that will take another one in the step that is planned now."""
        self._listens = config.listens
        self._whole = config.listens and config.context_stride is not None
        self.reads_echo = cache(config.reads_echo)
        """Whether a policy, by name, judges by echo scores."""

    @property
    def available(self) -> int:
        """Slots that are to be had for a compression."""
        return self._free + len(self._listening)

    @property
    def used(self) -> int:
        """Slots that are not to be had."""
        return self.count - self.available

    @property
    def _free(self) -> int:
        return len(self._slots) - len(self._promised)

    @property
    def observed(self) -> Sequence[Tracked]:
        """Requests that are to be compressed, who was admitted first comes first. Stays as it is
        when that changes: the next one is another."""
        if self._by_age is None:  # asked several times a step
            self._by_age = sorted(self._observed.values(), key=_age)
        return self._by_age

    def observe(self, tracked: Tracked) -> None:
        """Give a request one, or let it keep the one that it listens with; ask ``available`` first
        whether there is one."""
        if tracked.listen_slot is None and self._free < 1:
            self._give_up(max(self._listening.values(), key=_age))
        tracked.observe_slot = (
            self._slots.take() if tracked.listen_slot is None else tracked.listen_slot
        )
        self._listening.pop(tracked.request_id, None)
        self._observed[tracked.request_id] = tracked
        self._by_age = None

    def _give_up(self, tracked: Tracked) -> None:
        """Take the slot of one that listens. What it has heard is scored before that is used."""
        slot, begin = tracked.listen_slot, tracked.listened
        end = self._computed.get(tracked.request_id, 0)
        if slot is not None and end - begin > 1:
            self._lost.append((tracked, slot, begin, end))
            tracked.unscored.scored(begin, end)
        self.stop(tracked)

    def take_lost(self) -> list[tuple[Tracked, int, int, int]]:
        """What those had heard who lost their slot in the step that is planned now; as of
        :meth:`heard`."""
        lost, self._lost = self._lost, []
        return lost

    def stop(self, tracked: Tracked) -> None:
        """Take back what a request holds, if anything."""
        slot = tracked.listen_slot if tracked.observe_slot is None else tracked.observe_slot
        if slot is not None:
            self._slots.give(slot)
        if tracked.heard_slot is not None:
            self._slots.give(tracked.heard_slot)
        tracked.observe_slot = tracked.listen_slot = tracked.heard_slot = None
        tracked.heard_until = 0  # the queries of a segment that it took over are gone
        if self._observed.pop(tracked.request_id, None) is not None:
            self._by_age = None
        self._listening.pop(tracked.request_id, None)

    def listen(self, num_computed: Mapping[str, int]) -> None:
        """Give slots that nobody needs to decoding requests whose policy reads echo scores."""
        for tracked in self._requests.values() if self._listens else ():
            if self._free < 1:
                return
            computed = num_computed.get(tracked.request_id, 0)
            if (
                tracked.observe_slot is tracked.listen_slot is None
                and tracked.prefill_end <= computed < tracked.due_at != NEVER
                and tracked.reads_echo
            ):
                tracked.listen_slot, tracked.listened = self._slots.take(), computed
                self._listening[tracked.request_id] = tracked

    def listen_from(self, tracked: Tracked, first: int, end: int) -> None:
        """Before a step of a prefill that computes tokens ``[first, end)``: give a request with a
        stride a slot for the segment in which its prompt ends and its answer begins."""
        begin = tracked.prefill_end - tracked.prefill_end % SEGMENT
        if not self._whole or not self.is_whole(tracked):
            return
        if not first <= begin < end or end > tracked.prefill_end or tracked.due_at == NEVER:
            return
        if first >= tracked.due_at:
            return  # while a compression waits for room, nothing behind it is observed
        if tracked.listen_slot is not None:
            if first < tracked.heard_until < end:
                self._promised.discard(tracked.request_id)
                tracked.heard_slot, tracked.listen_slot = tracked.listen_slot, self._slots.take()
                tracked.listened = begin
            return
        if tracked.observe_slot is not None or self._free > 0:
            slot = tracked.observe_slot
            tracked.listen_slot = self._slots.take() if slot is None else slot
            tracked.listened = begin
            if slot is None:
                self._listening[tracked.request_id] = tracked

    def hears_from(self, tracked: Tracked) -> int:
        """From which token of its prompt on the keys of a request need no score as it is read:
        the segment will be scored whole, once it is complete or a compression is due in it."""
        begin = tracked.prefill_end - tracked.prefill_end % SEGMENT
        hears = tracked.listen_slot is not None and tracked.listened == begin
        return begin if hears and self.is_whole(tracked) else NEVER

    def can_take_over(self, starting: Tracked) -> bool:
        """Whether a request that would start now could go on in a segment that another began."""
        return self.is_whole(starting) and (starting.starts_observed or self._free > 0)

    def passes(self, tracked: Tracked, end: int, starts: bool, behind: int) -> bool:
        """Whether a step that computes a prefill up to token ``end`` may go beyond the segment that
        its request took over. The queries of that one wait in their slot until the step is over, so
        the segment in which the prompt ends takes another, which is kept for the request.

        Args:
            starts: it has not taken over the queries yet.
            behind: requests that wait to start behind it.
        """
        if tracked.starts_observed or (tracked.observe_slot is not None and not starts):
            return False  # what a compression observes goes where the segment's queries are
        if end <= tracked.prefill_end - tracked.prefill_end % SEGMENT:
            return True
        if tracked.request_id in self._promised:
            return True
        # Who finds none at all computes a segment anew: that costs more than a step.
        left = self._free - 1 - starts
        if left < self.count // 4 and left < behind + sum(
            other.observe_slot is other.listen_slot is None and other is not tracked
            for other in self._requests.values()
        ):
            return False
        self._promised.add(tracked.request_id)
        return True

    def take_over(self, tracked: Tracked, begin: int) -> int:
        """Give a request that starts a slot for the segment from token ``begin`` on, whose first
        queries are brought there.

        Returns:
            The slot.
        """
        if tracked.observe_slot is None:
            tracked.listen_slot = self._slots.take()
            self._listening[tracked.request_id] = tracked
        else:
            tracked.listen_slot = tracked.observe_slot
        tracked.listened, tracked.heard_until = begin, begin + SEGMENT
        return tracked.listen_slot

    def is_whole(self, tracked: Tracked) -> bool:
        """Whether what a request decodes is scored in segments like those of prompts, so that it
        makes no difference which tokens were read and which decoded."""
        return self._whole and tracked.reads_echo and tracked.sizes.stride > 0

    def heard(self, num_computed: Mapping[str, int]) -> Iterator[tuple[Tracked, int, int, int]]:
        """Whole segments that were decoded since the last call, each ``[begin, end)`` of a request,
        and what there is of one where a compression is due; with the slot of their queries. At the
        beginning of every step."""
        self._promised.clear()
        self._lost.clear()
        self._computed = num_computed
        listening = [t for t in self._observed.values() if t.listen_slot is not None]
        listening += self._listening.values()
        for tracked in listening:
            end, due = num_computed.get(tracked.request_id, 0), False
            if (slot := tracked.heard_slot) is not None and end >= tracked.heard_until:
                begin = tracked.heard_until - SEGMENT
                tracked.unscored.scored(begin, tracked.heard_until)
                tracked.echoes(begin, tracked.heard_until)
                yield tracked, slot, begin, tracked.heard_until
                self._slots.give(slot)
                tracked.heard_slot = None
            if tracked.observe_slot is not None and end >= tracked.due_at:
                end, due = tracked.due_at, True
            segment = SEGMENT if self._whole and self.is_whole(tracked) else DECODED
            while tracked.listened < end:
                begin = tracked.listened
                stop = begin - begin % segment + segment
                if stop > end and not due:
                    break
                tracked.listened = min(stop, end)
                if tracked.listened - begin > 1:
                    tracked.unscored.scored(begin, tracked.listened)
                    tracked.echoes(begin, tracked.listened)
                    assert tracked.listen_slot is not None
                    yield tracked, tracked.listen_slot, begin, tracked.listened
                if tracked.listened == tracked.heard_until:
                    # What the prefill computes up to its last segment is scored as it is computed.
                    last = tracked.prefill_end - tracked.prefill_end % SEGMENT
                    tracked.listened = max(tracked.listened, last)


def _age(tracked: Tracked) -> int:
    return tracked.number
