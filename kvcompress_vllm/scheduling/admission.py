# SPDX-License-Identifier: Apache-2.0
"""Whether one more prompt fits: what every request will hold, not what it holds now.

vLLM admits a prompt when its blocks are free at that moment, and preempts later what has grown too
large. With compression most requests are small at any moment and will grow, so that rule admits too
many, and each preempted one is prefilled again. Here the blocks of all running requests are
forecast. No vLLM types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.scheduling.newcomers import Newcomers
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.sizes import NEVER, NOTHING

UNBOUNDED = 1 << 30


class Load(NamedTuple):
    """What one request holds as time goes on.

    During ``prefill_steps`` it holds ``prompt`` blocks; then ``start`` blocks, and one more every
    ``block_size`` tokens. Whenever it would exceed ``most`` it falls by ``interval``. It gives
    everything back after ``tokens_left`` tokens.
    """

    prefill_steps: int
    prompt: int
    start: int
    most: int
    interval: int
    tokens_left: int


def load(
    newcomers: Newcomers,
    tracked: Tracked | None,
    num_computed: int,
    num_tokens: int,
    tokens_left: int,
    max_batched_tokens: int,
    budget: RequestBudget | None = None,
    num_requests: int = 1,
) -> Load:
    """Describe a running request, or one that would start its prefill now.

    Args:
        tracked: None for a candidate, and for one that will never be compressed.
        num_computed: tokens whose K/V is computed.
        num_tokens: tokens known, prompt and output so far.
        tokens_left: tokens it will probably still generate.
        max_batched_tokens: tokens in a step.
        budget: of a candidate, or one that is not tracked; None: the configured one.
        num_requests: that run, this one included; they take turns at the observation slots.
    """
    block_size = newcomers.limits.block_size
    prefill = max(0, num_tokens - 1 - num_computed)
    sizes = tracked.sizes if tracked is not None else newcomers.forecast(budget)
    if prefill and tracked is not None and tracked.kept and not tracked.in_prefill:
        # Its context is packed, and what follows it stays as it is.
        whole, packing, due_at = -(-num_tokens // block_size), tracked.packing, tracked.due_at
        held = packing.held(whole)
    elif prefill and sizes.stride:
        held = whole = -(-num_tokens // block_size)
        packing, due_at = sizes.at_marks(num_tokens)
    elif prefill:
        held = whole = -(-num_tokens // block_size)
        sizes, peak = newcomers.forecast(tracked.budget if tracked else budget), None
        packing = sizes.packed(num_tokens)
        if packing.gains:
            peak = newcomers.limits.peak_blocks
        else:
            packing = NOTHING
        due_at = sizes.outgrown_at(packing)
        context = sizes.context
        if context is not None and context < num_tokens and sizes.reaches_context:
            at_context = sizes.packed_at(context, num_tokens)
            later = sizes.next_due(at_context, context, num_tokens)
            if later > num_tokens:  # else it is packed again at its end
                packing, due_at = at_context, later
        if peak is not None:
            held = min(whole, peak + peak // 2)
    else:
        held = whole = -(-num_computed // block_size)
        packing = tracked.packing if tracked else NOTHING
        due_at = tracked.due_at if tracked else NEVER
    start = packing.held(whole)
    interval = newcomers.interval(num_requests)
    most = UNBOUNDED
    if due_at != NEVER and newcomers.hears(sizes.budget, tracked, num_requests):
        late = interval - newcomers.limits.interval
        most = max(start, packing.held(due_at // block_size) + late)
        if sizes.stride:
            interval = max(1, packing.gives_back(sizes.packed(due_at)))
    steps = -(-prefill // max_batched_tokens)
    return Load(steps, held, start, most, interval, tokens_left)


def counted_twice(requests: Iterable[tuple[Tracked | None, int, Load]]) -> int:
    """Blocks that several requests hold together, in all but one of their loads. Only of those who
    will probably end before they are packed anew, and then have blocks of their own.

    Args:
        requests: each with the tokens known of it, and its load.
    """
    users = Counter(
        tracked.context
        for tracked, num_tokens, load in requests
        if tracked is not None
        and tracked.context is not None
        and tracked.due_at >= num_tokens + load.tokens_left
    )
    return sum((count - 1) * context.packing.kept for context, count in users.items())


HORIZON = 256
"""Steps that the forecast looks ahead. With a longer look fewer requests are preempted, but memory
lies idle until then; most of all where few requests fit."""


def most_blocks(
    loads: Sequence[Load], block_size: int, horizon: int = HORIZON, stride: int | None = None
) -> int:
    """Blocks that the requests will hold together at the worst moment ahead.

    Args:
        loads: one per request, the candidate included.
        block_size: tokens per block, B.
        horizon: steps to look ahead.
        stride: steps between the moments looked at; None: B.
    """
    if not loads:
        return 0
    prefill, prompt, start, most, interval, left = torch.tensor(loads).T[:, :, None]
    horizon = min(horizon, int((prefill + left).max()))
    step = torch.arange(0, horizon, stride or block_size)
    decoded = step - prefill
    grown = start + decoded.div(block_size, rounding_mode="floor")
    over = (grown - most).clamp(min=0)
    # Ceiling division: the first block too many costs a whole interval.
    held = grown - interval * -(-over).div(interval, rounding_mode="floor")
    held = torch.where(decoded < 0, prompt, torch.where(decoded < left, held, 0))
    return int(held.sum(0).max())


def at_most_blocks(loads: Iterable[Load], block_size: int, horizon: int = HORIZON) -> int:
    """No less than :func:`most_blocks`, as if all were largest at once; for a fraction of the
    time. The arguments are the same."""
    return sum(
        max(one.prompt, min(one.start + min(one.tokens_left, horizon) // block_size, one.most))
        for one in loads
    )


class OutputLength:
    """Guesses how many tokens a request will generate, from those that finished.

    ``max_tokens`` is only a bound: clients often send a huge one, or none.
    """

    PRIOR = 512
    WEIGHT = 0.1

    def __init__(self) -> None:
        self.mean: float = self.PRIOR

    def finished(self, num_output_tokens: int) -> None:
        """Learn from a finished request."""
        self.mean += self.WEIGHT * (num_output_tokens - self.mean)

    def left(self, num_output_tokens: int, max_tokens: int) -> int:
        """Tokens that a request with ``num_output_tokens`` so far will probably still generate."""
        # One that has outlived the guess is taken to be good for another quarter.
        guess = max(self.mean, 1.25 * num_output_tokens) - num_output_tokens
        return max(1, min(int(guess), max_tokens - num_output_tokens))
