# SPDX-License-Identifier: Apache-2.0
"""Whether speculation changes answers, and how much of what is drafted is accepted.

    python -m benchmarks.speculation --ratios stock 1 8 --prompts 200

Every ratio answers the same prompts greedily, without speculation and with it, each in a process of
its own. One JSON line per ratio: answers that are the same token by token, the first differences,
and acceptance. Prompts are of all retrieval tasks in turn, from the test seeds; with ``--texts`` of
a real model, questions about real text (``benchmarks.real``), of documents that no head of
``benchmarks.eagle_head`` was trained on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.offline import STOCK

TASKS = ("single", "multikey", "kv40", "copy", "qa", "vt2", "multiquery", "fwe")
LENGTHS = (200, 400, 800, 1200)
FIRST_SEED = 100_000
NGRAM = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}'


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "models" / "tiny"))
    parser.add_argument("--ratios", nargs="+", default=[STOCK, "1", "8"], help="or 'stock'")
    parser.add_argument("--speculative-config", default=NGRAM, help="as of vllm serve")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=1 << 30)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.3)
    parser.add_argument("--texts", type=Path, help="folder of benchmarks.models text")
    parser.add_argument("--tokens", type=int, default=1000, help="of a context of real text")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps(answers(args, *args.only)), flush=True)
        return
    for ratio in args.ratios:
        plain, drafted = (alone(ratio, kind) for kind in ("plain", "drafts"))
        line = json.dumps({"ratio": ratio, **compared(plain, drafted)})
        print(line, flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(line + "\n")


def alone(ratio: str, kind: str) -> dict[str, Any]:
    """What one engine answers, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speculation", *sys.argv[1:], "--only", ratio, kind]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    last: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return last


def compared(plain: dict[str, Any], drafted: dict[str, Any]) -> dict[str, Any]:
    """Of two runs: how many answers are equal, where others differ first, and acceptance."""
    pairs = list(zip(plain["tokens"], drafted["tokens"], strict=True))
    differ = {
        index: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))
        for index, (a, b) in enumerate(pairs)
        if a != b
    }
    counted = drafted["counted"]
    return {
        "answers": len(pairs),
        "equal": len(pairs) - len(differ),
        "first_difference": differ,
        "tokens": sum(len(a) for a, _ in pairs),
        **counted,
        "acceptance": round(counted["accepted_tokens"] / max(1, counted["draft_tokens"]), 4),
    }


def answers(args: argparse.Namespace, ratio: str, kind: str) -> dict[str, Any]:
    """Greedy answers of one engine, and what was drafted."""
    from vllm import SamplingParams

    from kvcompress_vllm import LLM

    prompts = questions(args) if args.texts else tasks(args)
    speculative = json.loads(args.speculative_config) if kind == "drafts" else None
    llm = LLM(
        model=args.model,
        kv_compress=None if ratio == STOCK else {"ratio": float(ratio)},
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=2048,
        block_size=16,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        gpu_memory_utilization=args.gpu_memory_utilization,
        disable_log_stats=False,
        speculative_config=speculative,
    )
    sampling = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    found = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    names = ("drafts", "draft_tokens", "accepted_tokens")
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "counted": {name: found.get(f"vllm:spec_decode_num_{name}", 0) for name in names},
    }


def tasks(args: argparse.Namespace) -> list[Any]:
    """Prompts of the retrieval tasks."""
    from benchmarks.retrieval import TaskGen

    generator = TaskGen.load(args.model)
    return [
        generator.task(TASKS[i % len(TASKS)], LENGTHS[i // len(TASKS) % len(LENGTHS)],
                       FIRST_SEED + i)[0]
        for i in range(args.prompts)
    ]  # fmt: skip


def questions(args: argparse.Namespace) -> list[Any]:
    """Prompts of real text, each with a question about it."""
    from transformers import AutoTokenizer
    from vllm.inputs import TokensPrompt

    from benchmarks.real.samples import SOURCES, Maker

    maker = Maker(AutoTokenizer.from_pretrained(args.model), args.texts, held_out=True)
    found = []
    for i in range(args.prompts):
        sample = maker.facts(SOURCES[i % len(SOURCES)], args.tokens, FIRST_SEED + i)
        question = sample.questions[i // len(SOURCES) % len(sample.questions)]
        found.append(TokensPrompt(prompt_token_ids=sample.context + question.asked))
    return found


if __name__ == "__main__":
    main()
