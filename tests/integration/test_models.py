# SPDX-License-Identifier: Apache-2.0
"""Kinds of models beside Llama, tiny and with random weights: at ratio 1 their greedy tokens are
those of ``transformers``, on the CPU platform and its activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from vllm import SamplingParams

from tests.integration.engines import engine, scheduler

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 32}),  # gelu_tanh_and_mul
    "phi": ("PhiConfig", {"intermediate_size": 256}),  # gelu_new
    "gpt2": (
        "GPT2Config",
        {"n_inner": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    ),
    # Soft caps that the logits reach. transformers' own implementation drops them silently.
    "gemma2": (
        "Gemma2Config",
        {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "layer_types": ["full_attention"] * 2,
            "query_pre_attn_scalar": 4,
            "attn_logit_softcapping": 4.0,
            "attn_implementation": "eager",
        },
    ),
    # As published: half of the layers have a window, which is not compressed.
    "gemma2, windows": (
        "Gemma2Config",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 48,
            "query_pre_attn_scalar": 4,
            "attn_logit_softcapping": 4.0,
            "attn_implementation": "eager",
        },
    ),
    # Learnt sinks, in layers of both kinds.
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attn_implementation": "eager",
        },
    ),
    # A window that no request outgrows is full attention.
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 512}),
    # Layers with a window beside others.
    "olmo3": (
        "Olmo3Config",
        {
            "num_key_value_heads": 2,
            "sliding_window": 48,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2, "sliding_window": 262144}),
}


def saved(kind: str, folder: Path) -> Any:
    """A model of that kind, also in ``folder``."""
    name, changes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        if kind.startswith("gemma"):
            # They scale what tokens are, and the answer would be the last one again and again.
            model.get_input_embeddings().weight.mul_(0.05)
        for parameter, weight in model.named_parameters():
            if parameter.endswith("sinks"):
                weight.normal_(1.0, 2.0)
    model.save_pretrained(folder)
    return model


def expected(model: Any, prompt: list[int], count: int) -> list[int]:
    model.base_model.do_not_compile = True  # newer vLLM has wrapped the class by now
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    prompt = torch.randint(3, 512, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    with engine(
        {"ratio": 1, "max_ratio": 8},
        model=str(tmp_path),
        skip_tokenizer_init=True,
        max_model_len=512,
    ) as llm:

        def generate(**asked: Any) -> list[int]:
            params = SamplingParams(
                temperature=0, max_tokens=12, ignore_eos=True, extra_args=asked, detokenize=False
            )
            (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
            return list(output.outputs[0].token_ids)

        assert generate() == expected(model, prompt, 12)
        assert len(generate(kv_compress_ratio=8)) == 12  # and compressed it runs
        assert not scheduler(llm).running
