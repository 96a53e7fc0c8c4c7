# SPDX-License-Identifier: Apache-2.0
"""The engine on a GPU: model runner V2, async scheduling, full CUDA graphs, FlashAttention."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.integration.engines import engine, greedy, samples

pytestmark = pytest.mark.gpu

PAIRS = samples("single", 1500, 20, offset=2000)
PROMPTS = [prompt for prompt, _ in PAIRS]


def gpu_engine(options, **arguments):
    defaults = {"dtype": "bfloat16", "enforce_eager": False, "kv_cache_memory_bytes": None,
                "gpu_memory_utilization": 0.3, "num_gpu_blocks_override": 2000}  # fmt: skip
    return engine(options, **{**defaults, **arguments})


def right(llm, outputs) -> int:
    """Outputs that start with the answer of their prompt."""
    texts = [llm.get_tokenizer().decode(ids, skip_special_tokens=True) for ids in outputs]
    pairs = zip(texts, PAIRS, strict=True)
    return sum(text.strip().startswith(answer) for text, (_, answer) in pairs)


def test_ratio_1_gives_the_tokens_of_stock_vllm() -> None:
    with gpu_engine(None) as llm:
        expected = greedy(llm, PROMPTS, 16)
        assert right(llm, expected) == 20
    with gpu_engine({"ratio": 1}) as llm:
        assert greedy(llm, PROMPTS, 16) == expected


def test_graphs_eager_and_synchronous_scheduling_give_the_same_answers() -> None:
    """Until the end of text: beyond it the text is arbitrary, and the kernels round differently."""
    outputs = []
    for eager, asynchronous in [(False, True), (False, False), (True, True)]:
        with gpu_engine({"ratio": 8}, enforce_eager=eager, async_scheduling=asynchronous) as llm:
            outputs.append(greedy(llm, PROMPTS, 16))
            assert right(llm, outputs[-1]) >= 18
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_life_cycle_with_preemption_and_decode_compression(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is checked: each block owned once, scheduler and worker agree."""
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    options = {"ratio": 4, "interval": 2}
    arguments = {"num_gpu_blocks_override": 260, "max_num_seqs": 16}
    with gpu_engine(options, async_scheduling=asynchronous, **arguments) as llm:
        outputs = greedy(llm, PROMPTS, 300, ignore_eos=True)
        assert all(len(tokens) == 300 for tokens in outputs)
        assert right(llm, outputs) >= 18
