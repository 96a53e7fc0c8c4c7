# SPDX-License-Identifier: Apache-2.0
"""Results do not depend on how many threads the CPU kernels run with."""

import pytest
import torch
from cases import assert_same_bits
from op_examples import example

from kvcompress_vllm import ops


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_same_bits_with_any_number_of_threads(op):
    if not ops.backends()["CPU"][op]:
        pytest.skip("no native CPU kernels are built")
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            args = example(op, scale=32)  # large enough to be shared out
            result = getattr(ops, op)(*args)
            outputs = result if isinstance(result, tuple) else () if result is None else (result,)
            seen.append([t for t in (*args, *outputs) if isinstance(t, torch.Tensor)])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            assert_same_bits(a, b)
