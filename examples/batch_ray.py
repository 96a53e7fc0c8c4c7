# SPDX-License-Identifier: Apache-2.0
"""Answer a file of prompts on a Ray cluster, with the KV cache compressed.

    pip install "kvcompress_vllm[ray]"
    python examples/batch_ray.py MODEL prompts.jsonl answers.jsonl --kv-compress ratio=8

One JSON object per line: ``prompt`` or, for a chat, ``messages``; beside it ``id`` (else the number
of the line) and ``sampling_params``, as ``{"max_tokens": 100, "extra_args": {"kv_compress_ratio":
4}}``. Every answer is one line with the id, the text and what the request used. Lines come as they
are ready, so a run that was stopped goes on where it stopped when it is started again. What cannot
be answered goes to ``answers.jsonl.failed``, and is tried again by the next run. Where a worker
dies, Ray starts another, and no row is lost or answered twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from tqdm import tqdm

from kvcompress_vllm.config.spelling import parse_spec
from kvcompress_vllm.ray import check_nodes, engine_kwargs

KINDS = ("prompt", "messages")


def main() -> None:
    args = arguments()
    rows, failures = read(args.prompts)
    done = {line["id"] for line in written(args.answers)}
    todo = [(key, row) for key, row in rows.items() if key not in done]
    failed = args.answers.with_name(f"{args.answers.name}.failed")
    with failed.open("w") as bad, tqdm(total=len(rows), initial=len(rows) - len(todo)) as bar:
        for line in failures:
            put(bad, line)
        if todo:
            answered = run(args, [key for key, _ in todo], [row for _, row in todo])
            with args.answers.open("a") as good:
                for line in answered:
                    if line["id"] in done:
                        continue  # of a block that Ray computed twice
                    done.add(line["id"])
                    put(bad if "error" in line else good, line)
                    bar.update()
        num_failed = len(failures) + sum(key in done for key, _ in todo)
        num_failed -= len({line["id"] for line in written(args.answers)} & {k for k, _ in todo})
    lost = [key for key in rows if key not in done]
    print(f"{len(rows) - len(lost)} of {len(rows)} rows done, {num_failed} failed", file=sys.stderr)
    if lost:
        sys.exit(f"{len(lost)} rows came back neither answered nor failed, as {lost[0]!r}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument(
        "--kv-compress", default="ratio=8", help="as of `vllm serve`; 'off' is plain vLLM"
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="of rows that do not say it")
    parser.add_argument("--replicas", type=int, default=1, help="engines")
    parser.add_argument("--batch-size", type=int, default=64, help="rows that travel together")
    parser.add_argument(
        "--engine", type=json.loads, default={}, help='more for the engine: {"max_model_len": 8192}'
    )
    return parser.parse_args()


def read(path: Path) -> tuple[dict[Any, dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a file by id, and what is wrong with the others."""
    rows: dict[Any, dict[str, Any]] = {}
    failures = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            key: Any = number
            try:
                row = json.loads(line)
                key = row.get("id", number)
                if key in rows:
                    raise ValueError(f"line {number} has the id of another")
                if sum(kind in row for kind in KINDS) != 1:
                    raise ValueError(f"line {number} needs one of {' and '.join(KINDS)}")
                rows[key] = row
            except (ValueError, AttributeError, TypeError) as error:
                failures.append({"id": key, "error": f"{type(error).__name__}: {error}"})
    if len({kind for row in rows.values() for kind in KINDS if kind in row}) > 1:
        sys.exit(f"{path} has both rows with a prompt and rows with messages; split it")
    return rows, failures


def written(path: Path) -> Iterator[dict[str, Any]]:
    """The answers of an earlier run; half a line, of a run that was killed, is cut off."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(end)
                return
            end += len(line)
            yield json.loads(line)


def put(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def run(args: argparse.Namespace, keys: list[Any], rows: list[dict[str, Any]]) -> Iterator[Any]:
    """Answers and errors, as they are ready."""
    if not ray.is_initialized():
        ray.init()
    check_nodes()
    ray.data.DataContext.get_current().enable_progress_bars = False  # we have one
    compressed = {} if args.kv_compress == "off" else engine_kwargs(**parse_spec(args.kv_compress))
    config = vLLMEngineProcessorConfig(
        model_source=args.model,
        engine_kwargs={**compressed, **args.engine},
        concurrency=args.replicas,
        batch_size=args.batch_size,
        # Enough rows in the engine for it to be the bottleneck.
        max_concurrent_batches=max(8, 512 // args.batch_size),
        chat_template_stage="messages" in rows[0],
        detokenize_stage=False,  # the engine has done it
        should_continue_on_error=True,
    )
    most = args.max_tokens

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        from vllm.sampling_params import RequestOutputKind

        asked = json.loads(row["row"])
        params = {"temperature": 0, "max_tokens": most, **asked.get("sampling_params", {})}
        # Nobody reads what an answer is before it is complete; Ray's stage has vLLM say so on every
        # step of every request.
        params["output_kind"] = RequestOutputKind.FINAL_ONLY
        kind = next(kind for kind in ("prompt", "messages") if kind in asked)
        return {kind: asked[kind], "sampling_params": params}

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "key": row["key"],
            "text": row["generated_text"],
            "prompt_tokens": row["num_input_tokens"],
            "completion_tokens": row["num_generated_tokens"],
            "kv_compress": json.dumps((row["metrics"] or {}).get("kv_compress")),
        }

    # As text: Arrow would give every row the keys of all.
    texts, names = [json.dumps(row) for row in rows], [json.dumps(key) for key in keys]
    parts = range(0, len(rows), args.batch_size)
    tables = [
        pyarrow.table(
            {"key": names[i : i + args.batch_size], "row": texts[i : i + args.batch_size]}
        )
        for i in parts
    ]
    processor = build_processor(config, preprocess=prepare, postprocess=finish)
    for row in processor(ray.data.from_arrow(tables)).iter_rows():
        line = {"id": json.loads(row["key"])}
        if row.get("__inference_error__"):
            yield {**line, "error": row["__inference_error__"]}
            continue
        usage = {name: row[name] for name in ("prompt_tokens", "completion_tokens")}
        found = json.loads(row["kv_compress"])
        yield {
            **line,
            "text": row["text"],
            "usage": {**usage, "kv_compress": found} if found else usage,
        }


if __name__ == "__main__":
    main()
