# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the bundled model, as the generator needs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Tokens = npt.NDArray[np.uint16]
Positions = npt.NDArray[np.int64]

BOS, EOS, USER, ASSISTANT = 1, 2, 3, 4
NUM_SPECIAL = 6
"""``<pad> <s> </s> <|user|> <|assistant|> <|system|>`` are tokens 0 to 5."""


def join(*parts: Tokens | Sequence[int]) -> Tokens:
    """Concatenate runs of tokens."""
    return np.concatenate([np.asarray(part, dtype=np.uint16) for part in parts])


class Vocab:
    """Encoding without special tokens, and what kind of text each token is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        text = [tokenizer.decode([i], skip_special_tokens=False)
                for i in range(tokenizer.get_vocab_size())]  # fmt: skip
        text[:NUM_SPECIAL] = [""] * NUM_SPECIAL
        self.newline = text.index("\n")
        self.is_special = np.arange(len(text)) < NUM_SPECIAL
        self.is_newline = np.array([t == "\n" for t in text])
        self.ends_sentence = np.array([0 < len(t) <= 3 and t[-1] in ".!?" for t in text])
        self.starts_sentence = np.array(
            [len(t) >= 2 and t[0] == " " and t[1].isascii() and t[1].isupper() for t in text]
        )
        self.is_capital = np.array([t != "" and t[0].isascii() and t[0].isupper() for t in text])

    @classmethod
    def load(cls, model_dir: Path) -> Vocab:
        """Read ``tokenizer.json`` of a model folder."""
        return cls(Tokenizer.from_file(str(model_dir / "tokenizer.json")))

    def encode(self, text: str) -> Tokens:
        """Tokens of a piece of text, no ``<s>`` in front."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint16)

    def decode(self, tokens: Tokens) -> str:
        """Text of the tokens, role markers included."""
        text: str = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return text
