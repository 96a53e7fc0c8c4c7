# SPDX-License-Identifier: Apache-2.0
"""What newer releases of vLLM take for granted of its CPU build, which its CUDA wheel is not."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kvcompress_vllm.integration.cpu.kernels import compute_slot_mapping


def claim_no_amx() -> None:
    """From 0.28 on vLLM takes AMX for a sign that its kernels for it are there."""
    torch.cpu._is_amx_tile_supported = lambda: False


_NODES = "assigned_physical_gpu_ids"


def share_the_node(parallel_config: Any) -> None:
    """With data parallelism each engine gets a NUMA node by its number, whether it is there or
    not; here they share cores and memory."""
    if getattr(parallel_config, _NODES, None) is not None:
        setattr(parallel_config, _NODES, None)


def mend_slot_mapping() -> None:
    """Where vLLM's CPU fallback does not take what the kernel that it stands for takes (0.32.0:
    ``block_size`` is gone from the kernel only), replace it."""
    from vllm.utils import cpu_triton_utils
    from vllm.v1.worker import block_table

    module: Any = block_table  # not every release has the class
    kernel = module.ComputeSlotMappingKernel.kernel
    # Once replaced (a second engine in the process), a kernel keeps its own names.
    names = tuple(getattr(kernel, "arg_names", None) or inspect.signature(kernel).parameters)
    fallback = cpu_triton_utils._compute_slot_mapping_kernel_impl
    if len(inspect.signature(fallback).parameters) != len(names):
        cpu_triton_utils._compute_slot_mapping_kernel_impl = _by_name(names)


def mend_kernel_scan() -> None:
    """Where vLLM looks for its kernels in whatever modules hold (0.33), some of that has no mapping
    in ``__dict__``: llvmlite's library, which n-grams import; the next engine does not start."""
    try:
        dispatcher: Any = importlib.import_module("vllm.triton_utils.dispatcher")
    except ImportError:  # older releases
        return
    dispatcher.vars = _attributes


def _attributes(value: Any) -> Mapping[str, Any]:
    """``vars``, empty where that is no mapping."""
    found = vars(value)
    return found if isinstance(found, Mapping) else {}


def _by_name(names: tuple[str, ...]) -> Callable[..., None]:
    def slot_mapping(*args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        compute_slot_mapping(
            given["query_start_loc_ptr"],
            given["positions_ptr"],
            given["block_table_ptr"],
            given["slot_mapping_ptr"],
            given["KV_CACHE_BLOCK_SIZE"],
        )

    return slot_mapping
