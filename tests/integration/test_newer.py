# SPDX-License-Identifier: Apache-2.0
"""What the CPU platform mends in newer releases of vLLM."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from kvcompress_vllm.integration.cpu import experts, kernels, newer


class Library:
    """Like llvmlite's: whatever it is asked for, it makes."""

    @property
    def __dict__(self):  # type: ignore[override]
        return object()


def test_kernels_are_looked_for_among_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = pytest.importorskip("vllm.triton_utils.dispatcher")
    owner = types.SimpleNamespace(kernel="before")
    module = types.ModuleType("holds_a_library")
    module.lib, module.owner = Library(), owner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "holds_a_library", module)
    monkeypatch.delattr(dispatcher, "vars", raising=False)
    overrides = [(owner.kernel, "after")]
    with pytest.raises(AttributeError):
        dispatcher._rebind_kernels(overrides)
    newer.mend_kernel_scan()
    dispatcher._rebind_kernels(overrides)
    assert owner.kernel == "after"


@pytest.mark.parametrize("skip_weighted", [False, True])
@pytest.mark.parametrize("act", experts.ACTIVATIONS)
def test_experts(act: str, skip_weighted: bool) -> None:
    """Against every token and choice on its own, through the op that vLLM calls."""
    torch.manual_seed(0)
    tokens, w13, w2 = torch.randn(5, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    w13_bias, w2_bias = torch.randn(4, 12), torch.randn(4, 8)
    weights, ids = torch.rand(5, 2), torch.tensor([[0, 3], [3, 1], [1, 0], [0, 1], [3, 0]])
    packed, output = torch.empty_like(w13), torch.full((5, 8), float("nan"))
    kernels.register()
    torch.ops._C.prepack_moe_weight(w13, packed, "vec")
    torch.ops._C.cpu_fused_moe(
        output, tokens, packed, w2, w13_bias, w2_bias, weights, ids, skip_weighted, act, "vec"
    )
    for t in range(5):
        expected = torch.zeros(8)
        for k in range(2):
            e = int(ids[t, k])
            x = w13[e] @ tokens[t] + w13_bias[e]
            if act == "swigluoai":
                gate, up = x[::2].clamp(max=7), x[1::2].clamp(-7, 7)
                inner = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
            else:
                kind = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
                tanh = lambda x: torch.nn.functional.gelu(x, approximate="tanh")  # noqa: E731
                inner = kind.get(act, tanh)(x[:6]) * x[6:]
            each = w2[e] @ inner + w2_bias[e]
            expected += each if skip_weighted else weights[t, k] * each
        torch.testing.assert_close(output[t], expected, rtol=1e-4, atol=1e-4)
