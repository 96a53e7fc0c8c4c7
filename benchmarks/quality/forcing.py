# SPDX-License-Identifier: Apache-2.0
"""Have the engine generate a given text: each step's sampled token is replaced before it is used.

A request names its tokens in ``extra_args`` under :data:`KEY`; after them it generates freely. What
is replaced is what the sampler returns, so the next step reads the given token wherever it takes
its input from, under asynchronous scheduling too; and vLLM's raw logprobs (its default) are those
of the model for the given token.

vLLM has two model runners. V1 lets logits processors speak before it samples. V2 has no such place
(asked for one, vLLM falls back to V1), so there the sampler of this one runner is wrapped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

KEY = "quality_forced_tokens"


def attach(runner: Any) -> None:
    """Force tokens on a runner from now on; call once, when it is ready for requests."""
    if hasattr(runner, "req_states"):
        force_samples(runner.sampler, runner.max_num_reqs, runner.max_model_len, runner.device)
    else:
        # The engine would take its class by name, too, but then choose this runner on every GPU.
        runner.input_batch.logitsprocs.non_argmax_invariant.append(ForcedTokens())


def forced_of(params: Any) -> list[int]:
    """The tokens that a request is to generate first."""
    given: list[int] = (getattr(params, "extra_args", None) or {}).get(KEY, [])
    return given


class ForcedTokens(LogitsProcessor):
    """Runner V1: leaves a row of logits one choice."""

    def __init__(self, *_: Any) -> None:
        self._requests: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, self._entry)

    def apply(self, logits: Tensor) -> Tensor:
        # Of the output only the length is read: with asynchronous scheduling its last tokens are
        # placeholders.
        next_tokens = {
            row: forced[len(output)]
            for row, (forced, output) in self._requests.items()
            if len(output) < len(forced)
        }
        if next_tokens:
            rows = torch.tensor(list(next_tokens), device=logits.device)
            tokens = torch.tensor(list(next_tokens.values()), device=logits.device)
            logits[rows] = float("-inf")
            # Not its own logit: that of an end of text is -inf until min_tokens are there.
            logits[rows, tokens] = 0.0
        return logits

    @staticmethod
    def _entry(
        params: Any, prompt: list[int] | None, output: list[int]
    ) -> tuple[list[int], list[int]] | None:
        forced = forced_of(params)
        return (forced, output) if forced else None


def force_samples(sampler: Any, max_requests: int, max_tokens: int, device: Any) -> None:
    """Runner V2: replaces what its sampler draws.

    Args:
        sampler: its methods ``add_request`` and ``sample`` are wrapped.
        max_requests: rows of its state.
        max_tokens: longest request.
    """
    stock_add, stock_sample = sampler.add_request, sampler.sample
    # By position in the request, so that one which comes back after a preemption is right at once.
    table = torch.full((max_requests, max_tokens + 1), -1, dtype=torch.int64, device=device)

    def add_request(row: int, prompt_len: int, params: Any) -> None:
        stock_add(row, prompt_len, params)
        table[row] = -1
        forced = forced_of(params)
        table[row, prompt_len : prompt_len + len(forced)] = torch.tensor(forced, dtype=table.dtype)

    def sample(
        logits: Tensor, rows: Tensor, rows_np: Any, positions: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        sampled, processed = stock_sample(logits, rows, rows_np, positions, *args, **kwargs)
        forced = table[rows.long(), positions.long() + 1]
        return torch.where(forced < 0, sampled, forced.to(sampled.dtype)), processed

    sampler.add_request, sampler.sample = add_request, sample
