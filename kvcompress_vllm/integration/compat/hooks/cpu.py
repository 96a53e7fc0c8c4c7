# SPDX-License-Identifier: Apache-2.0
"""Of ``integration/cpu/``: what the CPU platform lacks, or does otherwise than a GPU's."""

from __future__ import annotations

from kvcompress_vllm.integration.compat.hooks.hook import Hook

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_MAMBA = "vllm.model_executor.layers.mamba.ops"
_ON_CPU = "Mamba 2 on CPU, in PyTorch; replaced where its layers' module has imported it"

HOOKS = (
    Hook(f"{_RUNNER}._sample", ("self", "logits", "spec_decode_metadata"),
         "on CPU, takes back what a seeded request drew after a chunk of its prompt; replaced on "
         "the runner's instance", "vLLM's CPU runner can rewind seeds", patched=True),
    Hook(f"{_RUNNER}._bookkeeping_sync", ("self", "scheduler_output", "sampler_output"),
         "on CPU, hides seeds it cannot rewind; replaced on the runner's instance",
         "vLLM's CPU runner can rewind seeds", patched=True),
    Hook("vllm.platforms.cpu:CpuPlatform.check_and_update_config", ("vllm_config",),
         "eager, one process, PyTorch ops on CPU", "vLLM's wheel runs on CPU"),
    Hook("vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
         ("selected_backend", "attn_selector_config", "num_heads"),
         "attention on CPU", "vLLM's CPU platform honours the selected backend"),
    Hook("vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides", (),
         "mends what stands for a kernel on CPU", "vLLM's wheel runs on CPU", since="0.31"),
    Hook("vllm.utils.cpu_triton_utils:_compute_slot_mapping_kernel_impl",
         (), "stands for a kernel on CPU; replaced where it does not take what the kernel takes",
         "vLLM 0.32 is no longer supported", patched=True, since="0.31"),
    Hook("vllm.utils.cpu_triton_utils:_expand_kernel_impl",
         ("output", "input_val", "cu_num_tokens", "replace_from", "replace_to"),
         "stands for a kernel of speculation on CPU; replaced: it makes integers of temperatures",
         "vLLM's expands any dtype", patched=True),
    Hook("vllm.utils.cpu_triton_utils:expand_kernel", (), "the same, wrapped",
         "vLLM 0.30 is no longer supported", until="0.31"),
    Hook("vllm.triton_utils.dispatcher:_rebind_kernels", ("overrides",),
         "looks for kernels in whatever modules hold, with a vars() of ours that bears anything",
         "vLLM looks at mappings alone", since="0.33"),
    Hook("vllm.v1.worker.block_table:ComputeSlotMappingKernel.kernel", (),
         "says what the kernel takes", "vLLM 0.32 is no longer supported", since="0.31"),
    Hook(f"{_MAMBA}.causal_conv1d:causal_conv1d_fn",
         ("x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices",
          "has_initial_state", "activation"),
         _ON_CPU, "vLLM's wheel runs on CPU", patched=True),
    Hook(f"{_MAMBA}.causal_conv1d:causal_conv1d_update",
         ("x", "conv_state", "weight", "bias", "activation", "conv_state_indices"),
         _ON_CPU, "vLLM's wheel runs on CPU", patched=True),
    Hook(f"{_MAMBA}.ssd_combined:mamba_chunk_scan_combined_varlen",
         ("x", "dt", "A", "B", "C", "cu_seqlens", "out", "D", "dt_bias", "initial_states",
          "dt_softplus", "state_dtype"),
         _ON_CPU, "vLLM's wheel runs on CPU", patched=True),
    Hook(f"{_MAMBA}.ssu_dispatch:selective_state_update",
         ("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus",
          "state_batch_indices", "out"),
         _ON_CPU, "vLLM's wheel runs on CPU", patched=True),
    Hook("vllm.v1.worker.cpu_model_runner:CPUModelRunner.warming_up_model", ("self",),
         "skipped: nothing is compiled", "vLLM's wheel runs on CPU"),
    Hook("vllm.platforms.cpu:CpuPlatform.import_kernels", (), "supplies a few ops",
         "vLLM's wheel runs on CPU"),
)  # fmt: skip
