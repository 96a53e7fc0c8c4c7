# SPDX-License-Identifier: Apache-2.0
"""Rejection sampling of drafted tokens, which vLLM's CPU build has in C++ and its CUDA wheel in
Triton: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding"
(arXiv 2211.17192), algorithm 1.

R requests have drafted T tokens in all, at most S each; ``ends`` ``[R]`` counts them up to and with
each request. ``output`` ``[R, S + 1]`` comes filled with -1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def _drafts(ends: Tensor, greedy: Tensor | None, wanted: bool) -> Iterator[tuple[int, slice]]:
    """The requests that sample greedily, or those that do not, with their drafted tokens."""
    for row, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        if (greedy is None or bool(greedy[row])) == wanted:
            yield row, slice(begin, end)


def greedy_sample(
    output: Tensor,
    ends: Tensor,
    draft: Tensor,
    argmax: Tensor,
    bonus: Tensor,
    greedy: Tensor | None,
    max_spec_len: int,
) -> None:
    """Take what the model would have said, up to and with the first drafted token that differs."""
    bonus = bonus.view(-1)
    for row, drafts in _drafts(ends, greedy, True):
        said, count = argmax[drafts], drafts.stop - drafts.start
        wrong = (draft[drafts] != said).nonzero()
        accepted = int(wrong[0]) if len(wrong) else count
        output[row, : accepted + 1] = torch.cat([said, bonus[row : row + 1]])[: accepted + 1]


def random_sample(
    output: Tensor,
    ends: Tensor,
    draft: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    bonus: Tensor,
    recovered: Tensor,
    uniform: Tensor,
    greedy: Tensor,
    max_spec_len: int,
    vocab_size: int,
    no_draft_probs: bool,
) -> None:
    """Accept a drafted token with the probability that keeps the model's distribution; where one
    is rejected, take the recovered one. -1 among the drafted tokens is padding."""
    bonus = bonus.view(-1)
    token = draft.clamp(min=0)[:, None]
    p = target_probs.gather(1, token)[:, 0]
    q = torch.ones_like(p)
    if draft_probs is not None and not no_draft_probs:
        q = draft_probs.gather(1, token)[:, 0]
    refused = ~((q > 0) & (p >= uniform * q)) | (draft < 0)
    for row, drafts in _drafts(ends, greedy, False):
        wrong, count = refused[drafts].nonzero(), drafts.stop - drafts.start
        accepted = int(wrong[0]) if len(wrong) else count
        last = recovered[drafts][accepted : accepted + 1] if len(wrong) else bonus[row : row + 1]
        output[row, : accepted + 1] = torch.cat([draft[drafts][:accepted], last])


def recovered_tokens(
    output: Tensor,
    ends: Tensor,
    draft: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    inverse: Tensor,
    vocab_size: int,
    no_draft_probs: bool,
) -> None:
    """Draw of each drafted token's place another one, from what the model's distribution has beyond
    the draft's; ``inverse`` ``[R, V]`` is 1 / exponential noise."""
    for row, drafts in _drafts(ends, None, True):
        if draft_probs is None or no_draft_probs:
            rest = target_probs[drafts].scatter(1, draft[drafts].clamp(min=0)[:, None], 0.0)
        else:
            rest = (target_probs[drafts] - draft_probs[drafts]).clamp(min=0)
        output[drafts] = (rest * inverse[row]).argmax(dim=-1).to(output.dtype)


def expand(
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,  # noqa: N803 - vLLM's name
) -> None:
    """Repeat what holds for a request for each of its drafted tokens, of any dtype."""
    values = torch.where(input_val == replace_from, replace_to, input_val).to(output.dtype)
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    output.copy_(torch.repeat_interleave(values, counts.long()))


OPS: dict[str, Callable[..., None]] = {
    "rejection_greedy_sample_kernel_impl(Tensor(a!) output, Tensor ends, Tensor draft, "
    "Tensor argmax, Tensor bonus, Tensor? greedy, int max_spec_len) -> ()": greedy_sample,
    "rejection_random_sample_kernel_impl(Tensor(a!) output, Tensor ends, Tensor draft, "
    "Tensor? draft_probs, Tensor target_probs, Tensor bonus, Tensor recovered, Tensor uniform, "
    "Tensor greedy, int max_spec_len, int vocab_size, bool no_draft_probs) -> ()": random_sample,
    "sample_recovered_tokens_kernel_impl(Tensor(a!) output, Tensor ends, Tensor draft, "
    "Tensor? draft_probs, Tensor target_probs, Tensor inverse, int vocab_size, "
    "bool no_draft_probs) -> ()": recovered_tokens,
}
"""By schema; vLLM's fallbacks for CPU call them."""


def mend_expand() -> None:
    """vLLM's own fallback makes integers of what it expands, temperatures among them, and drops
    the result where the dtype was another."""
    from vllm.utils import cpu_triton_utils

    cpu_triton_utils._expand_kernel_impl = expand
    kernel = getattr(cpu_triton_utils, "expand_kernel", None)
    if kernel is not None:  # before 0.31 vLLM has wrapped it by now
        module: Any = cpu_triton_utils
        module.expand_kernel = type(kernel)(expand)
