# SPDX-License-Identifier: Apache-2.0
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def engines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run them, in another process; this one has looked for a GPU, so it cannot fork."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
