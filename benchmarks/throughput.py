# SPDX-License-Identifier: Apache-2.0
"""Offline throughput under batch load, stock vLLM and several ratios side by side in one run.

    python -m benchmarks.throughput --model MODEL --kv-tokens 19300 --ratios 4,16,64

Every engine runs in a process of its own, with vLLM's defaults, on the same random prompts, prefix
caching off (nothing is shared). Total throughput counts prompt and output tokens, as the published
figures do. Without ``--model`` it runs random weights of the Llama-3.1-8B shape. One JSON line per
repeat; the table at the end shows medians, with the range over repeats.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPE = Path(__file__).parent / "shapes" / "llama-3.1-8b"


def measure(args: argparse.Namespace, ratio: float | None) -> None:
    """Run one engine in this process; print one JSON line per repeat."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    from kvcompress_vllm import LLM

    block_size = 16
    length = args.input_len + args.output_len
    pool = (
        {}
        if args.kv_tokens is None
        else {"num_gpu_blocks_override": args.kv_tokens // block_size + 1}
    )
    llm = LLM(
        args.model or str(SHAPE),
        kv_compress=None if ratio is None else {"ratio": ratio},
        load_format="auto" if args.model else "dummy",
        skip_tokenizer_init=True,
        max_model_len=max(length + block_size, args.max_model_len or 0),
        max_num_seqs=args.max_num_seqs,
        enable_prefix_caching=False,
        block_size=block_size,
        **pool,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=args.output_len, ignore_eos=True, detokenize=False
    )
    choice = random.Random(0)
    for repeat in range(-1, args.repeats):
        # The first round is a short warm-up: kernels, allocator, first compression.
        count = 4 if repeat < 0 else args.num_prompts
        prompts = [
            TokensPrompt(prompt_token_ids=choice.choices(range(1000, 4000), k=args.input_len))
            for _ in range(count)
        ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        if [len(output.outputs[0].token_ids) for output in outputs] != [args.output_len] * count:
            raise RuntimeError("a request did not get all of its output")
        if repeat >= 0:
            total = count * length / seconds
            print(
                json.dumps(
                    {
                        "ratio": ratio,
                        "seconds": seconds,
                        "total_tokens_per_s": total,
                        "output_tokens_per_s": count * args.output_len / seconds,
                    }
                ),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: random weights of the Llama-3.1-8B shape")
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=6000, help="tokens")
    parser.add_argument("--output-len", type=int, default=500, help="tokens")
    parser.add_argument("--kv-tokens", type=int, help="size of the KV cache; default: all memory")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--ratios", default="1,8,64", help="comma-separated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON lines go here as well")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        measure(args, None if args.only == "stock" else float(args.only))
        return
    rows = []
    for name in ["stock", *args.ratios.split(",")]:
        command = [sys.executable, "-m", "benchmarks.throughput", *sys.argv[1:], "--only", name]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = [line for line in result.stdout.splitlines() if line.startswith('{"ratio"')]
        if result.returncode or not lines:
            sys.exit(f"{name}: the engine failed with status {result.returncode}")
        print(*lines, sep="\n", flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write("\n".join(lines) + "\n")
        rates = [json.loads(line)["total_tokens_per_s"] for line in lines]
        rows.append((name, statistics.median(rates), min(rates), max(rates)))
    print(f"{'ratio':>8} {'total tok/s':>12} {'range':>19} {'x stock':>8}")
    for name, median, low, high in rows:
        spread = f"{low:.0f}-{high:.0f}"
        print(f"{name:>8} {median:12.0f} {spread:>19} {median / rows[0][1]:8.2f}")


if __name__ == "__main__":
    main()
