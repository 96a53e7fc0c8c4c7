# SPDX-License-Identifier: Apache-2.0
"""``kvcompress-vllm doctor --model``: what fits, from a model's configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from kvcompress_vllm.cli import main
from kvcompress_vllm.integration.start import capacity, capacity_text
from kvcompress_vllm.integration.start.capacity_text import render
from tests.integration.simulation import MODEL
from tests.integration.test_refusals import model_like

LLAMA = str(MODEL.parents[1] / "benchmarks" / "shapes" / "llama-3.1-8b")
GIB = 1 << 30


def rows(report: dict[str, Any]) -> dict[tuple[int, str], dict[str, Any]]:
    return {(row["ratio"], row["page_dtype"]): row for row in report["fits"]}


def test_an_8b_model_on_80_gib() -> None:
    report = capacity.examine(LLAMA, ["--kv-compress", "ratio=4"], 80 * GIB, 32768)
    assert report["compressed"] and report["compressed_layers"] == list(range(32))
    assert report["bytes_per_token"] == 32 * 8 * 2 * 128 * 2 and report["problems"] == []
    assert 15.9e9 < report["weights"]["bytes"] < 16.2e9  # 8.03 billion parameters
    fits = rows(report)
    full = fits[1, "auto"]
    # 56 GiB of blocks of 2 MiB, less 1.6% for echo scores, state and scratch.
    assert 0.93 < full["blocks"] * 2 * 2**20 / report["memory"]["cache_bytes"] < 0.99
    assert full["requests"] == full["blocks"] // 2048 and full["blocks_packed"] == 2048
    for (ratio, page_dtype), row in fits.items():
        times = max(ratio, 4 if page_dtype == "int4" and ratio > 1 else ratio)
        assert row["blocks_packed"] == pytest.approx(2048 / times, rel=0.05)
        assert row["requests"] == (row["blocks"] - 2048) // row["blocks_packed"] + 1
        bits = {"auto": 1, "fp8": 2, "int4": 4}[page_dtype]
        assert row["keys"] == pytest.approx(min(1, bits / ratio), rel=0.05)
    assert report["configured"] | {"ratio": 4} == fits[4, "fp8"]
    text = render(report)
    assert "compressed in all 32 layers" in text and "131,072 bytes per token" in text

    two = capacity.examine(LLAMA, ["--tensor-parallel-size", "2"], 80 * GIB, 32768)
    assert two["memory"]["weights_bytes"] == report["memory"]["weights_bytes"] // 2
    assert rows(two)[1, "auto"]["requests"] > 2 * full["requests"]
    small = capacity.examine(LLAMA, [], 20 * GIB, 131072)
    assert "does not fit" in small["problems"][0] and "prefill-peak-tokens" in small["problems"][0]
    peak = ["--kv-compress", "ratio=32,prefill_peak_tokens=8192"]
    assert capacity.examine(LLAMA, peak, 20 * GIB, 131072)["problems"] == []
    none = capacity.examine(LLAMA, [], 16 * GIB, 4096)
    assert "nothing is left for the KV cache" in none["problems"][0] and none["fits"] == []


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--kv-cache-memory-bytes", "64M", "--kv-compress-budget-tokens", "256"]
    command = ["doctor", "--model", str(MODEL), "--gpu-memory", "1G", *flags]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    size = (MODEL / "model.safetensors").stat().st_size
    assert size - 20_000 < report["weights"]["bytes"] < size
    # What tests/integration/test_endpoints.py sees a server of this size have, and the null block.
    assert report["configured"]["blocks"] == round(64 * 2**20 / (16 * 3072))
    assert report["configured"]["blocks_packed"] in (16, 17)
    assert report["context"] == 2048
    assert main(command) == 0
    assert f"{MODEL} (LlamaForCausalLM): compressed in all 6 layers" in capsys.readouterr().out


def config_of(name: str, folder: Path, **changes: Any) -> str:
    """The configuration of a model of ``transformers``, without weights."""
    config = getattr(transformers, name)(**changes)
    config.architectures = [name.replace("Config", "ForCausalLM").replace("Text", "")]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return str(folder)


def test_windows_hold_blocks_of_every_request(tmp_path: Path) -> None:
    """Gemma 3 27B: 10 layers of 62, and 6 groups with a window of 1,024 tokens."""
    model = config_of(
        "Gemma3TextConfig", tmp_path, num_hidden_layers=62, hidden_size=5376, head_dim=128,
        intermediate_size=21504, num_attention_heads=32, num_key_value_heads=16,
        sliding_window=1024, max_position_embeddings=131072,
    )  # fmt: skip
    report = capacity.examine(model, ["--kv-compress", "ratio=8"], 80 * GIB, 32768)
    assert len(report["compressed_layers"]) == 10 and report["problems"] == []
    per_group = (1023 + 2 + 15) // 16 + 1
    assert report["other_blocks"] == 6 * per_group
    own = rows(report)[8, "auto"]
    assert own["blocks_full"] == 2048 + 6 * per_group
    assert own["blocks_packed"] == 256 + 6 * per_group
    # A block has the bytes of 10 layers, also where a window has it.
    layer = 16 * 2 * 128 * 2 * 16
    assert own["blocks"] == (report["memory"]["cache_bytes"] - own["beside_bytes"]) // (10 * layer)
    assert f"{6 * per_group} blocks belong to layers that do not" in capacity_text.render(report)


def test_few_heads_are_warned_of(tmp_path: Path) -> None:
    """Gemma 3 270M: 3 layers of 18 with one head; with 4 heads each there would be enough."""
    for heads, warned in ((1, True), (4, False)):
        model = config_of(
            "Gemma3TextConfig", tmp_path / str(heads), num_hidden_layers=18, hidden_size=640,
            head_dim=256, intermediate_size=2048, num_attention_heads=4,
            num_key_value_heads=heads, sliding_window=512,
        )  # fmt: skip
        report = capacity.examine(model, ["--kv-compress"], 80 * GIB, 8192)
        text = f"only {3 * heads} heads (3 layers of {heads}) share the budget of a request"
        assert (text in capacity_text.render(report)) is warned


@pytest.mark.parametrize(
    ("name", "changes", "layers", "block_sizes", "groups"),
    [
        # States of 16 bits, or of 32: what vLLM makes them on CPU from 0.33 on.
        ("GraniteMoeHybridConfig",
         {"num_hidden_layers": 40, "hidden_size": 4096, "num_attention_heads": 32,
          "num_key_value_heads": 8, "mamba_n_heads": 128, "mamba_d_head": 64,
          "mamba_d_state": 128, "mamba_n_groups": 1, "num_local_experts": 0,
          "intermediate_size": 4096,
          "layer_types": (["mamba"] * 9 + ["attention"]) * 4},
         4, (528, 1040), 9),
        ("FalconH1Config",
         {"num_hidden_layers": 8, "hidden_size": 2048, "num_attention_heads": 8,
          "num_key_value_heads": 2, "head_dim": 128, "mamba_d_ssm": 3072, "mamba_n_heads": 48,
          "mamba_d_head": 64, "mamba_d_state": 256},
         8, None, 1),
    ],
    ids=["Granite 4 H Small", "Falcon-H1"],
)  # fmt: skip
def test_states_make_blocks_long(
    name: str, changes: dict[str, Any], layers: int, block_sizes: tuple[int, ...] | None,
    groups: int, tmp_path: Path,
) -> None:  # fmt: skip
    model = config_of(name, tmp_path, max_position_embeddings=131072, **changes)
    flags = ["--kv-compress", "ratio=8", "--no-enable-prefix-caching"]
    report = capacity.examine(model, flags, 80 * GIB, 32768)
    assert report["problems"] == [] and len(report["compressed_layers"]) == layers
    size = report["block_size"]
    assert size % 16 == 0 and size in (block_sizes or (size,)) and size > 256
    assert report["other_blocks"] == groups
    own = rows(report)[8, "auto"]
    full = -(-32768 // size)
    assert own["blocks_full"] == full + groups
    covered = 32768 // size
    assert own["blocks_packed"] == -(-covered // 8) + full - covered + groups
    assert rows(report)[8, "int4"]["requests"] is None


def test_a_model_that_is_not_compressed(tmp_path: Path) -> None:
    model = model_like(tmp_path, param_sink_number=128)
    report = capacity.examine(model, ["--kv-compress", "ratio=8"], 4 * GIB, None)
    assert not report["compressed"] and report["compressed_layers"] == []
    assert "learnt keys before the prompt is not supported" in report["problems"][0]
    fits = rows(report)
    assert fits[1, "auto"]["requests"] and fits[8, "auto"]["requests"] is None
    text = render(report)
    assert (
        "NOT compressed" in text and "-: not compressed" in text and "PROBLEM: learnt keys" in text
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "there is no model at ./nowhere"),
        (["--model", "no/such-model"], "vLLM does not take 'no/such-model'"),
        (["--model", str(MODEL), "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--model", str(MODEL), "--context", "1M"], "max_model_len"),
        (["--model", str(MODEL), "--gpu-memory", "lots"], "'lots' is not accepted; it must be a"),
        (["--model", str(MODEL), "--url", "x"], "not allowed with argument --model"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_questions_without_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", *arguments])
    assert message in capsys.readouterr().err


def test_bad_options_of_ours_are_refused_as_at_startup() -> None:
    report = capacity.examine(str(MODEL), ["--kv-compress", "page_dtype=fp8"], None, None)
    assert report["problems"] == [] and "fits" not in report
    with pytest.raises(ValueError, match="ratio=0 is not accepted"):
        capacity.examine(str(MODEL), ["--kv-compress", "ratio=0"], None, None)
