# SPDX-License-Identifier: Apache-2.0
"""Throughput of one engine or several ranks side by side: tensor, pipeline and data parallel.

    python -m benchmarks.parallel --layouts tp1,tp2,pp2,dp2 --engines stock,8 --kv-tokens 19300

Like ``benchmarks.throughput``, through vLLM's asynchronous engine, which is what every layout has.
``--kv-tokens`` is of each engine: with ``dp2`` there are two. One JSON line per run, a table, and
with ``--plot`` a figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from itertools import product
from typing import Any

from tqdm import tqdm

from benchmarks.offline import (
    BLOCK_SIZE,
    SHAPE,
    STOCK,
    Workload,
    arguments,
    counted,
    engine_parser,
    options,
    run_alone,
)
from benchmarks.throughput import print_table

SIZES = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
}


def layout(text: str) -> dict[str, int]:
    """The engine arguments of ``tp2``, or of ``tp2+pp2``.

    Raises:
        argparse.ArgumentTypeError: it does not have this form.
    """
    found = {}
    for part in text.split("+"):
        kind, size = SIZES.get(part[:2]), part[2:]
        if kind is None or not size.isdigit() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no layout, like tp2, pp2, dp2 or tp2+pp2"
            )
        found[kind] = int(size)
    return found


def main() -> None:
    parser = engine_parser("parallel", __doc__, engines=f"{STOCK},8")
    parser.add_argument("--layouts", default="tp1,tp2,pp2,dp2")
    parser.add_argument("--workload", type=Workload.parse, default=Workload(256, 6000, 500))
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, help='JSON: {"enforce_eager": true}'
    )
    parser.add_argument(
        "--request-ratios",
        type=lambda text: [float(ratio) for ratio in text.split(",")],
        default=[None],
        metavar="RATIO,...",
        help="engines that compress run once for each of these, asked by every request; starting "
        "a large model takes minutes",
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        ranks, name = args.only.split(":", 1)
        asyncio.run(measure(args, ranks, name))
        return
    todo = [(ranks, name) for ranks in args.layouts.split(",") for name in args.engines]
    for ranks, _ in todo:
        try:
            layout(ranks)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--layouts: {error}")
    runs: list[dict[str, Any]] = []
    for ranks, name in tqdm(todo, unit="engine"):
        lines = run_alone("parallel", f"{ranks}:{name}")
        tqdm.write("\n".join(lines))
        if args.output:
            with args.output.open("a") as file:
                file.write("\n".join(lines) + "\n")
        runs += map(json.loads, lines)
    for ranks in args.layouts.split(","):
        print_table([run for run in runs if run["layout"] == ranks], f"{ranks}, {args.workload}")
    if args.plot:
        from benchmarks.plots import plot_batch

        plot_batch([{**run, "trace": str(args.workload), "way": run["layout"]} for run in runs],
                   args.plot)  # fmt: skip


async def measure(args: argparse.Namespace, ranks: str, name: str) -> None:
    """Run one engine in this process and those that it starts."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    workload: Workload = args.workload
    given = options(name)
    chosen: dict[str, Any] = {
        "model": args.model or str(SHAPE),
        "load_format": "auto" if args.model and not dummy(args.model) else "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": workload.input_len + workload.output_len + BLOCK_SIZE,
        "max_num_seqs": args.max_num_seqs,
        "enable_prefix_caching": False,
        "block_size": BLOCK_SIZE,
        **layout(ranks),
        **args.engine_args,
        **arguments(name, args.kv_tokens),
    }
    if given is not None:
        chosen["additional_config"] = {"kv_compress": given}
    start = time.perf_counter()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**chosen))
    ready = time.perf_counter() - start
    choice = random.Random(0)
    try:
        await generate(engine, workload._replace(num_prompts=4, output_len=8), choice, "warm")
        ratios = [None] if given is None else args.request_ratios
        for ratio, repeat in product(ratios, range(args.repeats)):
            asked = {} if ratio is None else {"kv_compress_ratio": ratio}
            with counted() as found:
                seconds = await generate(engine, workload, choice, f"{ratio}-{repeat}", asked)
            tokens = workload.input_len + workload.output_len
            line = {
                "engine": name if ratio is None else f"{name}, {ratio:g} asked",
                "layout": ranks,
                "workload": str(workload),
                "start_s": ready,
                "seconds": seconds,
                "total_tokens_per_s": workload.num_prompts * tokens / seconds,
                "output_tokens_per_s": workload.num_prompts * workload.output_len / seconds,
                **found,
            }
            print(json.dumps(line), flush=True)
    finally:
        engine.shutdown()


def dummy(model: str) -> bool:
    """Whether a model is a shape without weights."""
    from pathlib import Path

    folder = Path(model)
    return folder.is_dir() and not any(folder.glob("*.safetensors"))


async def generate(
    engine: Any,
    workload: Workload,
    choice: random.Random,
    name: str,
    asked: dict[str, Any] | None = None,
) -> float:
    """Seconds from the first request to the last answer.

    Args:
        asked: what every request asks of us.

    Raises:
        RuntimeError: a request did not get all of its output.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=workload.output_len, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY, extra_args=asked or None,
    )  # fmt: skip

    async def ask(number: int, ids: list[int]) -> int:
        length = 0
        prompt = {"prompt_token_ids": ids}
        async for output in engine.generate(prompt, params, f"{name}-{number}"):
            length = len(output.outputs[0].token_ids)
        return length

    prompts = [
        choice.choices(range(1000, 4000), k=workload.input_len) for _ in range(workload.num_prompts)
    ]
    start = time.perf_counter()
    tasks = [asyncio.create_task(ask(*pair)) for pair in enumerate(prompts)]
    with tqdm(total=len(tasks)) as bar:
        for task in tasks:
            task.add_done_callback(lambda _: bar.update())
        lengths = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - start
    if set(lengths) != {workload.output_len}:
        raise RuntimeError(f"requests got outputs of {sorted(set(lengths))} tokens")
    return seconds


if __name__ == "__main__":
    main()
