# SPDX-License-Identifier: Apache-2.0
"""Compares results and keeps count."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 2e-6}


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that equal NaNs compare equal."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@dataclass
class Checker:
    """Runs on ``device``; remembers what failed."""

    device: torch.device
    passed: int = 0
    failed: list[str] = field(default_factory=list)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy on the device, even if the tensor is already there."""
        return tensor.to(self.device, copy=True)

    def copies(self, *tensors: Tensor) -> list[Tensor]:
        return [self.copy(tensor) for tensor in tensors]

    def check(self, name: str, ok: bool, detail: str = "") -> None:
        if ok:
            self.passed += 1
        else:
            self.failed.append(name)
            print(f"FAIL {name}: {detail}", flush=True)

    def equal(self, name: str, got: Tensor, want: Tensor) -> None:
        """Same shape, same values; in page pools compare :func:`bits`."""
        got, want = got.cpu(), want.cpu()
        same = torch.equal(got, want)
        detail = f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if got.shape == want.shape:
            detail = f"{int((got != want).sum())} of {want.numel()} differ"
        self.check(name, same, detail)

    def close(self, name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
        """Relative error of the whole tensor, and a looser bound on every element."""
        if not want.numel():
            return
        got, want = got.cpu().double(), want.cpu().double()
        error = float((got - want).norm() / want.norm().clamp_min(1e-30))
        worst = float((got - want).abs().max())
        ok = error <= tolerance and worst <= 30 * tolerance * max(1.0, float(want.abs().max()))
        detail = f"relative error {error:.2e} (allowed {tolerance:.0e}), worst {worst:.2e}"
        self.check(name, ok, detail)
