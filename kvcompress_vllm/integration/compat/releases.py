# SPDX-License-Identifier: Apache-2.0
"""What differs between vLLM's releases, asked of vLLM itself: by capability, never by version.

Overrides take and pass on whatever more vLLM gives them; only what cannot be done that way is here.
What each release changed, and how it was tested: ``docs/releases.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

from vllm.exceptions import VLLMValidationError


class ClientError(VLLMValidationError, ValueError):
    """A bad value in a request.

    vLLM answers a plain ValueError with HTTP 400 up to 0.26 and with 500 since; its own error is
    no ValueError any more.
    """


@contextmanager
def client_errors() -> Iterator[None]:
    """A ValueError of ours is the client's error, in every release HTTP 400."""
    try:
        yield
    except VLLMValidationError:
        raise
    except ValueError as error:
        raise ClientError(str(error)) from error


@cache
def vllm_places_layers() -> bool:
    """Whether vLLM lays all layers of a block out side by side itself, as our backend's layout
    asks (0.29 and later); before, the worker says where each layer lies."""
    from vllm.v1.kv_cache_interface import KVCacheTensor

    return "layers" in {field.name for field in fields(KVCacheTensor)}


def kv_cache_layouts(*names: str) -> tuple[Any, ...]:
    """Members of vLLM's ``KVCacheLayout``, which 0.29 and later ask of a backend."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return tuple(KVCacheLayout[name] for name in names)


@cache
def batch_order_is_told() -> bool:
    """Whether vLLM tells metadata builders which request is in which row (0.30 and later)."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    return "req_idx" in {field.name for field in fields(CommonAttentionMetadata)}
