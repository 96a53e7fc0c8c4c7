# SPDX-License-Identifier: Apache-2.0
"""vLLM's offline ``LLM`` with a ``kv_compress`` argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vllm

from kvcompress_vllm.integration.start.flags import KEY


class LLM(vllm.LLM):
    """``vllm.LLM`` plus ``kv_compress``.

    Args:
        kv_compress: options as a dict, ``True`` for the defaults, a ``key=value,...`` string or
            the path of a YAML file; ``None`` and ``False`` leave compression off.

    Raises:
        ValueError: unknown keys, bad values, or a model or feature that is not supported.
    """

    def __init__(
        self,
        model: str,
        *args: Any,
        kv_compress: Mapping[str, Any] | bool | str | None = None,
        **kwargs: Any,
    ) -> None:
        if kv_compress is not None:
            additional = dict(kwargs.pop("additional_config", None) or {})
            additional[KEY] = dict(kv_compress) if isinstance(kv_compress, Mapping) else kv_compress
            kwargs["additional_config"] = additional
        super().__init__(model, *args, **kwargs)
