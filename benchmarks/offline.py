# SPDX-License-Identifier: Apache-2.0
"""One engine, several workloads: what the offline benchmarks run in a process of its own."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SHAPE = Path(__file__).parent / "shapes" / "llama-3.1-8b"
BLOCK_SIZE = 16
STOCK = "stock"
"""The name of vLLM without the flag, among the ratios."""


class Workload(NamedTuple):
    """Requests submitted at once."""

    num_prompts: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Read ``256x6000+500``: prompts, their tokens, and generated tokens.

        Raises:
            argparse.ArgumentTypeError: it does not have this form.
        """
        try:
            count, lengths = text.split("x")
            workload = cls(int(count), *map(int, lengths.split("+")))
        except (ValueError, TypeError):
            workload = None
        if workload is None or min(workload) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not PROMPTSxINPUT+OUTPUT, like 256x6000+500"
            )
        return workload

    def __str__(self) -> str:
        return f"{self.num_prompts}x{self.input_len}+{self.output_len}"


def engine_parser(module: str, description: str | None, engines: str) -> argparse.ArgumentParser:
    """The options that benchmarks of whole engines share.

    Args:
        module: name under ``benchmarks``.
        description: the module's docstring.
        engines: default of ``--engines``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        help="a folder with a configuration alone gets random weights; default: the Llama-3.1-8B "
        "shape",
    )
    parser.add_argument(
        "--engines",
        type=engine_names,
        default=engines,
        help="comma-separated ratios, 'stock' for vLLM without the flag; separate by ';' instead "
        "to give options, like 'stock;ratio=8,decode=false', and vLLM's own arguments behind a "
        "colon, like 'stock:kv_cache_dtype=fp8'",
    )
    parser.add_argument(
        "--kv-tokens",
        type=int,
        help="size of the KV cache in tokens of 16 bits per number; default: all memory",
    )
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--plot", type=Path, help="draw the results into this file")
    return parser


def engine_names(text: str) -> list[str]:
    """The names of ``--engines``."""
    return [name for name in text.split(";" if ";" in text else ",") if name]


def pool_blocks(kv_tokens: int) -> int:
    """Blocks of a KV cache for so many tokens; vLLM keeps one for itself."""
    return kv_tokens // BLOCK_SIZE + 1


def options(name: str) -> dict[str, Any] | None:
    """``kv_compress`` of one engine.

    Args:
        name: "stock", a ratio, or ``key=value`` options joined by commas; behind a colon may
            stand what :func:`arguments` reads.
    """
    from kvcompress_vllm.config.spelling import parse_spec

    ours, _, _ = name.partition(":")
    if ours == STOCK:
        return None
    return parse_spec(ours) if "=" in ours else {"ratio": float(ours)}


def arguments(name: str, kv_tokens: int | None) -> dict[str, Any]:
    """vLLM's arguments of one engine, of which the name gives some: ``stock:kv_cache_dtype=fp8``.

    Args:
        name: of the engine.
        kv_tokens: size of the KV cache in tokens of 16 bits per number; None: all memory. With FP8
            the same bytes hold twice as many.
    """
    import yaml

    _, _, theirs = name.partition(":")
    pairs = (pair.partition("=") for pair in theirs.split(",") if pair)
    found: dict[str, Any] = {key: yaml.safe_load(value) for key, _, value in pairs}
    if kv_tokens is not None:
        times = 2 if str(found.get("kv_cache_dtype")).startswith("fp8") else 1
        found["num_gpu_blocks_override"] = pool_blocks(times * kv_tokens)
    return found


def run_alone(module: str, name: str) -> list[str]:
    """One engine in a process of its own, which is told so by ``--only``; its JSON lines.

    Args:
        module: the benchmark, under ``benchmarks``.
        name: of the engine.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *sys.argv[1:], "--only", name]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"engine"')]
    if result.returncode or not lines:
        sys.exit(f"{name}: the engine failed with status {result.returncode}")
    return lines


def has_weights(model: str | None) -> bool:
    """Whether a model is more than a configuration; of a name vLLM will find out."""
    if model is None:
        return False
    folder = Path(model)
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def build(
    args: argparse.Namespace, name: str, workloads: list[Workload], prefix_caching: bool = False
) -> Any:
    """The engine, with vLLM's defaults except for the size of the cache and prefix caching, which
    is off where no two prompts share anything."""
    from kvcompress_vllm import LLM

    return LLM(
        args.model or str(SHAPE),
        kv_compress=options(name),
        load_format="auto" if has_weights(args.model) else "dummy",
        skip_tokenizer_init=True,
        max_model_len=max(w.input_len + w.output_len for w in workloads) + BLOCK_SIZE,
        max_num_seqs=args.max_num_seqs,
        enable_prefix_caching=prefix_caching,
        block_size=BLOCK_SIZE,
        disable_log_stats=False,
        **arguments(name, args.kv_tokens),
    )


def measure(args: argparse.Namespace, name: str, workloads: list[Workload]) -> None:
    """Run one engine in this process; print one JSON line per workload and repeat.

    Raises:
        RuntimeError: a request did not get all of its output.
    """
    llm = build(args, name, workloads)
    choice = random.Random(0)
    # A short round first: kernels, allocator, first compression.
    longest = max(workloads, key=lambda w: w.input_len)
    generate(llm, longest._replace(num_prompts=4, output_len=8), choice)
    for workload in workloads:
        for _ in range(args.repeats):
            print(json.dumps({"engine": name} | generate(llm, workload, choice)), flush=True)


def generate(llm: Any, workload: Workload, choice: random.Random) -> dict[str, Any]:
    """Submit a workload, wait for all of it, and describe the run."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(
        temperature=0, max_tokens=workload.output_len, ignore_eos=True, detokenize=False
    )
    prompts = [
        TokensPrompt(prompt_token_ids=choice.choices(range(1000, 4000), k=workload.input_len))
        for _ in range(workload.num_prompts)
    ]
    with counted() as found:
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
    lengths = {len(output.outputs[0].token_ids) for output in outputs}
    if len(outputs) != workload.num_prompts or lengths != {workload.output_len}:
        raise RuntimeError(f"{len(outputs)} requests got outputs of {sorted(lengths)} tokens")
    total = workload.num_prompts * (workload.input_len + workload.output_len)
    return {
        "workload": str(workload),
        "seconds": seconds,
        "total_tokens_per_s": total / seconds,
        "output_tokens_per_s": workload.num_prompts * workload.output_len / seconds,
        **found,
    }


def _metric(name: str) -> int:
    """A metric of this process's engines, summed over them."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(int(found.value) for found in get_metrics_snapshot() if found.name == name)


@contextmanager
def counted(interval: float = 0.1) -> Iterator[dict[str, int]]:
    """Preemptions, and how many requests ran at most, looked at every ``interval`` seconds; there
    once the block is left."""
    found: dict[str, int] = {}
    samples: list[int] = []
    preempted = _metric("vllm:num_preemptions")
    done = threading.Event()

    def sample() -> None:
        while not done.wait(interval):
            samples.append(_metric("vllm:num_requests_running"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
    found["most_running"] = max(samples, default=0)
    found["preemptions"] = _metric("vllm:num_preemptions") - preempted
