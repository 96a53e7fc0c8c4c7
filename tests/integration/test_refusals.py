# SPDX-License-Identifier: Apache-2.0
"""Unsupported models and features are refused at startup, by name; the README lists them all."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from kvcompress_vllm import ops
from kvcompress_vllm.integration.start.wiring import REFUSALS, check, check_kernels
from tests.integration.simulation import MODEL

README = (MODEL.parents[1] / "README.md").read_text()


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
        ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 512,
          "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64}, "sliding window"),
        ({"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
          "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
          "v_head_dim": 32, "n_routed_experts": 8}, "multi-head latent attention"),
        ({"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"},
         "encoder-decoder"),
    ],
    ids=["mistral", "gemma2", "deepseek", "whisper"],
)  # fmt: skip
def test_unsupported_models(tmp_path: Path, changes: dict[str, Any], feature: str) -> None:
    refused(model_like(tmp_path, **changes), feature)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, r"hybrid \(Mamba"),
        ({"architectures": ["JambaForCausalLM"], "model_type": "jamba"}, r"hybrid \(Mamba"),
        ({"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text",
          "attention_chunk_size": 512, "num_local_experts": 2}, "sliding window or chunked"),
    ],
    ids=["mamba", "jamba", "llama4"],
)  # fmt: skip
def test_unsupported_models_that_vllm_imports_slowly(
    tmp_path: Path, changes: dict[str, Any], feature: str
) -> None:
    refused(model_like(tmp_path, **changes), feature)


@pytest.mark.parametrize(
    ("arguments", "feature"),
    [
        ({"kv_cache_dtype": "fp8"}, "a quantised KV cache"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2,
                                 "prompt_lookup_max": 3}}, "speculative decoding"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
         "KV connectors"),
        ({"kv_offloading_size": 1.0}, "KV connectors and KV offloading"),
        ({"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}},
         "encoder cache transfer"),
        ({"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
         "KV cache events"),
        ({"kv_sharing_fast_prefill": True}, "KV sharing between layers"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
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
        ("cache_config", "kv_sharing_fast_prefill", True, "KV sharing"),
        ("cache_config", "cache_dtype", "int8_per_token_head", "a quantised KV cache"),
    ],
)
def test_resolved_settings(part: str, field: str, value: Any, feature: str) -> None:
    """Settings that this machine cannot resolve in full: the predicate alone."""
    config = engine_config()
    check(config)
    object.__setattr__(getattr(config, part), field, value)
    with pytest.raises(ValueError, match=f"kv_compress: {feature}"):
        check(config)


@pytest.mark.parametrize("name", ["is_hybrid", "is_attention_free"])
def test_resolved_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config()
    monkeypatch.setattr(type(config.model_config), name, property(lambda self: True))
    with pytest.raises(ValueError, match=r"kv_compress: hybrid \(Mamba"):
        check(config)


def test_chunked_local_attention() -> None:
    config = engine_config()
    config.model_config.hf_text_config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="kv_compress: sliding window or chunked local attention"):
        check(config)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.feature)
def test_readme_lists_every_refusal(refusal: Any) -> None:
    rows = [line for line in README.splitlines() if line.startswith(f"| {refusal.feature} |")]
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


def test_head_sizes_are_those_that_the_kernels_are_built_for() -> None:
    source = (MODEL.parents[1] / "csrc/cuda/launch.h").read_text()
    assert tuple(map(int, re.findall(r"case (\d+):", source))) == ops.CUDA_HEAD_SIZES
