# SPDX-License-Identifier: Apache-2.0
"""How many preemptions early compression avoided: an estimate. No vLLM types.

The pool without the blocks that compressions under pressure gave back is what vLLM would have had.
Where it would be overdrawn after a step, vLLM would have preempted: as many of its latest requests
as hold the missing blocks. What is counted is how far that number rises, so a shortage that lasts
counts once. Blocks count as given back only until the request would have been compressed anyway.
It remains an estimate: with preemptions, later steps would have gone differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvcompress_vllm.records.plan import Compression


class Shortage:
    """Follows the pool of one engine as it would be without compressions under pressure."""

    def __init__(self) -> None:
        self._given_back: dict[str, list[tuple[int, int]]] = {}
        """By request: blocks, and the tokens at which they would have come back anyway."""
        self._victims = 0

    def compressed(self, item: Compression, usual_due: int) -> None:
        """Note a compression.

        Args:
            usual_due: tokens at which the request would have been compressed without pressure.
        """
        if item.trigger != "pressure":
            # Without those before, this one would have left as many blocks.
            self._given_back.pop(item.request_id, None)
            return
        blocks = item.old_packing.gives_back(item.packing)
        self._given_back.setdefault(item.request_id, []).append((blocks, usual_due))

    def released(self, request_id: str) -> None:
        """Note that a request gave its blocks up."""
        self._given_back.pop(request_id, None)

    def step(
        self, num_free: int, num_computed: Callable[[str], int], latest: Iterable[tuple[str, int]]
    ) -> int:
        """Preemptions that were avoided on this step.

        Args:
            num_free: free blocks of the pool after the step was scheduled.
            num_computed: computed tokens of a request.
            latest: running requests and their blocks, those first that vLLM preempts first.
        """
        credits: dict[str, int] = {}
        for request_id, entries in list(self._given_back.items()):
            computed = num_computed(request_id)
            entries = [entry for entry in entries if computed < entry[1]]
            self._given_back[request_id] = entries
            credits[request_id] = sum(blocks for blocks, _ in entries)
            if not entries:
                del self._given_back[request_id]
        missing, victims = sum(credits.values()) - num_free, 0
        for request_id, blocks in latest if missing > 0 else ():
            missing -= blocks + credits.get(request_id, 0)
            victims += 1
            if missing <= 0:
                break
        avoided, self._victims = max(0, victims - self._victims), victims
        return avoided
