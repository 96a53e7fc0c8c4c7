# SPDX-License-Identifier: Apache-2.0
import os

import pytest

# In-process engines: one import of vLLM for all tests, and their scheduler is at hand.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KVCOMPRESS_CHECK_INTEGRITY"] = "1"

pytest.importorskip("vllm", reason="the integration tests need vLLM")

from vllm.model_executor.models import registry

# vLLM looks at the class of a model in a process of its own, lest CUDA be initialised in this one:
# an import of vLLM for each class.
registry._run_in_subprocess = lambda look: look()
