# SPDX-License-Identifier: Apache-2.0
"""One engine of the installed vLLM, on this machine: does compression work with this release?

    python -m tests.releases.engine [--graphs]

Starts an engine on the bundled model with every check of integrity on, finds needles at ratio 8
alone, in a batch and through the prefix cache, has bad values refused as the client's error, and
starts one without compression. On a GPU it runs in 16 bits, and in CUDA graphs where asked to.
Prints a line per check; status 1 where one fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["KVCOMPRESS_CHECK_INTEGRITY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.integration.engines import engine, greedy, samples, scheduler

LENGTH = 1500


def needles(llm: Any, pairs: list[tuple[str, str]]) -> None:
    outputs = greedy(llm, [prompt for prompt, _ in pairs], 16)
    texts = [llm.get_tokenizer().decode(tokens) for tokens in outputs]
    found = sum(text.startswith(answer) for text, (_, answer) in zip(texts, pairs, strict=True))
    assert found == len(pairs), f"found {found} of {len(pairs)}: {texts}"


def compressed(llm: Any, pairs: list[tuple[str, str]]) -> None:
    (prompt, answer), *_ = pairs
    sampling = SamplingParams(temperature=0, max_tokens=16)
    (output,) = llm.generate([prompt], sampling, use_tqdm=False)
    assert output.outputs[0].text.strip().startswith(answer), output.outputs[0].text
    usage = output.kv_compress
    assert usage.compressions == 1, usage
    assert 6 * usage.blocks_after < usage.blocks_before, usage


def prefix_hit(llm: Any, pairs: list[tuple[str, str]]) -> None:
    (prompt, _), *_ = pairs
    assert llm.reset_prefix_cache()
    first = greedy(llm, [prompt], 16)
    sampling = SamplingParams(temperature=0, max_tokens=16)
    (output,) = llm.generate([prompt], sampling, use_tqdm=False)
    assert [list(output.outputs[0].token_ids)] == first
    assert output.num_cached_tokens > LENGTH // 2, output.num_cached_tokens


def generation(llm: Any, pairs: list[tuple[str, str]]) -> None:
    """Compressed again and again while it is decoded, several at once."""
    outputs = greedy(llm, [prompt for prompt, _ in pairs], 150, ignore_eos=True)
    assert all(len(tokens) == 150 for tokens in outputs)


def seeds(llm: Any, pairs: list[tuple[str, str]]) -> None:
    prompts = [prompt for prompt, _ in pairs]
    drawn = [greedy(llm, prompts, 12, temperature=1.0, top_p=0.95, seed=7) for _ in range(2)]
    assert drawn[0] == drawn[1]


def bad_value(llm: Any, pairs: list[tuple[str, str]]) -> None:
    for extra in ({"kv_compress_ratio": "eight"}, {"kv_compress_ratoi": 8}):
        sampling = SamplingParams(temperature=0, max_tokens=4, extra_args=extra)
        try:
            llm.generate([pairs[0][0]], sampling, use_tqdm=False)
        except VLLMValidationError as error:
            assert isinstance(error, ValueError) and next(iter(extra)) in str(error), error
        else:
            raise AssertionError(f"{extra} was accepted")


def pool_is_free(llm: Any, pairs: list[tuple[str, str]]) -> None:
    pool = scheduler(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not scheduler(llm).kv_compress_planner.requests


CHECKS: tuple[Callable[[Any, list[tuple[str, str]]], None], ...] = (
    compressed,
    needles,
    prefix_hit,
    generation,
    seeds,
    bad_value,
    needles,  # refusals have left the engine whole
    pool_is_free,
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.releases.engine")
    parser.add_argument("--graphs", action="store_true", help="run in CUDA graphs")
    pairs = samples("single", LENGTH, 3)
    settings: dict[str, Any] = {"enforce_eager": not parser.parse_args().graphs}
    if torch.cuda.is_available():
        # FlashAttention's; and little memory, so that several releases may run side by side.
        settings |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.05}
    failed = 0
    with engine({"ratio": 8}, **settings) as llm:
        for check in CHECKS:
            failed += _report(check, llm, pairs)
            if failed:
                break
    if not failed:
        with engine(None, **settings) as llm:
            failed += _report(needles, llm, pairs, " without compression")
    print(f"vLLM {version('vllm')}: {'failed' if failed else 'passed'}", flush=True)
    return int(failed > 0)


def _report(check: Any, llm: Any, pairs: list[tuple[str, str]], where: str = "") -> int:
    name = check.__name__ + where
    try:
        check(llm, pairs)
    except Exception as error:
        print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
        return 1
    print(f"ok {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
