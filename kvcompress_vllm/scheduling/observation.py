# SPDX-License-Identifier: Apache-2.0
"""Which queries of a request are observed, and how far a step of its prefill may go for that.

Usually the last ``window`` queries before a compression. A policy that judges by all queries
observes every ``query_stride``-th query of the prefill; what a step of it observed is added to the
accumulated statistics of whole blocks before the next step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.records.plan import Observation, Observed
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.segments import SEGMENT
from kvcompress_vllm.scheduling.sizes import NEVER


def check_steps(config: KVCompressConfig, block_size: int, step_tokens: int) -> None:
    """Refuse what would never observe whole blocks.

    Args:
        step_tokens: tokens of one request that a step computes at most.

    Raises:
        ValueError: with the numbers.
    """
    stride, window = config.query_stride, config.window
    if not stride:
        return
    if stride * window < block_size:
        raise ValueError(
            f"kv_compress: query_stride={stride} and window={window} are too small: their product "
            f"must reach the block size of {block_size} tokens"
        )
    if step_tokens < block_size:
        raise ValueError(
            f"kv_compress: query_stride={stride} needs steps of whole blocks: "
            f"--max-num-batched-tokens and --long-prefill-token-threshold must reach the block "
            f"size of {block_size} tokens, and one is {step_tokens}"
        )


def check_room(
    config: KVCompressConfig, block_size: int, step_tokens: int, most_requests: int, each: int
) -> None:
    """Refuse steps that may have no room for a block of a prompt beside generations: it would wait
    until enough of these have ended, and all that come later behind it.

    Args:
        step_tokens: tokens that a step computes at most.
        most_requests: those that run at once.
        each: tokens that a step computes of a generation at most.

    Raises:
        ValueError: with the numbers and the ways out.
    """
    others = (most_requests - 1) * each
    if not config.query_stride or step_tokens - others >= block_size:
        return
    fewer = (step_tokens - block_size) // each + 1
    raise ValueError(
        f"kv_compress: query_stride={config.query_stride} needs steps with room for a block of a "
        f"prompt beside all that decode: --max-num-batched-tokens, and --max-num-scheduled-tokens "
        f"where it is given, must be at least {others + block_size} ({block_size}, and {each} for "
        f"each of {most_requests - 1} others), and one is {step_tokens}; or --max-num-seqs at most "
        f"{fewer}, or query_stride=0, by which the last queries alone are judged by"
    )


def observed_history(budget: RequestBudget) -> int | None:
    """Tokens before a prompt's compression whose queries are observed, for a policy that judges by
    all queries; None: only those of the window count."""
    if not budget.query_stride:
        return None
    return NEVER if budget.history is None else budget.history


def first_observed(budget: RequestBudget, due_at: int, window: int) -> int:
    """The first position of a prompt that must be computed, not taken from the prefix cache: what
    others computed has no observed queries."""
    return 0 if budget.query_stride else max(0, due_at - window)


def observe(
    tracked: Tracked, window: int, first_token: int, num_tokens: int
) -> Iterator[Observation]:
    """What to observe of ``num_tokens`` tokens from position ``first_token`` on."""
    slot, due_at = tracked.observe_slot, tracked.due_at
    if slot is None:
        slot = tracked.listen_slot
    if slot is None or first_token >= due_at:
        return
    passes = first_token < tracked.heard_until < first_token + num_tokens
    if passes and first_token < tracked.prefill_end:
        # The rest of a segment that was taken over, whose first queries wait in the slot: no prompt
        # that goes on behind it may take their places. For drafted tokens a slot has others.
        heard, begin = tracked.heard_slot, tracked.heard_until - SEGMENT
        taken = slot if heard is None else heard
        yield Observation(
            tracked.request_id, taken, first_token, begin, observe_until=tracked.heard_until
        )
        if heard is None:
            return
    observe_from, stride = max(0, due_at - window), 1
    if tracked.listen_slot is not None and tracked.listened < observe_from:
        observe_from = tracked.listened
    if due_at <= tracked.prefill_end:
        history = observed_history(tracked.budget)
        if history is not None:
            observe_from = max(0, _observed_from(tracked, history))
            stride = tracked.budget.query_stride
    if first_token + num_tokens > observe_from:
        yield Observation(tracked.request_id, slot, first_token, observe_from, stride, due_at)


def observed(tracked: Tracked, window: int, num_tokens: int) -> Observed | None:
    """What the observation slot holds once ``num_tokens`` tokens are computed; None: the last
    ``window`` queries, and there are no accumulated statistics."""
    history = observed_history(tracked.budget)
    if history is None:
        return None
    if tracked.in_prefill:
        first, stride = _observed_from(tracked, history), tracked.budget.query_stride
    else:
        first, stride = max(tracked.accumulated, num_tokens - window), 1
    count = max(0, -(-(num_tokens - first) // stride))
    return Observed(min(count, window), stride, tracked.known, tracked.counted)


def count(tracked: Tracked, num_tokens: int, seen: Observed | None) -> None:
    """Note that the accumulated statistics count what was observed of ``num_tokens`` tokens."""
    tracked.accumulated = num_tokens
    tracked.known = num_tokens // tracked.sizes.limits.block_size
    tracked.counted += seen.num_queries if seen is not None else 0


def outgrowing(
    requests: Iterable[Tracked], num_computed: Mapping[str, int], ahead: int
) -> list[tuple[int, Tracked]]:
    """Requests that must be observed from now on, or should have been, and their computed tokens;
    who is overdue longest comes first: it gives back most.

    Args:
        ahead: the window, and what the next step may compute of it if it starts before.
    """
    near = [
        (computed, tracked)
        for tracked in requests
        if tracked.observe_slot is None
        and (computed := num_computed.get(tracked.request_id, 0)) >= tracked.due_at - ahead
    ]
    return sorted(near, key=lambda item: item[1].due_at - item[0])


def accumulate(
    observed_ones: Iterable[Tracked], num_computed: Mapping[str, int], window: int
) -> Iterator[tuple[Tracked, Observed]]:
    """See :meth:`CompressionPlanner.accumulate`."""
    for tracked in observed_ones:
        computed = num_computed.get(tracked.request_id, 0)
        if not tracked.in_prefill:
            continue
        if not tracked.accumulated < computed < tracked.due_at:
            continue
        seen = observed(tracked, window, computed)
        if seen is not None and seen.num_queries:
            count(tracked, computed, seen)
            yield tracked, seen


def chunk(tracked: Tracked, window: int, first_token: int, num_tokens: int) -> int:
    """How many of ``num_tokens`` tokens from ``first_token`` on the next step may compute of a
    request that is, or would be, observed; see :meth:`CompressionPlanner.chunk`."""
    due_at, block_size = tracked.due_at, tracked.sizes.limits.block_size
    if tracked.observe_slot is None or not tracked.in_prefill:
        return num_tokens
    if first_token >= due_at:
        waits = tracked.awaits_curve or tracked.awaits_replay
        return 0 if waits and due_at < tracked.prefill_end else num_tokens
    end = min(first_token + num_tokens, due_at)
    history = observed_history(tracked.budget)
    if history is not None:
        observed_from = due_at - history
        if first_token < observed_from:
            end = min(end, -(-observed_from // block_size) * block_size)
        else:
            end = min(end, first_token + window * tracked.budget.query_stride)
        if end < due_at:  # statistics are of whole blocks
            end -= end % block_size
    return max(0, end - first_token)


def _observed_from(tracked: Tracked, history: int) -> int:
    return max(tracked.accumulated, tracked.due_at - history)
