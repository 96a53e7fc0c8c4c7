# SPDX-License-Identifier: Apache-2.0
"""Packed prefixes ("contexts") that many requests share. No vLLM types, no tensors.

A context is what a compression at ``kv_compress_context_tokens`` left of a prompt's first tokens.
It depends on those tokens and on the budget, on nothing behind them, so whoever comes with the same
ones takes its blocks and goes on behind them: nothing of the context is computed or compressed, and
the answer is the same. Its life:

1. ``begin`` when a request starts to compute it; others that want it wait for that one;
2. ``add`` when that request is compressed there: the context gets a state slot of its own, so that
   it outlives the request, and every row that starts with its first block finds that slot;
3. ``join`` and ``leave`` as requests use it. Nobody writes into its blocks: a user's next
   compression packs into new ones (copy on write);
4. unused, it lies in vLLM's free queue until one of its blocks is given to somebody else
   (``reallocated``), or the slot is needed; ``retire`` keeps new users away at once.

How a slot that is free again reaches the workers matters: before the compressions of a step where
its blocks may be packed into by one of them, and behind them where one of them still reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.scheduling.slots import Slots


@dataclass(eq=False)
class Context:
    """A packed prefix that requests share."""

    key: bytes
    """Its tokens and all that its packing depends on."""
    num_tokens: int
    """n, whole blocks: it was compressed when so many tokens were computed."""
    packing: Packing
    slot: int
    """State slot that describes its pages."""
    owner: str
    """Request that computed it."""
    ratio: float | None = None
    """What a mass budget came to; None: C follows from the budget."""
    blocks: tuple[int, ...] = ()
    """Its C packed blocks."""
    users: set[str] = field(default_factory=set)
    """Requests whose rows start with its blocks."""
    curve: LossCurve | None = None
    """Once the worker has reported it."""
    hits: int = 0
    """Requests that took it instead of computing it."""
    retired: bool = False
    """No request takes it any more."""

    @property
    def name(self) -> str:
        """For people; says nothing about its text."""
        return self.key.hex()[:32]


class Contexts:
    """All contexts of an engine, and who computes, uses and awaits one.

    Args:
        slots: state slots for them, apart from those of requests.

    Attributes:
        on_drop: told of a context whose blocks are no longer its own.
    """

    def __init__(self, slots: range) -> None:
        self.on_drop: Callable[[Context], None] = lambda context: None
        self._slots = Slots(len(slots))
        self._first_slot = slots.start
        self._by_key: dict[bytes, Context] = {}
        self._by_block: dict[int, Context] = {}
        self._retired: set[Context] = set()
        self._computing: dict[bytes, str] = {}
        self._released: list[int] = []
        self._dropped: list[int] = []
        self._compressed = False

    def __iter__(self) -> Iterator[Context]:
        """Those that a request may take, least recently used first."""
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def described(self) -> list[Context]:
        """Those that the workers know: retired ones that are in use included."""
        return [*self._by_key.values(), *self._retired]

    def get(self, key: bytes) -> Context | None:
        """The context under a key."""
        return self._by_key.get(key)

    def begin(self, key: bytes, request_id: str) -> None:
        """Note that a request computes a context; the first one counts."""
        self._computing.setdefault(key, request_id)

    def stop(self, key: bytes, request_id: str) -> None:
        """Note that a request computes it no longer, whatever came of it."""
        if self._computing.get(key) == request_id:
            del self._computing[key]

    def computing(self, key: bytes) -> str | None:
        """Who computes a context now."""
        return self._computing.get(key)

    def new(
        self, key: bytes, num_tokens: int, packing: Packing, owner: str, ratio: float | None
    ) -> Context | None:
        """A context that is about to be packed, with a state slot; ``add`` it once it has blocks.
        None: it is held already, or all slots belong to contexts in use."""
        if key in self._by_key:
            return None
        if not self._slots:
            idle = next((context for context in self if not context.users), None)
            if idle is None:
                return None
            self._drop(idle)
        if not self._slots:
            return None  # that one's slot is free with the next step only
        slot = self._first_slot + self._slots.take()
        return Context(key, num_tokens, packing, slot, owner, ratio)

    def add(self, context: Context, blocks: Iterable[int]) -> None:
        """Offer a context to all, packed into these blocks; its owner is the first user."""
        context.blocks = tuple(blocks)
        self._by_key[context.key] = context
        self._by_block.update(dict.fromkeys(context.blocks, context))
        context.users.add(context.owner)

    def join(self, context: Context, request_id: str) -> None:
        """Note that a request takes it."""
        context.users.add(request_id)
        context.hits += 1
        self._by_key[context.key] = self._by_key.pop(context.key)

    def leave(self, context: Context, request_id: str, compressed: bool = False) -> None:
        """Note that a request has it no longer.

        Args:
            compressed: because it is packed anew in the step that is being planned, which reads it.
        """
        context.users.discard(request_id)
        if context.retired and not context.users:
            self._drop(context, late=compressed)
        elif not context.retired:
            self._by_key[context.key] = self._by_key.pop(context.key)

    def retire(self, context: Context) -> None:
        """Offer it to nobody any more; it goes with its last user."""
        if context.retired:
            return
        context.retired = True
        del self._by_key[context.key]
        self._retired.add(context)
        if not context.users:
            self._drop(context)

    def never_packed(self, slot: int) -> None:
        """Retire a context whose compression is not carried out: its request was preempted in the
        same step."""
        for context in list(self):
            if context.slot == slot:
                self.retire(context)

    def clear(self) -> None:
        """Retire all."""
        for context in list(self):
            self.retire(context)

    def reallocated(self, blocks: Iterable[int]) -> None:
        """Forget contexts of which a block was given to somebody else."""
        if not self._by_block:
            return
        for block in blocks:
            context = self._by_block.get(block)
            if context is not None:
                self._drop(context)

    def take_released(self) -> list[int]:
        """State slots that are free before the compressions of a step; from now on, as blocks are
        allocated for it, only behind them."""
        self._compressed = True
        released, self._released = self._released, []
        return released

    def take_dropped(self) -> list[int]:
        """State slots that are free behind the compressions of the step, which is planned now."""
        self._compressed = False
        dropped, self._dropped = self._dropped, []
        for slot in dropped:
            self._slots.give(slot - self._first_slot)
        return dropped

    def _drop(self, context: Context, late: bool = False) -> None:
        if context.users:
            raise RuntimeError(
                f"kv_compress: blocks {context.blocks} of a context were given away while "
                f"{len(context.users)} requests use them"
            )
        if not context.retired:
            del self._by_key[context.key]  # of a retired one, another has the key by now
        context.retired = True
        self._retired.discard(context)
        for block in context.blocks:
            del self._by_block[block]
        if late or self._compressed:
            self._dropped.append(context.slot)
        else:
            self._released.append(context.slot)
            self._slots.give(context.slot - self._first_slot)
        self.on_drop(context)
