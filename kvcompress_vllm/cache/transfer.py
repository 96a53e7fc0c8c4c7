# SPDX-License-Identifier: Apache-2.0
"""Small data between host and device without stopping either side.

``tensor[index] = number`` stops both where ``index`` is a tensor: PyTorch makes a tensor on the
host of the number, and waits until it is copied. ``index_fill_`` and ``masked_fill_`` do not.
"""

from __future__ import annotations

import time
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


def to_host(tensor: Tensor) -> Tensor:
    """Start a copy to the host, in stream order; record an event after it and wait for that one."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Stopwatch:
    """Time that the current stream takes, or the host where there is no device. Starts when built.

    Args:
        device: whose stream is meant.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            # Blocking: whoever waits sleeps, rather than take a core and the driver's lock.
            self._events = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True, blocking=True),
            )
            self._events[0].record()
        self._start = self._end = time.perf_counter()

    def stop(self) -> None:
        """Mark the end; on a device, the end of what has been queued so far."""
        self._end = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    def done(self) -> bool:
        """Whether the device has come so far as where it was stopped."""
        return self._events is None or self._events[1].query()

    def milliseconds(self) -> float:
        """Time between start and stop; waits until the device has come so far."""
        if self._events is None:
            return 1e3 * (self._end - self._start)
        start, end = self._events
        end.synchronize()
        return float(start.elapsed_time(end))
