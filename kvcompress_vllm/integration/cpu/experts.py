# SPDX-License-Identifier: Apache-2.0
"""Experts in PyTorch, an expert at a time: newer releases of vLLM have kernels of its CPU build for
them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu


def _swiglu_oai(x: Tensor) -> Tensor:
    """gpt-oss's: gate and up stand side by side, both are clamped."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    return apply


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _gated(silu),
    "gelu": _gated(gelu),
    "gelu_tanh": _gated(lambda gate: gelu(gate, approximate="tanh")),
    "swigluoai": _swiglu_oai,
}


def prepack(weight: Tensor, output: Tensor, isa: str) -> None:
    """Weights stay as they are."""
    output.copy_(weight)


def fused_experts(
    output: Tensor,
    tokens: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    skip_weighted: bool,
    act: str,
    isa: str,
) -> None:
    """``output[t] = sum over k of topk_weights[t, k] * expert(topk_ids[t, k])(tokens[t])``.

    Args:
        output: ``[T, hidden]``, written.
        w13: ``[E, 2 * inner, hidden]``.
        w2: ``[E, hidden, inner]``.
        topk_weights: ``[T, K]``, 1 where ``skip_weighted``.
    """
    found = torch.zeros(output.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        inner = linear(tokens[token], w13[expert], None if w13_bias is None else w13_bias[expert])
        each = linear(
            ACTIVATIONS[act](inner), w2[expert], None if w2_bias is None else w2_bias[expert]
        ).float()
        if not skip_weighted:
            each = each * topk_weights[token, choice, None].float()
        found.index_add_(0, token, each)
    output.copy_(found)


OPS: dict[str, Callable[..., None]] = {
    "prepack_moe_weight(Tensor weight, Tensor(a!) output, str isa) -> ()": prepack,
    "cpu_fused_moe(Tensor(a!) output, Tensor tokens, Tensor w13, Tensor w2, Tensor? w13_bias, "
    "Tensor? w2_bias, Tensor topk_weights, Tensor topk_ids, bool skip_weighted, str act, str isa) "
    "-> ()": fused_experts,
}
