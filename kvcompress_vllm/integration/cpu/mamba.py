# SPDX-License-Identifier: Apache-2.0
"""The kernels of Mamba 2 layers, which vLLM has in Triton only: the recurrence, token by token.

Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 2; n heads of p channels, groups of
heads that share B and C, states of s numbers per channel. Without vLLM's prefix caching, and
without speculation.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

_MIXER = "vllm.model_executor.layers.mamba.mamba_mixer2"


def _step(
    state: Tensor, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """States ``[..., n, p, s]`` after a token, and what it puts out, ``[..., n, p]``.

    Args:
        x: ``[..., n, p]``; ``dt`` alike, or ``[..., n, 1]``.
        decay: ``[n, p, s]``, or ``[n, 1, 1]``: A.
        b, c: ``[..., n, s]``.
        skip: ``[n, p]``, or ``[n, 1]``: D.
    """
    grown = state * torch.exp(dt[..., None] * decay) + (dt * x)[..., None] * b[..., None, :]
    y = (grown * c[..., None, :]).sum(-1)
    return grown, y if skip is None else y + skip * x


def _by_name(rest: tuple[Any, ...]) -> None:
    """vLLM names what these take beyond their first arguments; the order differs from theirs."""
    if rest:
        raise TypeError(f"kv_compress: {len(rest)} arguments of a Mamba kernel came without a name")


def _by_head(shared: Tensor, heads: int) -> Tensor:
    """``[..., groups, s]`` for each of n heads."""
    return shared.float().repeat_interleave(heads // shared.shape[-2], -2)


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 - vLLM's names
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    *rest: Any,
    cu_seqlens: Tensor,
    out: Tensor,
    D: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    state_dtype: torch.dtype | None = None,
    final_states_out: Tensor | None = None,
    final_state_indices: Tensor | None = None,
    **ignored: Any,
) -> Tensor:
    """``mamba_chunk_scan_combined_varlen``: whole prompts, or chunks of them. Chunks of the kernel,
    and limits of ``dt`` that nothing reaches, do not matter to a recurrence.

    Returns:
        ``[R, n, p, s]``, the states behind each request's tokens.
    """
    _by_name(rest)
    heads, channels = x.shape[1:]
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = (softplus(step) if dt_softplus else step)[..., None]
    b, c, xs = _by_head(B, heads), _by_head(C, heads), x.float()
    decay = A.float()[:, None, None]
    skip = None if D is None else D.float().view(heads, -1)
    ends, states = cu_seqlens.tolist(), []
    for row, (begin, end) in enumerate(pairwise(ends)):
        state = torch.zeros(heads, channels, B.shape[-1])
        if initial_states is not None:
            state = initial_states[row].float()
        for t in range(begin, end):
            state, y = _step(state, xs[t], step[t], decay, b[t], c[t], skip)
            out[t] = y
        states.append(state)
    found = torch.cat([state[None] for state in states]).to(state_dtype or x.dtype)
    if final_states_out is not None and final_state_indices is not None:  # newer releases
        final_states_out[final_state_indices.long()] = found
    return found


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 - vLLM's names
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    dt_bias: Tensor,
    *rest: Any,
    state_batch_indices: Tensor,
    out: Tensor,
    dt_softplus: bool = False,
    **ignored: Any,
) -> None:
    """``selective_state_update``: one token of each request."""
    _by_name(rest)
    index = state_batch_indices.flatten().long()
    step = dt.float() + dt_bias.float()
    step = softplus(step) if dt_softplus else step
    heads = x.shape[1]
    grown, y = _step(
        state[index].float(), x.float(), step, A.float(), _by_head(B, heads), _by_head(C, heads),
        D.float(),
    )  # fmt: skip
    state[index] = grown.to(state.dtype)
    out.copy_(y)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
    conv_states: Tensor,
    query_start_loc: Tensor,
    cache_indices: Tensor,
    has_initial_state: Tensor,
    activation: str | None = "silu",
    **ignored: Any,
) -> Tensor:
    """``causal_conv1d_fn``: each channel of ``x`` ``[channels, T]``, request by request.

    Args:
        weight: ``[channels, width]``.
        conv_states: ``[N, channels, width - 1]``, the latest tokens of requests; updated.
    """
    _by_name(rest)
    out = torch.empty_like(x)
    width = weight.shape[1]
    for row, (begin, end) in enumerate(pairwise(query_start_loc.tolist())):
        state = conv_states[int(cache_indices.flatten()[row])]
        before = state if bool(has_initial_state[row]) else torch.zeros_like(state)
        seen = torch.cat([before.to(x.dtype), x[:, begin:end]], -1)
        found = (seen.unfold(-1, width, 1) * weight[:, None]).sum(-1)
        out[:, begin:end] = _activated(found, bias, activation, -1)
        state.copy_(seen[:, 1 - width :])
    return out


def convolution_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *rest: Any,
    conv_state_indices: Tensor,
    **ignored: Any,
) -> Tensor:
    """``causal_conv1d_update``: one token of each request, ``[R, channels]``."""
    _by_name(rest)
    index = conv_state_indices.flatten().long()
    seen = torch.cat([conv_state[index].to(x.dtype), x[..., None]], -1)
    conv_state[index] = seen[..., 1:].to(conv_state.dtype)
    return _activated((seen * weight).sum(-1), bias, activation, 0)


def _activated(x: Tensor, bias: Tensor | None, activation: str | None, dim: int) -> Tensor:
    if bias is not None:
        x = x + (bias[:, None] if dim else bias)
    return silu(x) if activation in ("silu", "swish") else x


def install() -> None:
    """Have Mamba 2 layers call these, if there are any; idempotent."""
    mixer: Any = sys.modules.get(_MIXER)
    if mixer is not None:
        mixer.mamba_chunk_scan_combined_varlen = chunk_scan
        mixer.selective_state_update = state_update
        mixer.causal_conv1d_fn = convolution
        mixer.causal_conv1d_update = convolution_update
