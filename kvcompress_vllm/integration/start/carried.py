# SPDX-License-Identifier: Apache-2.0
"""Options that bring this package along where a configuration travels without its plugin.

Ray Serve has vLLM's configuration made in one process and the engine in another, in which nothing
has loaded vLLM's plugins: requests would not be checked there, and their usage not be told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class Carried(dict[str, Any]):
    """``additional_config["kv_compress"]`` once it is resolved."""

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], Carried], tuple[dict[str, Any]]]:
        return unpacked, (dict(self),)


def unpacked(options: dict[str, Any]) -> Carried:
    """What pickle calls. Workers and engine cores load plugins themselves, at their time."""
    if "ray.serve" in sys.modules:
        from kvcompress_vllm.integration.plugin import register

        register()
    return Carried(options)
