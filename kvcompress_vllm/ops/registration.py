# SPDX-License-Identifier: Apache-2.0
"""Registers the ops with PyTorch and loads the native libraries, when first imported."""

from __future__ import annotations

from pathlib import Path

import torch

from kvcompress_vllm import ops
from kvcompress_vllm.ops import reference


def _load(library: str) -> None:
    for path in Path(__file__).parents[1].glob(f"{library}.*so"):
        torch.ops.load_library(str(path))


def _nothing(*args: object, **kwargs: object) -> None:
    """What an op returns that writes into its arguments."""


_LIB = torch.library.Library("kvcompress_vllm", "DEF")
for _name, _schema in ops.SCHEMAS.items():
    _LIB.define(_name + _schema)
    _LIB.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"kvcompress_vllm::{_name}", reference.RESULTS.get(_name, _nothing), lib=_LIB
    )
_load("_C")
if torch.version.cuda:
    _load("_C_cuda")
