# SPDX-License-Identifier: Apache-2.0
"""What of the CUDA backend needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.v1.attention.backends import fa_utils

from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.cache.state import PackedState, stacked_sinks
from kvcompress_vllm.integration.worker.attention import KVCompressImpl
from kvcompress_vllm.integration.worker.cuda_attention import (
    KVCompressCudaImpl,
    KVCompressCudaMetadata,
    PrefillRows,
)
from kvcompress_vllm.integration.worker.metadata import StepContext
from kvcompress_vllm.ops import reference
from kvcompress_vllm.records.group import CacheGroup


def test_zeros_are_for_profile_runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    impl = KVCompressCudaImpl(2, 32, 1.0)
    query = torch.ones(3, 64)
    empty = torch.empty(0, dtype=torch.int32)
    meta = KVCompressCudaMetadata(3, empty, empty, empty, empty, empty, empty)

    def forward(metadata: KVCompressCudaMetadata | None) -> torch.Tensor:
        output = torch.ones(3, 64)
        return impl.forward(None, query, query, query, query, metadata, output)  # type: ignore[arg-type]

    assert not forward(None).any()
    with pytest.raises(RuntimeError, match="before the worker has bound its state, on 3 tokens"):
        forward(meta)
    monkeypatch.setattr(KVCompressImpl, "profiling", True)  # as vLLM measures its graphs
    assert not forward(meta).any()


CAP, SCALE = 2.0, 0.3


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("version", "dtype", "flash"),
    [
        (3, torch.bfloat16, True),
        (2, torch.bfloat16, False),  # knows no sinks
        (3, torch.float16, False),  # takes them in bfloat16 alone
    ],
)
def test_soft_caps_and_sinks_reach_both_kernels(
    version: int, dtype: torch.dtype, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks = torch.tensor([1.5, -0.5]).to(dtype)
    group = CacheGroup(1, 1, 2, 32, 16, 2, SCALE, soft_cap=CAP)
    state = PackedState(
        group, num_blocks=4, state_slots=1, observe_slots=1, window=4, dtype=dtype,
        device=torch.device("cpu"), sink_logits=stacked_sinks([sinks]),
    )  # fmt: skip
    pages = torch.randn(4, 16, 64).to(dtype)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: version)
    monkeypatch.setattr(
        fa_utils, "flash_attn_varlen_func", lambda **given: calls.append(given), raising=False
    )
    impl = KVCompressCudaImpl(2, 32, SCALE, 1, logits_soft_cap=CAP, sinks=sinks)
    impl.bind(StepContext(state, pages, {"layer": 0}, lambda _: {}), "layer")
    prefill = PrefillRows(False, 1, 3, ints(0, 3), ints(20), ints(2, 3)[None], ints(-1), 3, 20)
    meta = KVCompressCudaMetadata(
        4, ints(0, 1), ints(5), ints(1, 0)[None], torch.arange(4), ints(-1), ints(-1, -1, -1, -1),
        num_decode_tokens=1, prefills=[prefill],
    )  # fmt: skip
    query, output = torch.randn(4, 64).to(dtype), torch.zeros(4, 64, dtype=dtype)
    cache = pages.view(4, 1, 16, 64)
    impl.forward(None, query, query, query, cache, meta, output)  # type: ignore[arg-type]
    expected = torch.zeros(4, 2, 32, dtype=dtype)
    tables = ints().view(0, 1, 1), ints().view(0, 1, 1), ints(), None, PageFormat.AUTO
    reference.paged_attention(
        query.view(4, 2, 32), pages, torch.stack([ints(1, 0), ints(2, 3)]), ints(5, 20),
        ints(-1, -1), *tables, ints(0, 1, 4), 0, SCALE, expected, soft_cap=CAP,
        sink_logits=sinks.float(),
    )  # fmt: skip
    served = slice(0, 1 if flash else 4)
    torch.testing.assert_close(output.view(4, 2, 32)[served], expected[served])
    assert len(calls) == flash
    if flash:
        assert calls[0]["softcap"] == CAP and calls[0]["s_aux"] is sinks


def test_weights_that_are_loaded_again_bring_their_sinks() -> None:
    sinks = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    impl = KVCompressImpl(2, 32, SCALE, 1, sinks=sinks)
    read = impl.logits["sink_logits"]
    assert read is not None
    sinks.copy_(torch.tensor([3.0, 4.0]))
    impl.process_weights_after_loading(torch.bfloat16)
    assert read.tolist() == [3.0, 4.0] and impl.logits["sink_logits"] is read


def test_layers_without_sinks_beside_others() -> None:
    both = stacked_sinks([None, torch.tensor([1.0, 2.0], dtype=torch.bfloat16)])
    assert both is not None and both.tolist() == [[-torch.inf] * 2, [1.0, 2.0]]
    assert stacked_sinks([None, None]) is None
    with pytest.raises(ValueError, match=r"sinks of shape \[3\] for 2 heads"):
        KVCompressImpl(2, 32, SCALE, 1, sinks=torch.zeros(3))
