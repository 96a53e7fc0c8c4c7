# SPDX-License-Identifier: Apache-2.0
"""Every op test runs on every device for which native kernels exist."""

import pytest
import torch

from kvcompress_vllm import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """A device whose kernels are built; comparing the reference with itself would prove nothing."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    missing = [op for op, native in ops.backends()[request.param.upper()].items() if not native]
    if len(missing) == len(ops.SCHEMAS):
        pytest.skip(f"no native {request.param} kernels are built")
    assert not missing, f"{request.param} lacks native kernels: {missing}"
    return str(request.param)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    # The reference runs thousands of tiny ops; handing each to threads would take most of the time.
    # test_threads.py runs the kernels with more.
    torch.set_num_threads(1)
