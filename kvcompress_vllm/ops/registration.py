# SPDX-License-Identifier: Apache-2.0
"""Registers the ops with PyTorch and loads the native libraries, when first imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.cache.page_format import SCALE_DTYPE, PageFormat
from kvcompress_vllm.ops import reference


def _load(library: str) -> None:
    for path in Path(__file__).parents[1].glob(f"{library}.*so"):
        torch.ops.load_library(str(path))


def _fake_statistics(pages: Tensor, num_candidate_pages: int, channels: int) -> Tensor:
    shape = (channels.bit_count(), num_candidate_pages, pages.shape[1])
    return pages.new_empty(shape, dtype=torch.float32)


def _fake_select(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_pages, page_format, num_freed, num_kept_pages = rest[2], rest[6], rest[8], rest[-1]
    page_keys = PageFormat(page_format).keys_per_page(scores.shape[1])
    heads = scores.new_empty((num_freed.shape[0], *num_pages.shape[1:]), dtype=torch.int32)
    keys = scores.new_empty((num_kept_pages, page_keys), dtype=torch.int32)
    return heads, torch.empty_like(heads), keys


def _fake_scales(pages: Tensor, *rest: Any) -> Tensor:
    page_format, kept_pages = rest[6], rest[7]
    scales = PageFormat(page_format).scales_shape(pages.shape[2] // 2)
    return pages.new_empty((*kept_pages.shape, *scales), dtype=SCALE_DTYPE)


_FAKES: dict[str, Callable[..., object]] = {
    "attention_statistics": lambda _, pages, *rest: _fake_statistics(pages, *rest[-4:-2]),
    "key_statistics": lambda pages, *rest: _fake_statistics(pages, *rest[-2:]),
    "select_pages": _fake_select,
    "fit_scales": _fake_scales,
}
_LIB = torch.library.Library("kvcompress_vllm", "DEF")
for _name, _schema in ops.SCHEMAS.items():
    _LIB.define(_name + _schema)
    _LIB.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"kvcompress_vllm::{_name}", _FAKES.get(_name, lambda *_: None), lib=_LIB
    )
_load("_C")
if torch.version.cuda:
    _load("_C_cuda")
