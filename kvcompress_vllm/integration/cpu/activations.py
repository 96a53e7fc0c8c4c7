# SPDX-License-Identifier: Apache-2.0
"""The activations that vLLM's layers look up among its kernels when they are built.

On CPU vLLM then computes most of them in PyTorch, but a model whose activation has no kernel of
that name cannot even be built. So each of them is here, with the signature of vLLM's kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


def _gelu_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


def _gelu_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], None]:
    """``out = activation(x[..., :d]) * x[..., d:]``."""

    def op(out: Tensor, x: Tensor) -> None:
        gate, up = x.chunk(2, dim=-1)
        torch.mul(activation(gate), up, out=out)

    return op


def _plain(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], None]:
    def op(out: Tensor, x: Tensor) -> None:
        out.copy_(activation(x))

    return op


def _mul_and_silu(out: Tensor, x: Tensor) -> None:
    up, gate = x.chunk(2, dim=-1)
    torch.mul(up, silu(gate), out=out)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "silu_and_mul": _gated(silu),
    "mul_and_silu": _mul_and_silu,
    "gelu_and_mul": _gated(gelu),
    "gelu_tanh_and_mul": _gated(_gelu_tanh),
    "gelu_new": _plain(_gelu_new),
    "gelu_fast": _plain(_gelu_new),  # the same formula, with the root written as a number
    "gelu_quick": _plain(_gelu_quick),
}
"""By the name of vLLM's kernel, ``(Tensor! out, Tensor input) -> ()``."""
