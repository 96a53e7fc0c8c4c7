# SPDX-License-Identifier: Apache-2.0
"""Every vLLM name outside its public plugin interfaces that this package relies on, and why.

What is found by itself in our source (``ours.py``) need not be here, except for the releases that
have it (``since``, ``until``) and what is replaced at run time. ``contract.py`` checks all of it.
"""

from __future__ import annotations

from typing import NamedTuple


class Hook(NamedTuple):
    """One name we rely on.

    Attributes:
        path: ``module:qualified.name``.
        parameters: parameters (or dataclass fields) that must exist, in this order.
        reason: what we do with it.
        remove_when: what must come before we can do without.
        patched: whether we replace it at run time (the others are overridden or called).
        since: first release that has it; empty: all that we support.
        until: first release that has it no more, and needs it no more; empty: none.
    """

    path: str
    parameters: tuple[str, ...]
    reason: str
    remove_when: str
    patched: bool = False
    since: str = ""
    until: str = ""


_ARGS = "vllm.engine.arg_utils:EngineArgs"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
_COMPLETION = "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion"
_RESPONSES = "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses"
_MESSAGES = "vllm.entrypoints.anthropic.serving:AnthropicServingMessages"
_TOKENS = "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens"
_BATCH = "vllm.entrypoints.openai.chat_completion.batch_serving:OpenAIServingChatBatch"
_USAGE = "vLLM lets plugins add to the usage"
_IN_USAGE = "puts it into the usage; replaced on the server's instance"
_VALIDATE = "vLLM lets general plugins validate requests"
_ROPE = "vllm.model_executor.layers.rotary_embedding"
_BACKEND = "vllm.v1.attention.backend:AttentionBackend"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

HOOKS = (
    Hook(f"{_ARGS}.add_cli_args", ("parser",), "adds the --kv-compress flags",
         "vLLM lets general plugins add flags", patched=True),
    Hook(f"{_ARGS}.from_cli_args", ("args",), "moves the flags into additional_config",
         "vLLM lets general plugins add flags", patched=True),
    Hook(f"{_ARGS}.create_engine_config", ("self", "usage_context", "headless"),
         "selects our scheduler, worker and backend, and refuses what is unsupported",
         "vLLM has a plugin hook that edits the configuration", patched=True),
    Hook("vllm.v1.engine.input_processor:InputProcessor.process_inputs",
         ("self", "request_id", "prompt", "params", "resumable"),
         "checks what a request asks for, so that a bad value is HTTP 400", _VALIDATE,
         patched=True),
    Hook("vllm.exceptions:VLLMValidationError", (), "our errors are some", "never"),
    Hook("vllm.v1.engine.async_llm:AsyncLLM.generate",
         ("self", "prompt", "sampling_params", "request_id"),
         "checks before the response begins, also of a stream", _VALIDATE, patched=True),
    Hook(f"{_RESPONSES}._generate_with_builtin_tools",
         ("self", "request_id", "engine_input", "sampling_params", "context"),
         "calls generate inside the stream: checks before, and watches what it generates; replaced "
         "on the server's instance", _VALIDATE, patched=True),
    Hook("vllm.entrypoints.serve.utils.api_utils:validate_json_request", ("raw_request",),
         "the dependency of all routes that take JSON; overridden by one that checks the body, too",
         _VALIDATE),
    Hook(f"{_CHAT}.create_chat_completion", ("self", "request", "raw_request"),
         "checks the lines of run-batch; replaced on the server's instance", _VALIDATE,
         patched=True),
    Hook(f"{_MESSAGES}.create_chat_completion", ("self", "request", "raw_request"),
         "hands over the vllm_xargs of /v1/messages; replaced on the server's instance",
         "vLLM's messages have vllm_xargs", patched=True),
    Hook("vllm.entrypoints.serve.utils.server_utils:AuthenticationMiddleware.verify_token",
         ("self", "headers"), "guards the page's data where KVCOMPRESS_PAGE=api-key",
         "vLLM 0.28 is no longer supported", until="0.29"),
    Hook("vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware.verify_token",
         ("self", "headers"), "guards the page's data where KVCOMPRESS_PAGE=api-key", "never",
         since="0.29"),
    Hook("vllm.entrypoints.openai.api_server:_init_endpoint_plugins_state",
         ("engine_client", "state", "args"), "initialises ours for run-batch, which has no app",
         "vLLM 0.28 is no longer supported", patched=True, until="0.29"),
    Hook("vllm.entrypoints.launchers.api_server.app_state:init_endpoint_plugins_state",
         ("engine_client", "state", "args"), "initialises ours for run-batch, which has no app",
         "vLLM loads endpoint plugins in run-batch", patched=True, since="0.29"),
    Hook("vllm.plugins:load_endpoint_plugins", (),
         "adds our endpoints where --kv-compress is given, without VLLM_PLUGINS naming them",
         "vLLM lets general plugins bring endpoint plugins", patched=True),
    Hook("vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state",
         ("self", "engine_client", "state", "args"), "our endpoints have it", "never"),
    Hook("vllm.v1.engine.output_processor:RequestState.make_request_output",
         ("self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason",
          "kv_transfer_params"),
         "gives outputs their kv_compress", "vLLM's outputs have a field for plugins",
         patched=True),
    Hook("vllm.v1.engine:EngineCoreOutput",
         ("request_id", "new_token_ids", "finish_reason", "stop_reason", "events",
          "kv_transfer_params", "trace_headers"),
         "carries what compression did to a request; ends one whose policy failed",
         "vLLM's outputs have a field for plugins"),
    Hook(f"{_SCHEDULER}.finish_requests", ("self", "request_ids", "finished_status"),
         "ends requests whose policy failed, with an error", "never"),
    Hook("vllm.distributed.parallel_state:get_tp_group", (),
         "ranks agree on which policies failed", "never"),
    Hook(f"{_CHAT}.chat_completion_full_generator", ("self", "request", "result_generator"),
         _IN_USAGE, _USAGE, patched=True),
    Hook(f"{_CHAT}.chat_completion_stream_generator", ("self", "request", "result_generator"),
         _IN_USAGE, _USAGE, patched=True),
    Hook(f"{_COMPLETION}.request_output_to_completion_response", ("self", "final_res_batch"),
         _IN_USAGE, _USAGE, patched=True),
    Hook(f"{_COMPLETION}.completion_stream_generator",
         ("self", "request", "engine_inputs", "result_generator"),
         _IN_USAGE, _USAGE, patched=True),
    Hook(f"{_BATCH}.chat_completion_full_generator_batch", ("self", "request", "generators"),
         _IN_USAGE, _USAGE, patched=True),
    Hook(f"{_TOKENS}.serve_tokens_full_generator", ("self", "request", "result_generator"),
         _IN_USAGE, _USAGE, patched=True),
    Hook(f"{_TOKENS}.serve_tokens_stream_generator", ("self", "request", "result_generator"),
         _IN_USAGE, _USAGE, patched=True),
    Hook(f"{_RESPONSES}.responses_full_generator",
         ("self", "request", "sampling_params", "result_generator", "context"),
         _IN_USAGE, _USAGE, patched=True),
    Hook(f"{_MESSAGES}.messages_full_converter", ("self", "generator"), _IN_USAGE, _USAGE,
         patched=True),
    Hook(f"{_MESSAGES}.message_stream_converter", ("self", "generator"), _IN_USAGE, _USAGE,
         patched=True),
    Hook("vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
         ("self", "request", "num_new_tokens"),
         "admission also needs slots and the reserve; replaced on our scheduler's instance",
         "vLLM's scheduler has an admission hook", patched=True),
    Hook("vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks", ("self", "request"),
         "leaves to compute what a compression observes; replaced on our scheduler's instance",
         "vLLM's scheduler has an admission hook", patched=True),
    Hook("vllm.v1.core.kv_cache_manager:KVCacheManager.__init__", ("watermark",),
         "its watermark_blocks carries the reserve", "vLLM's scheduler has an admission hook"),
    Hook(f"{_SCHEDULER}.schedule", ("self",),
         "compresses what is due, then attaches the plan to the step", "scheduler_cls is public"),
    Hook(f"{_SCHEDULER}.__init__", ("self", "vllm_config", "kv_cache_config"),
         "built through scheduler_cls with keywords", "scheduler_cls is public"),
    Hook(f"{_SCHEDULER}.add_request", ("self", "request"),
         "reads the budget of a request once; grammar_compile_error_reqs ends it with an error",
         "vLLM's scheduler can refuse a request"),
    Hook("vllm.v1.metrics.stats:PrefixCacheStats", ("hits", "preempted_hits"),
         "hits that a compression has computed again are taken back",
         "vLLM's scheduler has an admission hook"),
    Hook(f"{_SCHEDULER}.update_from_output", ("self", "scheduler_output", "model_runner_output"),
         "reads what the workers report of compressions, and tells the front end of each request",
         "scheduler_cls is public"),
    Hook(f"{_SCHEDULER}._mamba_block_aligned_split",
         ("self", "request", "num_new_tokens", "num_new_local_computed_tokens"),
         "ends a chunk where a compression is due", "vLLM's scheduler asks how long a chunk is"),
    Hook(f"{_SCHEDULER}.need_mamba_block_aligned_split", (),
         "set, so that vLLM calls it", "vLLM's scheduler asks how long a chunk is"),
    Hook(f"{_SCHEDULER}.deferred_frees", (), "integrity checks", "never"),
    Hook("vllm.v1.core.kv_cache_manager:KVCacheManager.watermark_blocks", (),
         "set to the reserve before an admission", "vLLM's scheduler has an admission hook"),
    Hook("vllm.v1.core.kv_cache_manager:KVCacheManager.create_kv_cache_blocks", ("self", "blocks"),
         "cuts a prefix cache hit", "never"),
    Hook("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.single_type_managers", (),
         "holds our block manager", "the registry hands managers out"),
    Hook(f"{_MANAGER}._null_block", (), "stands where packed blocks no longer are", "never"),
    Hook(f"{_SCHEDULER}.make_stats", ("self",), "adds our report to the step's statistics",
         "scheduler_cls is public"),
    Hook("vllm.v1.metrics.stats:SchedulerStats", ("num_running_reqs",),
         "subclassed with a field for our report", "vLLM's statistics have a field for plugins"),
    Hook("vllm.v1.engine:EngineCoreOutputs", ("scheduler_stats",),
         "declares the subclass, so that the front end decodes our report",
         "vLLM's statistics have a field for plugins", patched=True),
    Hook("vllm.v1.metrics.loggers:StatLoggerManager.__init__",
         ("self", "vllm_config", "engine_idxs", "custom_stat_loggers"),
         "adds our metrics where vLLM keeps statistics of a compressed engine",
         "a stat logger plugin leaves --disable-log-stats alone", patched=True),
    Hook("vllm.v1.metrics.loggers:StatLoggerBase.record",
         ("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
         "overridden to export our report", "stat loggers are public"),
    Hook("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.__init__", ("self",),
         "its single_type_managers hold our block manager", "the registry hands managers out"),
    Hook(f"{_MANAGER}.pop_blocks_for_free", ("self", "request_id"),
         "the one place where a request gives its blocks up", "the spec registry is public"),
    Hook(f"{_MANAGER}.cache_blocks", ("self", "request", "num_tokens"),
         "packed requests publish nothing", "the spec registry is public"),
    Hook(f"{_MANAGER}.find_longest_cache_hit",
         ("cls", "block_hashes", "max_length", "kv_cache_group_ids", "block_pool",
          "kv_cache_spec"),
         "leaves the observed window to compute", "the spec registry is public"),
    Hook(f"{_MANAGER}.get_num_common_prefix_blocks", ("self", "running_request_id"),
         "no cascade attention over packed rows", "vLLM 0.31 is no longer supported",
         until="0.32"),
    Hook("vllm.v1.core.block_pool:BlockHashToBlockMap.__len__", ("self",),
         "how many blocks the prefix cache knows, for the page", "never"),
    Hook("vllm.v1.metrics.loggers:StatLoggerManager.record", ("self", "scheduler_stats"),
         "its stat_loggers lead the page to ours", "vLLM hands plugins its loggers"),
    Hook(f"{_POOL}.get_new_blocks", ("self", "num_blocks"), "allocates packed blocks", "never"),
    Hook(f"{_POOL}.free_blocks", ("self", "ordered_blocks"), "returns compressed blocks", "never"),
    Hook("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.get_all_free_blocks", ("self",),
         "integrity checks", "never"),
    Hook("vllm.v1.kv_cache_interface:KVCacheTensor",
         ("size", "shared_by", "offset", "block_stride"), "the packed layout of all layers",
         "vLLM 0.28 is no longer supported", until="0.29"),
    Hook(f"{_BACKEND}.get_kv_cache_shape", ("num_blocks", "block_size", "num_kv_heads"),
         "the layout of a layer", "vLLM 0.28 is no longer supported", until="0.29"),
    Hook(f"{_BACKEND}.get_kv_cache_stride_order", ("include_num_layers_dimension",),
         "the layout of all layers", "vLLM 0.28 is no longer supported", until="0.29"),
    Hook(f"{_BACKEND}.supported_kv_cache_layouts", ("cls",),
         "the layout of all layers", "never", since="0.29"),
    Hook("vllm.v1.kv_cache_layout:KVCacheLayout", (), "names the layout of all layers", "never",
         since="0.29"),
    Hook("vllm.v1.core.sched.output:SchedulerOutput",
         ("scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens"),
         "carries the plan as an extra attribute", "vLLM has a field for plugins"),
    Hook("vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec", ("self",),
         "swaps the spec of every layer", "vLLM 0.29: AttentionBackend.customize_spec"),
    Hook("vllm.v1.worker.gpu_worker:Worker.determine_available_memory", ("self",),
         "leaves room for our state", "worker_cls is public"),
    Hook("vllm.v1.worker.gpu_worker:Worker.initialize_from_config", ("self", "kv_cache_config"),
         "chooses the packed layout and binds our state", "worker_cls is public"),
    Hook("vllm.v1.worker.gpu_worker:Worker.execute_model", ("self", "scheduler_output"),
         "runs the plan before the step", "worker_cls is public"),
    Hook("vllm.v1.worker.gpu_worker:Worker.sample_tokens", ("self", "grammar_output"),
         "adds the reports to the step's output", "worker_cls is public"),
    Hook("vllm.v1.worker.gpu_worker:Worker.get_model", ("self",),
         "its rotary modules say how queries turn (echo scores)", "never"),
    Hook(f"{_ROPE}.base:RotaryEmbeddingBase._compute_cos_sin_cache", ("self",),
         "angles of echo scores, in fp32", "vLLM's rotary modules have angles in public"),
    Hook(f"{_ROPE}.base:RotaryEmbedding.forward_native", ("self", "positions", "query", "key"),
         "checks those angles", "vLLM's rotary modules have angles in public"),
    Hook(f"{_ROPE}.phi3_long_rope_scaled_rope:Phi3LongRoPEScaledRotaryEmbedding."
         "_compute_cos_sin_cache", ("self", "max_position_embeddings", "rescale_factors", "mscale"),
         "angles of echo scores, in fp32", "vLLM's rotary modules have angles in public"),
    Hook("vllm.v1.outputs:ModelRunnerOutput", ("req_ids",),
         "carries the reports as an extra attribute", "vLLM has a field for plugins"),
    Hook("vllm.v1.outputs:AsyncModelRunnerOutput.get_output", ("self",),
         "wrapped, so that reports are collected where vLLM waits for the step",
         "vLLM has a field for plugins"),
    Hook(f"{_RUNNER}.initialize_kv_cache", ("self", "kv_cache_config"),
         "fills attn_groups, requests and input_batch, which RunnerAdapter reads", "never"),
    Hook(f"{_RUNNER}._sample", ("self", "logits", "spec_decode_metadata"),
         "on CPU, takes back what a seeded request drew after a chunk of its prompt; replaced on "
         "the runner's instance", "vLLM's CPU runner can rewind seeds", patched=True),
    Hook(f"{_RUNNER}._bookkeeping_sync", ("self", "scheduler_output", "sampler_output"),
         "on CPU, hides seeds it cannot rewind; replaced on the runner's instance",
         "vLLM's CPU runner can rewind seeds", patched=True),
    Hook("vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
         ("self", "input_batch"),
         "tells the order of the batch; replaced on runner V2's instance",
         "vLLM 0.29 is no longer supported", patched=True, until="0.30"),
    Hook("vllm.v1.attention.backend:CommonAttentionMetadata.req_idx", (),
         "tells the order of runner V2's batch", "never", since="0.30"),
    Hook("vllm.v1.worker.gpu.states:RequestState.index_to_req_id", (),
         "tells the order of runner V2's batch", "never", since="0.30"),
    Hook("vllm.v1.worker.gpu.states:RequestState.req_id_to_index", (),
         "the rows whose prefix we rewrite on runner V2", "vLLM can rewrite a row"),
    Hook("vllm.v1.worker.gpu.block_table:BlockTables.block_tables", (),
         "the rows whose prefix we rewrite on runner V2", "vLLM can rewrite a row"),
    Hook("vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor", ("size", "dtype", "device"),
         "gpu holds the rows whose prefix we rewrite on runner V2", "vLLM can rewrite a row"),
    Hook("vllm.v1.worker.block_table:BlockTable.__init__", ("self",),
         "block_table.np holds the rows whose prefix we rewrite", "vLLM can rewrite a row"),
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
    Hook("vllm.v1.worker.block_table:ComputeSlotMappingKernel.kernel", (),
         "says what the kernel takes", "vLLM 0.32 is no longer supported", since="0.31"),
    Hook("vllm.v1.worker.cpu_model_runner:CPUModelRunner.warming_up_model", ("self",),
         "skipped: nothing is compiled", "vLLM's wheel runs on CPU"),
    Hook("vllm.platforms.cpu:CpuPlatform.import_kernels", (), "supplies a few ops",
         "vLLM's wheel runs on CPU"),
)  # fmt: skip
