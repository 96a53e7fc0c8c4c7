# SPDX-License-Identifier: Apache-2.0
"""What of the CUDA backend needs no GPU."""

from __future__ import annotations

import pytest
import torch

from kvcompress_vllm.integration.worker.attention import KVCompressImpl
from kvcompress_vllm.integration.worker.cuda_attention import (
    KVCompressCudaImpl,
    KVCompressCudaMetadata,
)


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
