# SPDX-License-Identifier: Apache-2.0
"""Something long to ask about, for all examples: this repository's licence, with a fact in it.

The bundled model (models/tiny) finds the fact, and so does every larger one. Nothing else of the
examples depends on it: put your own document and question in its place.
"""

import os
from pathlib import Path

SERVER = os.environ.get("SERVER", "http://127.0.0.1:8000")
API_KEY = os.environ.get("API_KEY", "none")

FACT = "The secret code for Hobart is 4923853."
QUESTION = "What is the secret code for Hobart?"
ANSWER = "4923853"

_licence = " ".join(Path(__file__).parents[1].joinpath("LICENSE").read_text().split())
_sentences = _licence[:4000].split(". ")
DOCUMENT = ". ".join([*_sentences[:8], FACT[:-1], *_sentences[8:]])
PROMPT = f"{DOCUMENT}\n{QUESTION}"


def show(answer: str, usage: dict[str, int]) -> None:
    """Print an answer, and what compression did to its request."""
    before, after = usage["blocks_before"], usage["blocks_after"]
    print(f"{answer.strip()} ({before} blocks of KV cache before compression, {after} after)")
