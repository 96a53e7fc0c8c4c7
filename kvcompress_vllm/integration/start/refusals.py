# SPDX-License-Identifier: Apache-2.0
"""What compression does not work with: refused by name once vLLM has resolved its configuration,
before the engine starts and any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from kvcompress_vllm import ops
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.integration.compat.releases import sequences_at_a_time
from kvcompress_vllm.integration.sizing import all_step_tokens, check_step_sizes, step_tokens
from kvcompress_vllm.integration.start import attention_kinds as kinds
from kvcompress_vllm.integration.start import pages
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.integration.worker.backend import leave_local_layers, take_draft_layers
from kvcompress_vllm.scheduling.limits import Limits
from kvcompress_vllm.scheduling.replay import FEWEST
from kvcompress_vllm.scheduling.segments import check_block_size
from kvcompress_vllm.scheduling.sizes import Sizes, check_peak


class Refusal(NamedTuple):
    """A feature that compression does not work with.

    Attributes:
        applies: whether it is asked for; a text says what of the model asks for it, and what helps.
    """

    feature: str
    setting: str
    applies: Callable[[VllmConfig], bool | str]


def _uses_quantised_kv(config: VllmConfig) -> bool | str:
    dtype = config.cache_config.cache_dtype
    if dtype in ("auto", "float16", "bfloat16", "float32"):
        return False
    return f"has a cache of {dtype}; --kv-cache-dtype bfloat16 keeps it in 16 bits"


def _stores_otherwise(config: VllmConfig) -> bool | str:
    """Keys are stored as the model makes them: no op converts."""
    dtype, own = config.cache_config.cache_dtype, str(config.model_config.dtype)
    own = own.removeprefix("torch.")
    if dtype in ("auto", own):
        return False
    return f"makes keys of {own}, and the cache is to have {dtype}"


def _shares_kv(config: VllmConfig) -> bool | str:
    shared = getattr(config.model_config.hf_text_config, "num_kv_shared_layers", None)
    if shared:
        return f"has {shared} layers that read the keys of others"
    return config.cache_config.kv_sharing_fast_prefill


_DRAFTERS = ("ngram", "eagle", "eagle3", "mtp")
"""Methods of ``--speculative-config``."""


def _drafts_otherwise(config: VllmConfig) -> bool | str:
    speculative = config.speculative_config
    if speculative is None or speculative.method == "ngram":
        return False
    method = speculative.method
    if method not in _DRAFTERS:
        return f"has method={method!r}; {', '.join(_DRAFTERS)} are accepted"
    if speculative.parallel_drafting:
        return f"has method={method!r} with parallel_drafting; without it is accepted"
    if config.parallel_config.pipeline_parallel_size > 1:
        return f"has method={method!r} on several pipeline stages; method='ngram' is accepted"
    if getattr(config, "num_prefill_lookahead_tokens", 0) > 1:
        return (
            f"has method={method!r} with several modules that read ahead of a prefill: vLLM ends "
            "no step shortly before a prompt's end, where a compression may be due; "
            "method='ngram' is accepted"
        )
    target, draft = (
        (model.get_num_kv_heads(parallel), model.get_head_size())
        for model, parallel in (
            (config.model_config, config.parallel_config),
            (speculative.draft_model_config, speculative.draft_parallel_config),
        )
    )
    if target != draft:
        return (
            f"has a draft model with {draft[0]} KV heads of size {draft[1]} on a rank, and the "
            f"model has {target[0]} of size {target[1]}: their keys share blocks, so they must be "
            "alike; method='ngram' is accepted"
        )
    return False


def _returns_experts(config: VllmConfig) -> bool:
    # Where the flag is depends on the release.
    places = config.model_config, getattr(config, "aux_output_config", None)
    return any(getattr(place, "enable_return_routed_experts", False) for place in places)


REFUSALS = (
    Refusal(
        "pooling and embedding models",
        "--runner pooling",
        lambda c: c.model_config.runner_type != "generate",
    ),
    Refusal("encoder-decoder models", "the model", lambda c: c.model_config.is_encoder_decoder),
    Refusal("multi-head latent attention (MLA)", "the model", kinds.latent),
    Refusal("a state in the place of keys (Mamba, linear attention)", "the model", kinds.states),
    # Before windows, which may have a way out: these have none.
    Refusal("ALiBi", "the model", kinds.alibi),
    Refusal("learnt keys before the prompt", "the model", kinds.sink_keys),
    Refusal("attention to later tokens of the prompt", "the model", kinds.not_causal),
    Refusal(
        "sliding window or chunked local attention without full attention beside it",
        "the model",
        kinds.local,
    ),
    Refusal("a quantised KV cache", "--kv-cache-dtype", _uses_quantised_kv),
    Refusal("a KV cache of another dtype than the model's", "--kv-cache-dtype", _stores_otherwise),
    Refusal("this speculative decoding", "--speculative-config", _drafts_otherwise),
    Refusal(
        "KV connectors and KV offloading",
        "--kv-transfer-config, --kv-offloading-size",
        lambda c: c.kv_transfer_config is not None,
    ),
    Refusal(
        "encoder cache transfer", "--ec-transfer-config", lambda c: c.ec_transfer_config is not None
    ),
    # A scheduler per rank, and each would hear another rank's reports.
    Refusal(
        "several ranks of an external launcher (torchrun)",
        "--distributed-executor-backend external_launcher",
        lambda c: (
            c.parallel_config.distributed_executor_backend == "external_launcher"
            and c.parallel_config.world_size > 1
        ),
    ),
    Refusal(
        "decode context parallelism",
        "--decode-context-parallel-size",
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
    ),
    Refusal(
        "prefill context parallelism",
        "--prefill-context-parallel-size",
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
    ),
    Refusal("dual-batch overlap", "--enable-dbo", lambda c: c.parallel_config.use_ubatching),
    Refusal("sleep mode", "--enable-sleep-mode", lambda c: c.model_config.enable_sleep_mode),
    # Kept by physical block, which a compression gives away or packs.
    Refusal("returned routed experts", "--enable-return-routed-experts", _returns_experts),
    Refusal(
        "KV sharing between layers",
        "--kv-sharing-fast-prefill, the model",
        _shares_kv,
    ),
    Refusal(
        "KV cache events",
        "--kv-events-config",
        lambda c: c.kv_events_config is not None and c.kv_events_config.enable_kv_cache_events,
    ),
)
"""Checked in order once vLLM has resolved its configuration; docs/supported.md lists them, too."""


def check(vllm_config: VllmConfig) -> None:
    """Refuse what compression does not support, before the engine starts.

    Raises:
        ValueError: naming the feature, the setting that asks for it, or the model and what of it
            does, and the way out.
    """
    kinds.drop_idle_window(vllm_config)
    for refusal in REFUSALS:
        found = refusal.applies(vllm_config)
        if found:
            raise ValueError(_text(refusal, vllm_config, found))
    leave_local_layers(vllm_config)
    kinds.keep_windows_everywhere(vllm_config)
    take_draft_layers(vllm_config)
    pages.choose(vllm_config)
    check_sizes(vllm_config)
    check_exact(vllm_config)
    if current_platform.is_cuda():
        check_kernels(vllm_config)
        check_graphs(vllm_config, ops.missing_kernels("cuda"))


def _text(refusal: Refusal, config: VllmConfig, found: bool | str) -> str:
    model = config.model_config
    text = (
        f"kv_compress: {refusal.feature} is not supported together with --kv-compress "
        f"({refusal.setting})"
    )
    if isinstance(found, str) or refusal.setting == "the model":
        name = f"{model.model!r} ({', '.join(model.architectures)})"
        text += f": {name} {found if isinstance(found, str) else 'is one'}"
    if refusal.setting.startswith("--"):
        return f"{text}; leave out {refusal.setting.removesuffix(', the model')} or --kv-compress"
    return f"{text}; without --kv-compress it runs as ever"


def check_sizes(vllm_config: VllmConfig) -> None:
    """Refuse sizes of blocks and steps with which the scheduler could not work.

    It checks them, too: a backend may change the block size later.

    Raises:
        ValueError: with the numbers and what is accepted.
    """
    config = resolved_config(vllm_config)
    if config is None:
        return
    block_size = vllm_config.cache_config.block_size or 16
    if config.stores_echo:
        check_block_size(block_size)
    check_step_sizes(vllm_config, block_size)
    limits = Limits.of(config, block_size, vllm_config.model_config.max_model_len)
    check_peak(config, Sizes(resolve(config), limits))


def unshared(vllm_config: VllmConfig) -> str | None:
    """Why the requests of a model do not share contexts; None: they do."""
    if kinds.has_others(vllm_config):
        return (
            "layers with a window, chunks or a state keep nothing of a context, so nobody can "
            "share it"
        )
    return None


def exact_problem(vllm_config: VllmConfig) -> str | None:
    """Why contexts cannot be repeated (``exact=kvzip``) whatever a request asks for; None: they
    can."""
    if not vllm_config.cache_config.enable_prefix_caching:
        return "--no-enable-prefix-caching is given, so that no request shares a context"
    if sequences_at_a_time(vllm_config.scheduler_config) < 2:
        return (
            "--max-num-seqs, and --max-num-active-seqs where it is given, must be 2 at least: a "
            "context is repeated beside its request"
        )
    scheduler = vllm_config.scheduler_config
    # Its request waits meanwhile, and takes nothing.
    others = sequences_at_a_time(scheduler) - 2
    least = FEWEST + others * (1 + vllm_config.num_speculative_tokens)
    if step_tokens(scheduler) < FEWEST or all_step_tokens(scheduler) < least:
        return (
            f"a repetition needs {FEWEST} tokens of a step: --long-prefill-token-threshold is "
            f"{scheduler.long_prefill_token_threshold} and must be 0 or at least {FEWEST}, and "
            f"--max-num-batched-tokens, or --max-num-scheduled-tokens where it is given, is "
            f"{all_step_tokens(scheduler)} and must be at least {least}"
        )
    if vllm_config.model_config.skip_tokenizer_init:
        return "--skip-tokenizer-init is given; the prompt that asks for it must be tokenised"
    return unshared(vllm_config)


def check_exact(vllm_config: VllmConfig) -> None:
    """Refuse repetitions that could never take place, and contexts that nobody could share.

    Raises:
        ValueError: naming what is in the way.
    """
    config, problem = resolved_config(vllm_config), exact_problem(vllm_config)
    if config is None:
        return
    if config.exact != "off" and problem is not None:
        raise ValueError(f"kv_compress: exact={config.exact!r} is not accepted: {problem}")
    stride, problem = config.context_stride, unshared(vllm_config)
    if stride and problem is not None:
        raise ValueError(f"kv_compress: context_stride={stride!r} is not accepted: {problem}")


def check_kernels(vllm_config: VllmConfig) -> None:
    """Refuse shapes that the CUDA kernels are not built for.

    Raises:
        ValueError: naming the shape and what is accepted.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    problem = ops.cuda_problem(
        model.get_head_size(),
        model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel),
        vllm_config.cache_config.block_size or 16,
    )
    if problem is not None:
        raise ValueError(f"kv_compress: {problem} is not supported together with --kv-compress")


def check_graphs(vllm_config: VllmConfig, missing: str | None) -> None:
    """Refuse to capture CUDA graphs without kernels: the references copy to the host and back.

    Args:
        missing: which ops have none, as ``ops.missing_kernels`` says it.

    Raises:
        ValueError: naming them and both ways out.
    """
    if missing is not None and not vllm_config.model_config.enforce_eager:
        raise ValueError(
            f"kv_compress: {missing}. Without them CUDA graphs cannot be captured: install a wheel "
            "that has them, build them with KVCOMPRESS_BUILD=cuda, or give --enforce-eager to run "
            "the references, which are slow"
        )
