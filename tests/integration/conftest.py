# SPDX-License-Identifier: Apache-2.0
import pytest

pytest.importorskip("vllm", reason="the integration tests need vLLM")


@pytest.fixture(autouse=True)
def _check_integrity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
