# SPDX-License-Identifier: Apache-2.0
"""What is not supported is refused at startup, by name; docs/supported.md lists all of it."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec

from kvcompress_vllm import ops
from kvcompress_vllm.integration.cpu.attention import LocalCpuBackend
from kvcompress_vllm.integration.engine.kv_cache import KVCompressSpec
from kvcompress_vllm.integration.start import attention_kinds, refusals
from kvcompress_vllm.integration.start.refusals import (
    REFUSALS,
    check,
    check_kernels,
    exact_problem,
    unshared,
)
from kvcompress_vllm.integration.worker.backend import leave_local_layers
from kvcompress_vllm.integration.worker.longest_request import check_longest_request
from tests.integration.simulation import MODEL, ngram

SUPPORTED = (MODEL.parents[1] / "docs" / "supported.md").read_text()


def model_like(tmp_path: Path, **changes: Any) -> str:
    """The bundled model's folder with another ``config.json``."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def refused(model: str, feature: str, **arguments: Any) -> None:
    arguments = {"additional_config": {"kv_compress": {}}, **arguments}
    with pytest.raises(ValueError, match=f"kv_compress: {feature}.* not supported"):
        EngineArgs(model, **arguments).create_engine_config()


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral",
          "sliding_window": 512}, "sliding window"),
        ({"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
          "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
          "v_head_dim": 32, "n_routed_experts": 8}, "multi-head latent attention"),
        ({"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"},
         "encoder-decoder"),
    ],
    ids=["mistral", "deepseek", "whisper"],
)  # fmt: skip
def test_unsupported_models(tmp_path: Path, changes: dict[str, Any], feature: str) -> None:
    refused(model_like(tmp_path, **changes), feature)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, r"a state in .* \(Mamba"),
    ],
    ids=["mamba"],
)  # fmt: skip
def test_unsupported_models_that_vllm_imports_slowly(
    tmp_path: Path, changes: dict[str, Any], feature: str
) -> None:
    refused(model_like(tmp_path, **changes), feature)


@pytest.mark.parametrize(
    ("arguments", "feature"),
    [
        ({"kv_cache_dtype": "fp8"}, "a quantised KV cache"),
        ({"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2,
                                 "prompt_lookup_max": 3}},
         "this speculative decoding"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
         "KV connectors"),
        ({"kv_offloading_size": 1.0}, "KV connectors and KV offloading"),
        ({"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}},
         "encoder cache transfer"),
        ({"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
         "KV cache events"),
        ({"kv_sharing_fast_prefill": True}, "KV sharing between layers"),
        ({"runner": "pooling"}, "pooling"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_unsupported_features(arguments: dict[str, Any], feature: str) -> None:
    refused(str(MODEL), feature, **arguments)


def engine_config() -> VllmConfig:
    args = EngineArgs(str(MODEL), additional_config={"kv_compress": {}})
    return args.create_engine_config()


@pytest.mark.parametrize(
    ("part", "field", "value", "feature"),
    [
        ("parallel_config", "decode_context_parallel_size", 2, "decode context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("parallel_config", "enable_dbo", True, "dual-batch overlap"),
        ("model_config", "enable_sleep_mode", True, "sleep mode"),
        ("model_config", "enable_return_routed_experts", True, "returned routed experts"),
        ("cache_config", "kv_sharing_fast_prefill", True, "KV sharing"),
        ("cache_config", "cache_dtype", "int8_per_token_head", "a quantised KV cache"),
        ("cache_config", "cache_dtype", "float16", "a KV cache of another dtype"),
    ],
)
def test_resolved_settings(part: str, field: str, value: Any, feature: str) -> None:
    """Settings that this machine cannot resolve in full: the predicate alone."""
    config = engine_config()
    check(config)
    object.__setattr__(getattr(config, part), field, value)
    with pytest.raises(ValueError, match=f"kv_compress: {feature}"):
        check(config)


@pytest.mark.parametrize(
    "options", [{"exact": "kvzip"}, {"context_stride": 256}], ids=["exact", "stride"]
)
def test_what_is_for_shared_contexts_where_nobody_can_share_one(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    layers = ["sliding_attention", "full_attention"] * 2
    model = model_like(
        tmp_path, architectures=["Olmo3ForCausalLM"], model_type="olmo3", num_hidden_layers=4,
        sliding_window=64, layer_types=layers,
    )  # fmt: skip
    (key,) = options
    with pytest.raises(
        ValueError, match=rf"kv_compress: {key}=\S+ is not accepted: layers with a w"
    ):
        EngineArgs(model, additional_config={"kv_compress": options}).create_engine_config()


def test_several_ranks_of_an_external_launcher() -> None:
    """Every rank has a scheduler of its own there, which hears its own rank only."""
    config = engine_config()
    object.__setattr__(config.parallel_config, "distributed_executor_backend", "external_launcher")
    check(config)
    object.__setattr__(config.parallel_config, "world_size", 2)
    with pytest.raises(ValueError, match="several ranks of an external launcher"):
        check(config)


Attributes = dict[str, Any]


def with_model(attributes: Attributes, max_model_len: int = 2048) -> VllmConfig:
    """The engine's configuration as if the model's had these attributes, which saves vLLM the
    import of every model."""
    config = engine_config()
    text = config.model_config.hf_text_config
    for name, value in attributes.items():
        setattr(text, name, value)
    if len(set(attributes.get("layer_types", ()))) < 2:  # what vLLM does
        config.cache_config.sliding_window = attributes.get("sliding_window")
    config.model_config.max_model_len = max_model_len
    return config


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"sliding_window": 512},
         "has a window of 512 tokens in every layer, and max_model_len is 2048; --max-model-len "
         "512 or --disable-sliding-window"),
        ({"sliding_window": 512, "layer_types": [SLIDING] * 4}, "a window of 512 tokens in every"),
        ({"sliding_window": 512, "layer_types": [FULL, SLIDING, FULL, FULL]},
         "has 1 of 4 layers (1) of sliding_attention with a window of 512 tokens beside 3 with "
         "full attention, of which vLLM makes 3 KV cache groups; one group can be compressed"),
        ({"layer_types": ["chunked_attention"] * 2},
         "has 2 of 2 layers (0-1) of chunked_attention; without"),
        ({"layer_types": [FULL, "sparse_attention"]},
         "has 1 of 2 layers (1) of sparse_attention; without"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"param_sink_number": 128}, "learnt keys before the prompt"),
        ({"num_kv_shared_layers": 2}, "has 2 layers that read the keys of others"),
        ({"model_type": "hrm_text"}, "attention to later tokens of the prompt"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_model_its_layers_and_the_way_out(
    attributes: Attributes, message: str
) -> None:
    with pytest.raises(ValueError, match=r"kv_compress: .* not supported") as error:
        check(with_model(attributes))
    assert message in str(error.value)
    assert f"{str(MODEL)!r} (LlamaForCausalLM)" in str(error.value)


@pytest.mark.parametrize(
    "attributes",
    [
        {"attn_logit_softcapping": 50.0},  # Gemma 2
        {"model_type": "gpt_oss", "layer_types": [FULL, FULL]},
        {"add_swa_attention_sink_bias": True},  # in layers with a window alone
    ],
)
def test_what_the_kernels_know(attributes: Attributes) -> None:
    check(with_model(attributes))


@pytest.mark.parametrize(
    ("attributes", "max_model_len"),
    [
        ({"sliding_window": 262144}, 2048),  # Phi-4-mini
        ({"sliding_window": 512}, 512),  # Mistral 0.1
        ({"sliding_window": 512, "layer_types": [SLIDING] * 4}, 100),
    ],
)
def test_a_window_that_no_request_outgrows_is_left_out(
    attributes: Attributes, max_model_len: int
) -> None:
    config = with_model(attributes, max_model_len)
    check(config)
    assert config.model_config.get_sliding_window() is None
    assert config.cache_config.sliding_window is None


@pytest.mark.parametrize(
    "kinds",
    [[SLIDING, FULL], [SLIDING, SLIDING, FULL], [SLIDING, FULL] * 4 + [FULL],
     [FULL, "chunked_attention"], [FULL, SLIDING, "chunked_attention"]],
)  # fmt: skip
def test_layers_beside_those_with_full_attention_are_served(kinds: list[str]) -> None:
    config = with_model({"sliding_window": 4096, "layer_types": kinds})
    check(config)
    assert config.model_config.get_sliding_window() == 4096  # not touched
    object.__setattr__(config.scheduler_config, "disable_hybrid_kv_cache_manager", True)
    with pytest.raises(ValueError, match="leave out --disable-hybrid-kv-cache-manager"):
        check(config)


def test_full_attention_is_ours_and_windows_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config()
    chosen = config.attention_config.backend_per_kind
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    leave_local_layers(config)
    assert chosen == {"sliding_window": AttentionBackendEnum.FLASH_ATTN}
    chosen["sliding_window"] = AttentionBackendEnum.TRITON_ATTN
    leave_local_layers(config)
    assert chosen == {"sliding_window": AttentionBackendEnum.TRITON_ATTN}  # as the user wants
    chosen["full_attention"] = AttentionBackendEnum.TRITON_ATTN
    with pytest.raises(ValueError, match="has full_attention=TRITON_ATTN"):
        leave_local_layers(config)


def test_layers_with_chunks_get_no_backend_of_ours() -> None:
    """vLLM asks for it as if they had full attention; ours would not know of them."""
    from vllm.model_executor.layers.attention import chunked_local_attention

    import kvcompress_vllm.integration.worker.worker  # noqa: F401  what workers import

    config = engine_config()
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
    with set_current_vllm_config(config):
        found = chunked_local_attention.get_attn_backend(32, torch.float32, "auto")
    assert found is LocalCpuBackend


def test_the_ways_out_of_a_window(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    model = model_like(tmp_path, **mistral, sliding_window=512)
    refused(model, "sliding window")
    for way_out in ({"disable_sliding_window": True}, {"max_model_len": 512}):
        args = EngineArgs(model, additional_config={"kv_compress": {}}, **way_out)
        config = args.create_engine_config()
        assert config.model_config.max_model_len == 512
        assert config.model_config.get_sliding_window() is None


def test_the_models_own_quantised_cache_names_the_way_out() -> None:
    config = engine_config()
    config.cache_config.cache_dtype = "fp8"  # as vLLM resolves it from a checkpoint
    with pytest.raises(ValueError, match="a cache of fp8; --kv-cache-dtype bfloat16"):
        check(config)


def hybrid(monkeypatch: pytest.MonkeyPatch, kinds: list[str]) -> VllmConfig:
    config = with_model({"layer_types": kinds})
    monkeypatch.setattr(type(config.model_config), "is_hybrid", property(lambda self: True))
    config.cache_config.enable_prefix_caching = False
    config.additional_config["kv_compress"] = {}  # nothing was chosen for this model yet
    return config


def test_a_hybrid_without_other_layers_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite 4 dense: the code of a hybrid, and every layer attention."""
    config = hybrid(monkeypatch, [FULL] * 4)
    config.cache_config.enable_prefix_caching = True
    check(config)
    assert not attention_kinds.has_states(config)


@pytest.mark.parametrize(
    "kinds",
    [
        ["mamba", "mamba", FULL, "mamba"],
        ["linear_attention", FULL] * 2,
        # Layers that keep nothing (Nemotron-H) are in no group.
        ["mamba", "mlp", "mlp", FULL, "mlp", "mamba"],
        ["mamba", FULL, FULL, FULL, "mamba", "mamba"],
    ],
)
def test_states_beside_full_attention_are_served(
    kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hybrid(monkeypatch, kinds)
    check(config)
    assert attention_kinds.full_layers(config) == [i for i, k in enumerate(kinds) if k == FULL]
    assert unshared(config) is not None


@pytest.mark.parametrize(
    ("kinds", "changes", "message"),
    [
        (["mamba", FULL], {"cache_config.enable_prefix_caching": True},
         "has 1 of 2 layers (0) of mamba; with prefix caching .*; give --no-enable-prefix-caching"),
        (["mamba", FULL], {"parallel_config.pipeline_parallel_size": 2},
         "leave out --pipeline-parallel-size"),
        (["mamba", FULL, SLIDING], {}, "windows beside states cannot be laid out"),
        (["mamba", FULL, FULL, FULL, FULL], {},
         "beside 4 with full attention, of which vLLM makes 4 KV cache groups"),
        ([], {"cache_config.enable_prefix_caching": True}, "has such layers; with prefix caching"),
    ],
)  # fmt: skip
def test_states_are_refused_by_name(
    kinds: list[str],
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = hybrid(monkeypatch, kinds)
    for path, value in changes.items():
        part, _, name = path.partition(".")
        setattr(getattr(config, part), name, value)
    wanted = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(ValueError, match=rf"a state in the place of keys .*{wanted}"):
        check(config)


def test_packed_pages_of_fewer_bits_have_no_place_beside_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = hybrid(monkeypatch, ["mamba", FULL])
    config.additional_config["kv_compress"] = {"page_dtype": "int4"}
    config.model_config.dtype = torch.bfloat16
    with pytest.raises(ValueError, match="page_dtype='int4' is not accepted with layers that keep"):
        check(config)
    config.additional_config["kv_compress"] = {}
    check(config)
    assert config.additional_config["kv_compress"]["page_dtype"] == "auto"
    assert config.additional_config["kv_compress"]["ratio"] == 2


def test_a_model_without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config()
    monkeypatch.setattr(type(config.model_config), "is_attention_free", property(lambda self: True))
    with pytest.raises(
        ValueError, match=r"a state in the place of keys \(Mamba.* has no attention"
    ):
        check(config)


def test_latents_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_model({"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    monkeypatch.setattr(type(config.model_config), "use_mla", property(lambda self: True))
    with pytest.raises(ValueError, match=r"\(MLA\).* one latent of 576 numbers per token"):
        check(config)


def test_a_pool_smaller_than_the_longest_request_names_the_way_out() -> None:
    args = EngineArgs(
        str(MODEL),
        max_model_len=2048,
        block_size=16,
        additional_config={"kv_compress": {"ratio": 4}},
    )
    config = args.create_engine_config()
    config.cache_config.num_gpu_blocks_override = 90
    stock = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    groups = [KVCacheGroupSpec([*"abcd"], KVCompressSpec.of(stock, 8, 2, 0.25))]
    with pytest.raises(ValueError, match=r"has 90 blocks of 16 tokens.* may need 129;") as error:
        check_longest_request(config, groups, 1 << 30)
    peak = re.search(r"--kv-compress-prefill-peak-tokens (\d+)", str(error.value))
    assert peak is not None and "--max-model-len" in str(error.value)
    # What is named helps, and no larger one does.
    for tokens, fits in ((int(peak[1]), True), (int(peak[1]) + 256, False)):
        config.additional_config["kv_compress"]["prefill_peak_tokens"] = tokens
        if fits:
            check_longest_request(config, groups, 1 << 30)
        else:
            with pytest.raises(ValueError, match="keep less"):
                check_longest_request(config, groups, 1 << 30)
    config.additional_config["kv_compress"]["prefill_peak_tokens"] = None
    config.cache_config.num_gpu_blocks_override = 129
    check_longest_request(config, groups, 1 << 30)
    # Layers with a window hold some, too: here (512 - 1 + 2048) / 16 + 1, but no more than 2,048.
    local = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=512
    )
    with pytest.raises(ValueError, match="may need 258;"):
        check_longest_request(config, [*groups, KVCacheGroupSpec([*"efgh"], local)], 1 << 30)


@pytest.mark.parametrize(
    ("options", "blocks", "named"),
    [
        ({"mass": 0.5, "prefill_peak_tokens": 256}, 100, {"min_ratio"}),
        ({"mass": 0.5}, 100, {"min_ratio", "prefill_peak_tokens"}),
        ({"mass": 0.5, "min_ratio": 2, "max_ratio": 6, "prefill_peak_tokens": 256}, 70,
         {"min_ratio"}),
        ({"mass": 0.5, "max_ratio": 3, "prefill_peak_tokens": 256}, 20, set()),
        ({"mass": 0.5, "page_dtype": "auto", "min_ratio": 16, "prefill_peak_tokens": 256}, 9,
         set()),
        ({"budget_tokens": 1900, "prefill_peak_tokens": 256}, 100, set()),
    ],
)  # fmt: skip
def test_a_pool_that_is_too_small_names_what_keeps_less(
    options: dict[str, Any], blocks: int, named: set[str]
) -> None:
    """A mass alone may keep all of a prompt, and has no ratio to raise."""
    config = EngineArgs(
        str(MODEL), max_model_len=2048, block_size=16, additional_config={"kv_compress": options}
    ).create_engine_config()
    config.cache_config.num_gpu_blocks_override = blocks
    stock = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    groups = [KVCacheGroupSpec([*"abcd"], KVCompressSpec.of(stock, 8, 2, 0.25))]
    with pytest.raises(ValueError, match=f"has {blocks} blocks of 16") as error:
        check_longest_request(config, groups, 1 << 30)
    message = str(error.value)
    found = dict(re.findall(r"--kv-compress-([a-z-]+) (\d+)", message))
    assert {key.replace("-", "_") for key in found} == named, message
    assert "a higher ratio" not in message
    assert ("fewer budget_tokens" in message) == ("budget_tokens" in options)
    if named:  # what is named helps
        given = {key.replace("-", "_"): int(value) for key, value in found.items()}
        config.additional_config["kv_compress"] = {**options, **given}
        check_longest_request(config, groups, 1 << 30)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.feature)
def test_document_lists_every_refusal(refusal: Any) -> None:
    rows = [line for line in SUPPORTED.splitlines() if line.startswith(f"| {refusal.feature} |")]
    assert len(rows) == 1
    assert refusal.setting.split(",")[0] in rows[0]


@pytest.mark.parametrize(
    ("changes", "block_size", "message"),
    [
        ({}, 16, None),
        ({"head_dim": 72}, 16, "head size 72 on a GPU .*32, 64, 80"),
        ({"num_attention_heads": 64, "num_key_value_heads": 2}, 16, "32 query heads per KV head"),
        ({}, 48, "block size 48 on a GPU .*power of two"),
    ],
)
def test_shapes_without_cuda_kernels(
    tmp_path: Path, changes: dict[str, Any], block_size: int, message: str | None
) -> None:
    config = EngineArgs(model_like(tmp_path, **changes), block_size=block_size)
    vllm_config = config.create_engine_config()
    if message is None:
        check_kernels(vllm_config)
        return
    with pytest.raises(ValueError, match=f"kv_compress: {message}.* not supported"):
        check_kernels(vllm_config)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"policy": "echo"}, {"block_size": 48},
         r"--block-size 48 is not accepted with policy=echo.* must divide 256 \(16, 32"),
        ({"policy": "snapkv", "allow_policies": "echo"}, {"block_size": 48}, "--block-size 48"),
        ({"policy": "snapkv"}, {"block_size": 48}, None),
        ({"policy": "h2o", "query_stride": 1, "window": 8}, {"block_size": 16},
         "query_stride=1 and window=8 are too small"),
        ({"policy": "h2o", "query_stride": 4},
         {"block_size": 32, "max_num_batched_tokens": 16, "max_num_seqs": 2,
          "max_model_len": 512, "enable_chunked_prefill": True},
         "--max-num-batched-tokens .* block size of 32"),
        ({"policy": "h2o", "query_stride": 1}, {"max_num_batched_tokens": 64, "max_num_seqs": 64,
         "max_model_len": 512, "enable_chunked_prefill": True, "block_size": 16},
         r"query_stride=1 .*--max-num-batched-tokens.* at least 79 \(16, and 1 for each of 63 "
         r"others\), and one is 64; or --max-num-seqs at most 49, or query_stride=0"),
        ({"policy": "snapkv", "allow_policies": True, "query_stride": 8}, {"block_size": 16,
         "max_num_batched_tokens": 64, "max_num_seqs": 64, "max_model_len": 512,
         "enable_chunked_prefill": True},
         "query_stride=8 .* 79 .*or query_stride=0"),
        ({"policy": "snapkv", "allow_policies": True}, {"max_num_batched_tokens": 64,
         "max_num_seqs": 64, "max_model_len": 512, "enable_chunked_prefill": True}, None),
        ({"policy": "h2o"}, {}, None),
        ({"policy": "echo", "exact": "kvzip"}, {"long_prefill_token_threshold": 1},
         "exact='kvzip' .*--long-prefill-token-threshold is 1 and must be 0 or at least 2"),
        ({"policy": "echo", "exact": "kvzip"}, {"speculative_config": ngram(3), "max_num_seqs": 17,
         "max_num_batched_tokens": 61, "max_model_len": 512}, "is 61 and must be at least 62"),
        ({"policy": "echo", "exact": "kvzip"}, {"speculative_config": ngram(3), "max_num_seqs": 17,
         "max_num_batched_tokens": 62, "max_model_len": 512}, None),
        ({"policy": "h2o"}, {"max_num_batched_tokens": 2048, "max_num_seqs": 256}, None),
        ({"policy": "snapkv", "prefill_peak_tokens": 256, "min_tokens_per_head": 300},
         {"block_size": 16}, "prefill_peak_tokens=256 is too small"),
    ],
    ids=["echo", "allowed", "others", "stride", "steps", "decodes", "asked for", "window only",
         "defaults", "threshold", "drafts", "room", "vLLM's defaults", "peak"],
)  # fmt: skip
def test_sizes_are_refused_before_the_model_is_read(
    options: dict[str, Any], arguments: dict[str, Any], message: str | None
) -> None:
    args = EngineArgs(str(MODEL), additional_config={"kv_compress": options}, **arguments)
    if message is None:
        args.create_engine_config()
        return
    with pytest.raises(ValueError, match=message):
        args.create_engine_config()


def test_head_sizes_are_those_that_the_kernels_are_built_for() -> None:
    source = (MODEL.parents[1] / "csrc/cuda/launch.h").read_text()
    assert tuple(map(int, re.findall(r"case (\d+):", source))) == ops.CUDA_HEAD_SIZES


def test_cuda_graphs_need_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references wait for the device, which a capture does not allow: not found out there."""
    options = {"additional_config": {"kv_compress": {}}, "block_size": 16}
    graphs = EngineArgs(str(MODEL), **options).create_engine_config()
    graphs.model_config.enforce_eager = False
    eager = EngineArgs(str(MODEL), enforce_eager=True, **options).create_engine_config()
    monkeypatch.setattr(refusals.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(ops, "backends", lambda: {"CUDA": {"write_kv": False, "compact": True}})
    with pytest.raises(ValueError, match=r"write_kv.*KVCOMPRESS_BUILD=cuda, or give --enforce"):
        check(graphs)
    check(eager)
    monkeypatch.setattr(ops, "backends", lambda: {"CUDA": {"write_kv": True}})
    check(graphs)


def test_flags_of_newer_vllm_are_found_where_they_are() -> None:
    """Attributes that the installed release may not have."""
    experts = next(r for r in REFUSALS if r.feature == "returned routed experts")
    there = SimpleNamespace(enable_return_routed_experts=True)
    nothing = SimpleNamespace()
    assert experts.applies(SimpleNamespace(model_config=nothing, aux_output_config=there))
    assert experts.applies(SimpleNamespace(model_config=there))
    assert not experts.applies(SimpleNamespace(model_config=nothing))
    drafts = next(r for r in REFUSALS if r.feature == "this speculative decoding")
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(method="mtp", parallel_drafting=False),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        num_prefill_lookahead_tokens=2,
    )
    assert "read ahead of a prefill" in drafts.applies(config)
    for limits in ({"max_num_seqs": 1}, {"max_num_seqs": 8, "max_num_active_seqs": 1}):
        config = SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=True),
            scheduler_config=SimpleNamespace(**limits),
        )
        assert "must be 2 at least" in (exact_problem(config) or "")
