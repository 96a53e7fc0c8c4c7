# SPDX-License-Identifier: Apache-2.0
"""How PyTorch sees the ops: schemas, shapes without data, autograd, torch.compile."""

import pytest
import torch
from op_examples import example

from kvcompress_vllm import ops
from kvcompress_vllm.ops import reference


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_opcheck(device, op):
    torch.library.opcheck(
        getattr(ops, op).default,
        tuple(example(op, device)),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        ),
    )


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_example_matches_the_reference(device, op):
    """The examples are valid calls, and the native kernel is what the dispatcher runs."""
    expected = example(op)
    actual = [a.to(device) if isinstance(a, torch.Tensor) else a for a in example_again(expected)]
    results = (getattr(reference, op)(*expected), getattr(ops, op)(*actual))
    outputs = [r if isinstance(r, tuple) else (r,) if r is not None else () for r in results]
    everything = [[t for t in (*a, *o) if isinstance(t, torch.Tensor)]
                  for a, o in zip((expected, actual), outputs, strict=True)]  # fmt: skip
    for e, a in zip(*everything, strict=True):
        torch.testing.assert_close(a.cpu(), e, atol=1e-5, rtol=1e-4, equal_nan=True)


def example_again(args):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


def test_backends_tell_the_devices_apart():
    backends = ops.backends()
    assert set(backends) == {"CPU", "CUDA"}
    assert all(set(of) == set(ops.SCHEMAS) for of in backends.values())


def test_torch_compile_keeps_the_op(device):
    """One graph: no break, no fallback to Python."""
    args = example("paged_attention", device)

    def step(*args):
        ops.paged_attention(*args)
        return args[-1] * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out = compiled(*args[:-1], torch.zeros_like(args[-1]))
    ops.paged_attention(*args)
    assert torch.equal(out, args[-1] * 2)


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_the_reference_names_its_dtypes(op):
    """vLLM leaves the model's dtype as PyTorch's default when a model fails to load."""
    before = list(example(op))
    after = example_again(before)
    wanted = getattr(reference, op)(*before)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = getattr(reference, op)(*after)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
