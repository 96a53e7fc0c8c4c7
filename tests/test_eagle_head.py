# SPDX-License-Identifier: Apache-2.0
"""The head that ``benchmarks.eagle_head`` trains: what it learns, and what vLLM loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import eagle_head
from tests.integration.heads import save_head


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def test_a_head_learns_what_the_model_says_next() -> None:
    model = small()
    head = eagle_head.Head(model.config)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    tokens = torch.randint(40, (8, 24))
    first, _ = eagle_head.losses(model, head, tokens)
    for _ in range(300):
        loss, agreed = eagle_head.losses(model, head, torch.randint(40, (8, 24)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first
    assert agreed > 0.5  # one of 40 by chance
    # With the embedding of another token it would not know which one comes behind.
    shifted = tokens.roll(1, -1)
    hidden = model.model(tokens).last_hidden_state[:, :-1]
    right = model.lm_head(head(model.model.embed_tokens(tokens[:, 1:]), hidden)).argmax(-1)
    wrong = model.lm_head(head(model.model.embed_tokens(shifted[:, 1:]), hidden)).argmax(-1)
    says = model(tokens).logits[:, 1:].argmax(-1)
    assert (right == says).float().mean() > (wrong == says).float().mean() + 0.2


def test_a_saved_head_has_the_names_that_vllm_loads(tmp_path: Path) -> None:
    model = small()
    eagle_head.save(eagle_head.Head(model.config), model.config, tmp_path / "head")
    saved = load_file(tmp_path / "head" / "model.safetensors")
    assert set(saved) == set(load_file(Path(save_head(tmp_path / "ours")) / "model.safetensors"))
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and config["hidden_size"] == 32
