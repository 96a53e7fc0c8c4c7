# SPDX-License-Identifier: Apache-2.0
"""Host lists to device tensors without stopping either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy a (nested) list of numbers to ``device``, in stream order.

    From pageable memory, PyTorch would wait until the device has finished all that is queued: the
    step before, under asynchronous scheduling.
    """
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
