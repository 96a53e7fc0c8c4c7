# SPDX-License-Identifier: Apache-2.0
"""What vLLM does around the steps of a draft model (EAGLE, MTP), which its CPU build has in C++ and
its CUDA wheel in Triton.

R requests have computed some tokens, of which at most the last S were drafted and may be rejected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def next_tokens(
    sampled: Tensor,
    discarded: Tensor,
    backup: Tensor,
    next_token: Tensor,
    num_valid: Tensor,
    vocab_size: int,
    num_sampled: int,
    num_requests: int,
) -> None:
    """The token behind those that are accepted of each request, and how many were sampled.

    Args:
        sampled: ``[R, S + 1]``, -1 where a drafted token was rejected.
        discarded: ``[R]`` bool: nothing was sampled, its prompt goes on.
        backup: ``[R]``, the token that comes then.
        next_token, num_valid: ``[R]``, written.
    """
    valid = (sampled >= 0) & (sampled < vocab_size) & ~discarded[: len(sampled), None]
    num_valid.copy_(valid.sum(1))
    last = (num_valid.clamp(min=1) - 1)[:, None]
    next_token.copy_(torch.where(num_valid > 0, sampled.gather(1, last)[:, 0], backup[: len(last)]))


def accepted_ends(
    ends: Tensor,
    num_valid: Tensor,
    query_start: Tensor,
    last_index: Tensor,
    num_rejected: Tensor,
    num_requests: int,
) -> None:
    """Where in the batch the last accepted token of each request is, and how many come behind.

    Args:
        ends: ``[R]``, drafted tokens up to and with each request.
        num_valid: ``[R]`` of :func:`next_tokens`.
        query_start: ``[R + 1]``.
        last_index, num_rejected: ``[R]``, written.
    """
    drafted = ends.diff(prepend=ends.new_zeros(1))
    num_rejected.copy_(torch.where(drafted > 0, drafted + 1 - num_valid, 0))
    last_index.copy_(query_start[1:] - 1 - num_rejected)


def advance(
    positions: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out_positions: Tensor,
    out_slots: Tensor,
    block_size: int,
    max_model_len: int,
    padding: int,
) -> None:
    """Go on to the next drafted token of each request; one beyond the longest request goes nowhere.

    Args:
        positions: ``[R]`` of the tokens before; may be ``out_positions``.
        block_table: ``[R, M]``.
        seq_lens: ``[R]``, changed.
        out_positions: ``[R]``, written.
        out_slots: ``[>= R]``, written; ``padding`` beyond R.
    """
    position = positions + 1
    beyond = position >= max_model_len
    position = torch.where(beyond, 0, position)
    index = position.div(block_size, rounding_mode="floor").clamp(max=block_table.shape[1] - 1)
    block = block_table.gather(1, index[:, None].long())[:, 0].long()
    count = len(position)
    out_positions.copy_(position)
    out_slots[count:].fill_(padding)
    out_slots[:count] = torch.where(beyond, padding, block * block_size + position % block_size)
    seq_lens.copy_(torch.where(beyond, 1, (seq_lens + 1).clamp(max=max_model_len)))


OPS: dict[str, Callable[..., None]] = {
    "eagle_prepare_next_token_padded_kernel_impl(Tensor sampled, Tensor discarded, Tensor backup, "
    "Tensor(a!) next_token, Tensor(b!) num_valid, int vocab_size, int num_sampled, "
    "int num_requests) -> ()": next_tokens,
    "eagle_prepare_inputs_padded_kernel_impl(Tensor ends, Tensor num_valid, Tensor query_start, "
    "Tensor(a!) last_index, Tensor(b!) num_rejected, int num_requests) -> ()": accepted_ends,
    "eagle_step_slot_mapping_metadata_kernel_impl(Tensor positions, Tensor block_table, "
    "Tensor(a!) seq_lens, Tensor(b!) out_positions, Tensor(c!) out_slots, int block_size, "
    "int max_model_len, int padding) -> ()": advance,
}
"""By schema; vLLM's fallbacks for CPU call them."""
