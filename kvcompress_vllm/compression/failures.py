# SPDX-License-Identifier: Apache-2.0
"""What policies did wrong in a batch of compressions, on this rank or on another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.policies.judge import PolicyError
from kvcompress_vllm.records.plan import Judged

logger = logging.getLogger("vllm.kv_compress")

Agree = Callable[[Tensor], Tensor]
"""Of ``[R]`` int32 of every rank the largest, on all ranks; ranks call it in the same order."""

NOT_FINITE = "score or worth returned numbers that are not finite, here or on another rank"


class Failures:
    """Per request of a batch: nothing, what is known to be wrong, or what the device will tell.

    Args:
        items: the requests.
        agree: None: there is one rank.
    """

    def __init__(self, items: Sequence[Judged], agree: Agree | None = None) -> None:
        self._items, self._agree = items, agree
        self._messages: list[str | None] = [None] * len(items)
        self._wrong: list[Tensor | None] = [None] * len(items)

    def has(self, index: int, error: PolicyError) -> None:
        """A request's policy raised, or returned something else than it should."""
        self._messages[index] = str(error)
        # A rank whose reports nobody reads must say so, too.
        logger.error("kv_compress: %s: its policy failed", self._items[index].request_id,
                     exc_info=error)  # fmt: skip

    def may_have(self, index: int, wrong: Tensor) -> None:
        """Whether there is a mistake is in ``wrong`` ``[]`` bool."""
        self._wrong[index] = wrong

    @property
    def known(self) -> list[str | None]:
        """By request, what is known to be wrong without asking the device."""
        return self._messages

    def join(self, messages: Sequence[str | None]) -> None:
        """Take in what is known on another rank of the same requests."""
        pairs = zip(self._messages, messages, strict=True)
        self._messages = [own if own is not None else other for own, other in pairs]

    def flags(self, device: torch.device) -> Tensor:
        """``[R]`` int32 on the device: 1 where something went wrong, on any rank. Waits for
        nothing."""
        known = [int(message is not None) for message in self._messages]
        flags = to_device(known, torch.int32, device)
        told = [i for i, wrong in enumerate(self._wrong) if wrong is not None]
        if told:
            wrong = torch.stack([w for w in self._wrong if w is not None])
            flags[to_device(told, torch.int64, device)] = wrong.to(torch.int32)
        return flags if self._agree is None else self._agree(flags)

    def messages(self, flags: Sequence[int]) -> list[str | None]:
        """What to tell of each request, once ``flags`` are known."""
        return [
            message if message is not None else NOT_FINITE if flag else None
            for message, flag in zip(self._messages, flags, strict=True)
        ]
