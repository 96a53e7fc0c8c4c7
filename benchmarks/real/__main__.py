# SPDX-License-Identifier: Apache-2.0
"""Which keys a pretrained model needs, measured without an engine.

    python -m benchmarks.models smollm2 models/smollm2; python -m benchmarks.models text texts
    python -m benchmarks.real prepare models/smollm2 texts samples.jsonl --lengths 1000,2000
    python -m benchmarks.real run models/smollm2 samples.jsonl --output r.jsonl
    python -m benchmarks.real engine models/smollm2 samples.jsonl --policies echo --output e.jsonl
    python -m benchmarks.real kvpress models/smollm2 samples.jsonl --output k.jsonl
    python -m benchmarks.real table r.jsonl k.jsonl --modes hidden

``prepare`` writes token ids, so that ``run`` needs PyTorch and safetensors only, on any device. A
``run`` with the same ``--output`` goes on where the last one ended; it stops by itself after
``--minutes``. ``engine`` asks vLLM with the product the same, token by token; ``kvpress`` that
project's presses, question hidden. Tuning seeds are 0 to 99,999, test seeds 100,000 to 199,999.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

from benchmarks.real.samples import SOURCES, Maker, Sample, read, write, write_text

REPEAT = "\n\nRepeat the previous context exactly.\n\n"
"""KVzip's prompt."""


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[float]:
    return [float(word) for word in words(text)]


def integers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


def prepare(args: argparse.Namespace) -> None:
    """Samples of every source and length."""
    from transformers import AutoTokenizer

    if not 0 <= args.first_seed <= args.first_seed + args.samples <= 200_000:
        raise SystemExit("seeds must lie within 0 to 199999")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    maker = Maker(tokenizer, args.texts)
    seeds = range(args.first_seed, args.first_seed + args.samples)

    def every() -> Iterator[Sample]:
        for length, seed, source in product(args.lengths, seeds, args.sources):
            if args.continuation:
                yield maker.text(source, length, args.continuation, seed)
            else:
                yield maker.facts(source, length, seed)

    if args.as_text:
        count = write_text(
            every(), args.output, partial(tokenizer.decode, skip_special_tokens=True)
        )
        print(f"{args.output}: questions about {count} contexts")
        return
    count = write(every(), args.output)
    repeat = tokenizer.encode(REPEAT, add_special_tokens=False)
    args.output.with_suffix(".repeat.json").write_text(json.dumps(repeat) + "\n")
    print(f"{args.output}: {count} samples")


def run(args: argparse.Namespace) -> None:
    """Result lines of every sample that has none yet."""
    import torch

    from benchmarks.real import decoded, policies, study
    from benchmarks.real.formats import FORMATS
    from benchmarks.real.masks import Shields
    from benchmarks.real.model import Model

    if unknown := set(args.modes) - set(study.MODES):
        raise SystemExit(f"modes {sorted(unknown)} are not accepted; known: {study.MODES}")
    if unknown := set(args.page_dtypes) - FORMATS.keys():
        raise SystemExit(f"page dtypes {sorted(unknown)} are not accepted; known: {list(FORMATS)}")
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    begun = time.monotonic()
    if args.every_layer and study.DECODED in args.modes:
        raise SystemExit("--every-layer: contexts that are generated leave windows alone")
    model = Model(args.model, args.device, getattr(torch, args.dtype), args.every_layer)
    repeat = json.loads(args.samples.with_suffix(".repeat.json").read_text())
    shields = [
        Shields(page=page, recent=recent, floor=args.floor, min_budget=least)
        for page, recent, least in product(args.pages, args.recent, args.min_budget)
    ]
    done = noted(args.output, ("mode", "source", "length", "seed"))
    tables = {}
    if args.calibration:
        contexts = [x.context for x in islice(read(args.calibration), args.calibration_samples)]
        tables = study.calibrate(model, contexts, repeat)
    with args.output.open("a") as file:
        for mode in args.modes:
            known = decoded.POLICIES if mode == study.DECODED else policies.POLICIES
            few = decoded.FEW if mode == study.DECODED else policies.FEW
            names = list(known) if args.policies == ["all"] else args.policies
            names = few if names == ["few"] else names
            names = [study.PRODUCT[mode]] if names == ["product"] else names
            if not tables:
                names = [name for name in names if not name.startswith("table")]
            if wrong := set(names) - known.keys():
                raise SystemExit(f"policies {sorted(wrong)} are not accepted; known: {list(known)}")
            plan = study.Plan(
                names, args.ratios, shields, repeat, args.rows, tables, args.page_dtypes
            )
            wanted = [
                sample
                for sample in islice(read(args.samples), args.limit)
                if (mode, sample.source, sample.length, sample.seed) not in done
                and sample.length in (args.lengths or [sample.length])
                and sample.source in (args.sources or [sample.source])
                and (sample.questions or mode != study.VISIBLE)
            ]
            for batch in batches(wanted, args.contexts if mode == study.DECODED else 1):
                if args.minutes and time.monotonic() - begun > 60 * args.minutes:
                    print("stopped by --minutes", flush=True)
                    return
                start = time.monotonic()
                if mode == study.DECODED:
                    lines = study.generated(model, batch, plan)
                else:
                    lines = study.once(model, batch[0], mode, plan)
                # A sample is done when all of its lines are there.
                text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
                file.write(text)
                file.flush()
                last = batch[-1]
                print(mode, last.source, last.length, last.seed,
                      f"{time.monotonic() - start:.2f} s", flush=True)  # fmt: skip


def through_engine(args: argparse.Namespace) -> None:
    """The same samples through vLLM."""
    from benchmarks.real import engine
    from benchmarks.real.masks import Shields

    samples = [
        sample
        for sample in islice(read(args.samples), args.limit)
        if sample.length in (args.lengths or [sample.length])
    ]
    wanted = list(engine.choices(args.policies, args.ratios, args.modes))
    shields = Shields(16, recent=args.recent, floor=args.floor, min_budget=args.min_budget)
    with args.output.open("a") as file:
        for line in engine.run(str(args.model), samples, wanted, shields, args.llm):
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()


def through_kvpress(args: argparse.Namespace) -> None:
    """Result lines of every sample that has none yet, by the presses of kvpress."""
    import torch

    from benchmarks.real import presses

    names = list(presses.PRESSES) if args.presses == ["all"] else args.presses
    if wrong := set(names) - presses.PRESSES.keys():
        known = list(presses.PRESSES)
        raise SystemExit(f"presses {sorted(wrong)} are not accepted; known: {known}")
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    begun = time.monotonic()
    done = noted(args.output, ("source", "length", "seed"))
    asker = presses.Asker(args.model, args.device, getattr(torch, args.dtype))
    with args.output.open("a") as file:
        for sample in islice(read(args.samples), args.limit):
            if (sample.source, sample.length, sample.seed) in done:
                continue
            if sample.length not in (args.lengths or [sample.length]):
                continue
            if args.minutes and time.monotonic() - begun > 60 * args.minutes:
                print("stopped by --minutes", flush=True)
                return
            start = time.monotonic()
            found = list(presses.lines(asker, sample, names, args.ratios))
            file.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in found))
            file.flush()
            print(sample.source, sample.length, sample.seed,
                  f"{time.monotonic() - start:.2f} s", flush=True)  # fmt: skip


def noted(output: Path, names: Sequence[str]) -> set[tuple[Any, ...]]:
    """What the lines of a file say under these names."""
    if not output.exists():
        return set()
    lines = map(json.loads, output.read_text().splitlines())
    return {tuple(line[name] for name in names) for line in lines}


def batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Samples of the same length and kind, up to ``size`` together."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (
            len(batch) == size
            or batch[0].length != sample.length
            or bool(batch[0].questions) != bool(sample.questions)
        ):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def table(args: argparse.Namespace) -> None:
    """Print what was measured."""
    from benchmarks.real.report import load, print_table

    print_table(load(args.results), args)


def shared() -> argparse.ArgumentParser:
    """What all that measure have in common."""
    result = argparse.ArgumentParser(add_help=False)
    result.add_argument("model", type=Path)
    result.add_argument("samples", type=Path)
    result.add_argument("--output", type=Path, required=True)
    result.add_argument("--ratios", type=numbers, default=[2.0, 4.0, 8.0])
    result.add_argument("--lengths", type=integers, help="only these of the samples")
    result.add_argument("--limit", type=int, help="only the first so many samples")
    return result


def ours() -> argparse.ArgumentParser:
    """What ``run`` and ``engine`` have in common."""
    result = argparse.ArgumentParser(add_help=False)
    result.add_argument("--modes", type=words, default=["hidden"])
    result.add_argument("--floor", type=int, default=16)
    return result


def without_engine() -> argparse.ArgumentParser:
    """What ``run`` and ``kvpress`` have in common."""
    result = argparse.ArgumentParser(add_help=False)
    result.add_argument("--device", default="cpu")
    result.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--minutes", type=float, help="begin no sample after so long")
    return result


def parser() -> argparse.ArgumentParser:
    """Command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = result.add_subparsers(required=True)
    make = commands.add_parser("prepare", help="write samples as token ids")
    make.set_defaults(action=prepare)
    make.add_argument("model", type=Path)
    make.add_argument("texts", type=Path, help="a folder per source")
    make.add_argument("output", type=Path)
    make.add_argument("--sources", type=words, default=list(SOURCES))
    make.add_argument("--lengths", type=integers, default=[1000])
    make.add_argument("--samples", type=int, default=10, help="per source and length")
    make.add_argument("--first-seed", type=int, default=0)
    make.add_argument("--continuation", type=int, default=0, metavar="TOKENS",
                      help="plain text and so many tokens that follow, no facts")  # fmt: skip
    make.add_argument("--as-text", action="store_true",
                      help="a line per question, as benchmarks/lm_eval takes it")  # fmt: skip
    every, both, alone = shared(), ours(), without_engine()
    measure = commands.add_parser("run", parents=[every, both, alone], help="measure")
    measure.set_defaults(action=run)
    measure.add_argument("--policies", type=words, default=["few"],
                         help="names, few, all, or product: its default")  # fmt: skip
    measure.add_argument("--page-dtypes", type=words, default=["auto"],
                         help="how packed pages are stored: auto, fp8, int4, ...")  # fmt: skip
    measure.add_argument("--sources", type=words, help="only these of the samples")
    measure.add_argument("--pages", type=integers, default=[16], help="keys freed together")
    measure.add_argument("--recent", type=integers, default=[32])
    measure.add_argument("--min-budget", type=integers, default=[0])
    measure.add_argument("--every-layer", action="store_true",
                         help="compress layers with a window, too, like the others")  # fmt: skip
    measure.add_argument("--rows", type=int, default=256, help="answer tokens judged at once")
    measure.add_argument("--contexts", type=int, default=1, help="generated side by side")
    measure.add_argument("--calibration", type=Path, help="samples that the tables are made of")
    measure.add_argument("--calibration-samples", type=int, default=8)
    theirs = commands.add_parser("kvpress", parents=[every, alone], help="the same by its presses")
    theirs.set_defaults(action=through_kvpress)
    theirs.add_argument("--presses", type=words, default=["all"])
    ask = commands.add_parser("engine", parents=[every, both], help="the same through vLLM")
    ask.set_defaults(action=through_engine)
    ask.add_argument("--policies", type=words, default=["echo"], help="NAME or NAME:KEY=VALUE;...")
    ask.add_argument("--recent", type=int, default=32)
    ask.add_argument("--min-budget", type=int, default=0)
    ask.add_argument("--llm", type=json.loads, default={}, metavar="JSON",
                     help='more arguments of the engine, like {"dtype": "float32"}')  # fmt: skip
    show = commands.add_parser("table", help="print results")
    show.set_defaults(action=table)
    show.add_argument("results", type=Path, nargs="+")
    show.add_argument("--by", type=words, default=["mode", "length"],
                      help="a table per value of these; others are put together")  # fmt: skip
    show.add_argument("--modes", type=words)
    show.add_argument("--policies", type=words)
    show.add_argument("--tasks", type=words)
    show.add_argument("--least", type=float, default=0.8,
                      help="leave out tasks of which the full cache answers less")  # fmt: skip
    show.add_argument("--markdown", action="store_true")
    show.add_argument("--json", action="store_true", help="a line per cell, with intervals")
    return result


def main() -> Any:
    """Command line."""
    args = parser().parse_args()
    args.action(args)


if __name__ == "__main__":
    main()
