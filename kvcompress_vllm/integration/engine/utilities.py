# SPDX-License-Identifier: Apache-2.0
"""What the front end may ask an engine about contexts: utility methods of vLLM's ``EngineCore``.

vLLM's clients call them by name. They run between two steps, like all of its utilities.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.core import EngineCore

LIST, DROP = "kv_compress_contexts", "kv_compress_drop_contexts"


def install() -> None:
    """Give every engine of this process the methods; idempotent."""
    setattr(EngineCore, LIST, _contexts)
    setattr(EngineCore, DROP, _drop_contexts)


def _contexts(self: Any, request_id: str | None = None) -> list[dict[str, Any]]:
    """All that are held; with a request's id, only the one that it took or computed."""
    found: list[dict[str, Any]] = self.scheduler.kv_compress_sharing.described(request_id)
    return found


def _drop_contexts(self: Any, name: str | None = None) -> int:
    """Offer one or all to nobody any more; how many that were."""
    dropped: int = self.scheduler.kv_compress_sharing.drop(name)
    return dropped
