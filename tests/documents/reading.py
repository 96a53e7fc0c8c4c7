# SPDX-License-Identifier: Apache-2.0
"""What the documents hold: links, headings, blocks of code, commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
MARKDOWN = MarkdownIt("commonmark").enable("table")
PROGRAMS = {
    "curl", "docker", "guidellm", "helm", "kubectl", "kvcompress-vllm", "lm_eval", "make", "pip",
    "promtool",
    "python", "uv", "vllm",
}  # fmt: skip


def documents() -> list[Path]:
    """All that people read."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "models/README.md"]
    return sorted([*found, *ROOT.glob("benchmarks/**/README.md"), *ROOT.glob("examples/**/*.md")])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tokens(path: Path) -> list[Token]:
    """Of a document, inline ones behind the blocks that they stand in."""
    blocks = MARKDOWN.parse(path.read_text())
    return [token for block in blocks for token in (block, *(block.children or ()))]


def links(path: Path) -> Iterator[str]:
    for token in tokens(path):
        target = token.attrGet("href") or token.attrGet("src")
        if target:
            yield str(target)


def anchors(path: Path) -> set[str]:
    """What links may name of a document, as GitHub makes it of headings."""
    found, parsed = set(), MARKDOWN.parse(path.read_text())
    for heading, text in pairwise(parsed):
        if heading.type == "heading_open":
            words = re.sub(r"[^\w\- ]", "", text.content.lower())
            found.add(words.replace(" ", "-"))
    return found


@dataclass(frozen=True)
class Block:
    """Code that stands by itself."""

    path: Path
    language: str
    """Empty where it is only indented."""
    text: str

    def commands(self) -> list[str]:
        """One line each, without comments; none where the block holds something else."""
        if self.language not in ("", "bash", "sh"):
            return []
        found, rest = [], ""
        variables: dict[str, str] = {}
        for line in self.text.replace("\\\n", "").splitlines():
            rest += ("\n" if rest else "") + line
            try:
                words = shlex.split(rest, comments=True)
            except ValueError:  # a quotation goes on
                continue
            settings = [word for word in words if re.match(r"[A-Z_]+=", word)]
            if words == settings:
                variables |= dict(word.split("=", 1) for word in words)
            words = [variables.get(word.removeprefix("$"), word) for word in words]
            command = " ".join(word if word == ">" else shlex.quote(word) for word in words)
            program = next((word for word in words if word not in settings), "")
            if Path(program).name in PROGRAMS:
                found.append(command)
            rest = ""
        return found


def blocks() -> list[Block]:
    return [
        Block(path, token.info.strip(), token.content)
        for path in documents()
        for token in tokens(path)
        if token.type in ("fence", "code_block")
    ]


def spans(path: Path) -> list[str]:
    """Code within sentences and tables."""
    return [token.content for token in tokens(path) if token.type == "code_inline"]
