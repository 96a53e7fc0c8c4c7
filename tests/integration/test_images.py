# SPDX-License-Identifier: Apache-2.0
"""Images in prompts: their tokens are keys like others (Qwen 2.5 VL, tiny, random weights)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorFast,
    Qwen2VLVideoProcessor,
)
from vllm import SamplingParams

from tests.integration.engines import engine, scheduler

START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
WORDS = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vl")
    words = [f"w{i}" for i in range(WORDS)] + [START, END, IMAGE, VIDEO, "<|endoftext|>"]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w0"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<|endoftext|>", eos_token="<|endoftext|>",
        additional_special_tokens=[START, END, IMAGE, VIDEO],
    )  # fmt: skip
    ids = {word: words.index(word) for word in (START, END, IMAGE, VIDEO)}
    size = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorFast(**size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**size),
    ).save_pretrained(path)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 2048, "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                "rope_theta": 10000.0},
            "bos_token_id": 1, "eos_token_id": len(words) - 1,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64,
            "num_heads": 2, "window_size": 56, "fullatt_block_indexes": [1],
        },
        image_token_id=ids[IMAGE], video_token_id=ids[VIDEO],
        vision_start_token_id=ids[START], vision_end_token_id=ids[END],
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).eval().save_pretrained(path)
    return path


def prompt(seed: int, words: int = 160) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    text = [f"w{i}" for i in torch.randint(1, WORDS, (words,), generator=generator).tolist()]
    pixels = torch.randint(0, 255, (280, 336, 3), generator=generator, dtype=torch.uint8)
    middle = words // 4
    shown = [*text[:middle], START, IMAGE, END, *text[middle:]]
    image = Image.fromarray(pixels.numpy())
    return {"prompt": " ".join(shown), "multi_modal_data": {"image": image}}


def generate(llm: Any, asked: list[dict[str, Any]], **options: Any) -> list[Any]:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, extra_args=options)
    return [llm.generate([one], params, use_tqdm=False)[0] for one in asked]


def answers(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_images_are_compressed_like_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    settings = {
        "model": str(folder), "max_model_len": 1024, "max_num_batched_tokens": 320,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        # With its cache vLLM 0.26 hands the processor text without images, which transformers 5.24
        # no longer takes.
        "mm_processor_cache_gb": 0,
    }  # fmt: skip
    asked = [prompt(seed) for seed in range(2)]
    with engine(None, **settings) as llm:
        stock = generate(llm, asked)
    # 280 x 336 pixels are 20 x 24 patches, merged 2 x 2.
    assert {len(output.prompt_token_ids) for output in stock} == {160 + 2 + 120}
    options = {"ratio": 1, "max_ratio": 8, "min_prompt_tokens": 32}
    with engine(options, **settings) as llm:
        assert answers(generate(llm, asked)) == answers(stock)
        scheduler(llm).reset_prefix_cache()
        packed = generate(llm, asked, kv_compress_ratio=4)
        for output in packed:
            usage: Any = output.kv_compress
            assert (usage.blocks_before, usage.blocks_after) == (18, 6)
        # The image is at tokens 41 to 160: with it all protected, no more than its keys stay.
        kept = generate(llm, asked, kv_compress_ratio=4, kv_compress_protect="41:161")
        assert min(output.kv_compress.blocks_after for output in kept) > 6
        # Another image with the same words is another prefix, and is not taken for it.
        (other,) = generate(llm, [{**asked[0], "multi_modal_data": asked[1]["multi_modal_data"]}])
        assert other.num_cached_tokens < 48
        again = generate(llm, asked, kv_compress_ratio=4)
        assert answers(again) == answers(packed)
        assert not scheduler(llm).kv_compress_manager.packed
