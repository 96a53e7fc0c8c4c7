# SPDX-License-Identifier: Apache-2.0
"""Which requests are observed and compressed, and when. No vLLM types, no tensors.

Life of a compressible request:

1. ``admit`` when vLLM starts its prefill: it takes an observation slot and a state slot;
2. ``observe`` on each step whose tokens reach into the last ``window`` prompt tokens;
3. due once its whole prompt is computed, until ``compressed`` on a later step; if the pool cannot
   spare the packed blocks it stays due and decodes uncompressed meanwhile;
4. ``release`` when it finishes, is aborted or is preempted; a preempted request is admitted anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress_vllm import budget
from kvcompress_vllm.config import KVCompressConfig
from kvcompress_vllm.plan import Observation


@dataclass
class Tracked:
    """One compressible request, from admission on."""

    request_id: str
    num_tokens: int
    """Tokens that its prefill computes: the prompt, and the output so far after a preemption."""
    covered: int
    """F, full blocks of the prefill."""
    kept: int
    """C, blocks they will be packed into."""
    state_slot: int
    observe_slot: int | None
    """None once compressed."""


class CompressionPlanner:
    """Keeps the slots and the state of every compressible request.

    Args:
        config: the resolved options.
        block_size: tokens per block.
        state_slots: how many requests can be packed at once.
        observe_slots: how many requests can be observed at once.
    """

    def __init__(
        self, config: KVCompressConfig, block_size: int, state_slots: int, observe_slots: int
    ) -> None:
        self.config = config
        self.block_size = block_size
        self.requests: dict[str, Tracked] = {}
        self._state_slots = list(range(state_slots - 1, -1, -1))
        self._observe_slots = list(range(observe_slots - 1, -1, -1))
        self._released: list[int] = []

    def packed_size(self, num_tokens: int) -> tuple[int, int]:
        """(F, C) of a prefill of ``num_tokens`` tokens; C < F if it is to be compressed."""
        covered = num_tokens // self.block_size
        kept = budget.packed_blocks(self.config, num_tokens, covered, self.block_size)
        return covered, kept

    def can_admit(self, num_tokens: int) -> bool:
        """Whether the slots allow a request of ``num_tokens`` tokens to start its prefill now."""
        covered, kept = self.packed_size(num_tokens)
        return kept >= covered or bool(self._state_slots and self._observe_slots)

    def admit(self, request_id: str, num_tokens: int) -> None:
        """Start to track a request; one that is too short to compress is not tracked.

        Raises:
            RuntimeError: it is tracked already, or there is no slot (ask ``can_admit`` first).
        """
        covered, kept = self.packed_size(num_tokens)
        if kept >= covered:
            return
        if request_id in self.requests or not self.can_admit(num_tokens):
            raise RuntimeError(
                f"kv_compress: cannot admit {request_id}: tracked={request_id in self.requests}, "
                f"{len(self._state_slots)} state and {len(self._observe_slots)} observation slots"
            )
        self.requests[request_id] = Tracked(
            request_id,
            num_tokens,
            covered,
            kept,
            self._state_slots.pop(),
            self._observe_slots.pop(),
        )

    def reserve(self, num_tokens: int = 0) -> int:
        """Blocks to keep free so that any one request awaiting compression can be packed.

        Args:
            num_tokens: prefill length of a request about to be admitted, 0 for none.
        """
        waiting = [t.kept for t in self.requests.values() if t.observe_slot is not None]
        covered, kept = self.packed_size(num_tokens)
        return max([*waiting, kept if kept < covered else 0])

    def observe(self, request_id: str, first_token: int, num_tokens: int) -> Observation | None:
        """What to observe of a request's ``num_tokens`` tokens from position ``first_token`` on."""
        tracked = self.requests.get(request_id)
        if tracked is None or tracked.observe_slot is None:
            return None
        observe_from = max(0, tracked.num_tokens - self.config.window)
        if first_token >= tracked.num_tokens or first_token + num_tokens <= observe_from:
            return None
        return Observation(request_id, tracked.observe_slot, first_token, observe_from)

    def due(self, num_computed: dict[str, int]) -> list[Tracked]:
        """Requests whose prefill is complete and which are not packed yet, oldest first.

        Args:
            num_computed: computed tokens of the running requests.
        """
        return [
            tracked
            for request_id, tracked in self.requests.items()
            if tracked.observe_slot is not None
            and num_computed.get(request_id, 0) >= tracked.num_tokens
        ]

    def compressed(self, request_id: str) -> None:
        """Note that a due request is packed as of this step; its observation slot is free."""
        tracked = self.requests[request_id]
        if tracked.observe_slot is None:
            raise RuntimeError(f"kv_compress: {request_id} is compressed twice")
        self._observe_slots.append(tracked.observe_slot)
        tracked.observe_slot = None

    def release(self, request_id: str) -> None:
        """Forget a request that finished, was aborted or was preempted; unknown ones are fine."""
        tracked = self.requests.pop(request_id, None)
        if tracked is None:
            return
        if tracked.observe_slot is not None:
            self._observe_slots.append(tracked.observe_slot)
        self._state_slots.append(tracked.state_slot)
        self._released.append(tracked.state_slot)

    def take_released(self) -> list[int]:
        """State slots released since the last call."""
        released, self._released = self._released, []
        return released

    def packed(self) -> list[Tracked]:
        """Requests that are packed now."""
        return [t for t in self.requests.values() if t.observe_slot is None]


def num_observe_slots(config: KVCompressConfig, max_batched_tokens: int, max_requests: int) -> int:
    """Observation slots that let every prefill of a step be observed.

    At most ``max_batched_tokens / min_prompt_tokens`` prompts can end in one step, and as many may
    still wait for their packed blocks; prompts that are mostly cached can be more, and then wait.
    """
    per_step = -(-max_batched_tokens // config.min_prompt_tokens) + 1
    return max(1, min(2 * per_step, max_requests, MAX_OBSERVE_SLOTS))


MAX_OBSERVE_SLOTS = 64
"""Bounds the ring: with 8 queries of Llama-3.1-8B a slot takes 2 MiB."""
