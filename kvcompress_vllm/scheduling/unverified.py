# SPDX-License-Identifier: Apache-2.0
"""Drafted tokens of steps in flight. No vLLM types.

With asynchronous scheduling a step is planned while the one before runs, and vLLM counts what that
one drafted as computed; what it rejects is taken back a step later. Whoever needs to know how far a
request has come for certain asks here. Without steps in flight nothing is ever unverified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class Unverified:
    """Counts, by request, the drafted tokens of steps that were sent and have not come back."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether anything drafted is in flight."""
        return bool(self._counts)

    def __getitem__(self, request_id: str) -> int:
        """Tokens by which a request may have come less far than vLLM counts."""
        return self._counts.get(request_id, 0)

    def certain(self, request_id: str, num_computed: int) -> int:
        """Tokens that are computed for certain by the time that the next step runs.

        Args:
            num_computed: what vLLM counts.
        """
        return max(0, num_computed - self[request_id])

    def of_all(self, num_computed: Mapping[str, int]) -> Mapping[str, int]:
        """``certain`` of many requests, by id. Asked on every step: mostly nothing is in flight."""
        if not self._counts:
            return num_computed
        return {name: self.certain(name, n) for name, n in num_computed.items()}

    def sent(self, drafted: Mapping[str, Sequence[int]]) -> None:
        """Note what a step will verify, by request."""
        for request_id, tokens in drafted.items():
            self._counts[request_id] = self[request_id] + len(tokens)

    def verified(self, drafted: Mapping[str, Sequence[int]]) -> None:
        """Note that a step that was sent is back; its requests may be gone by now."""
        for request_id, tokens in drafted.items():
            left = self[request_id] - len(tokens)
            if left > 0:
                self._counts[request_id] = left
            else:
                self._counts.pop(request_id, None)
