# SPDX-License-Identifier: Apache-2.0
"""What the documents say must be there: links, options, metrics, messages, commands, code."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from kvcompress_vllm.config.options import OPTIONS, KVCompressConfig, check_value, is_key
from kvcompress_vllm.config.spelling import parse_spec
from tests.documents.commands import COMMANDS
from tests.documents.reading import ROOT, Block, anchors, blocks, documents, links, name, spans

REASONS = ("GPU: ", "network: ", "long: ", "installs: ")


@pytest.mark.parametrize("path", documents(), ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, fragment = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{link} leads nowhere"
        if fragment:
            assert fragment in anchors(there), f"{link} names no heading of {name(there)}"


def code() -> list[tuple[str, str]]:
    """Every piece of code in the documents of today, and where. Decisions and the changelog tell of
    other days."""
    past = ("docs/decisions/", "CHANGELOG")
    now = [path for path in documents() if not name(path).startswith(past)]
    found = [(name(path), span) for path in now for span in spans(path)]
    return found + [(name(block.path), block.text) for block in blocks() if block.path in now]


def test_options_exist() -> None:
    count = 0
    for where, text in code():
        for flag in re.findall(r"--kv-compress-([a-z][a-z-]*)", text):
            assert is_key(flag.replace("-", "_")), f"{where}: --kv-compress-{flag}"
        specs = re.findall(r"--kv-compress[ =]([a-z_]\S*)", text)
        part = re.fullmatch(rf"({'|'.join(OPTIONS)})=\S+", text) and "=…" not in text
        for spec in [*specs, text] if part else specs:
            # Policies of other packages: those of docs/extend.md and examples/. And names.
            if any(word in spec for word in ("first_keys", "loudest", "NAME")):
                continue
            try:
                options = parse_spec(spec)
                for option, value in options.items():
                    if option in OPTIONS:
                        check_value(option, value)
                if spec in specs:  # the whole of a configuration
                    KVCompressConfig.from_dict(options)
            except ValueError as error:
                pytest.fail(f"{where}: {spec}: {error}")
            count += 1
    assert count > 50


def test_every_option_is_explained() -> None:
    text = (ROOT / "docs/options.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)`", text, re.M))
    assert OPTIONS.keys() <= rows


def constant(part: ast.expr) -> str:
    """What a part of a literal always says."""
    if isinstance(part, ast.FormattedValue) and ast.unparse(part.value) == "SWITCH":
        return "\0kv_compress\0"
    return str(part.value) if isinstance(part, ast.Constant) else ""


def test_messages_are_those_of_the_code() -> None:
    said = [
        "…".join(map(constant, getattr(node, "values", [node])))
        for path in ROOT.glob("kvcompress_vllm/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    said = [re.sub("…?\0…?", "", text) for text in said]
    said = [re.sub(r"…+|%[sdr]|%\.\d+f", "…", text) for text in said]
    section = (ROOT / "docs/troubleshooting.md").read_text().split("## By message")[1]
    messages = re.findall(r"^\| `([^`]+)`", section, re.M)
    assert len(messages) > 10
    for message in messages:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        assert any(all(part in text for part in parts) for text in said), message


def test_commands_are_run_or_say_why_not() -> None:
    unused = set(COMMANDS)
    for block in blocks():
        for command in block.commands():
            fitting = [pattern for pattern in COMMANDS if re.fullmatch(pattern, command, re.S)]
            assert fitting, f"{name(block.path)}: nobody says how it is tested: {command}"
            unused -= set(fitting[:1])
    assert not unused, "in no document any more"
    for how in COMMANDS.values():
        if not how.startswith(REASONS):
            path, _, test = how.partition("::")
            assert f"def {test}(" in (ROOT / path).read_text(), how


def test_throughput_is_that_of_the_results() -> None:
    """Each number of README's table stands in docs/results/."""
    lines = [
        json.loads(line)
        for name in (
            "throughput-19300-tokens",
            "throughput-19300-int4-h200",
            "parallel-8b-h200",
            "parallel-two-h200",
            "throughput-all-memory",
            "throughput-all-memory-formats-h200",
            "serve-19300-tokens",
            "sharing-8b-h200",
        )
        for line in (ROOT / f"docs/results/{name}.jsonl").read_text().splitlines()
    ]
    known = {f"{line['total_tokens_per_s']:,.0f}" for line in lines if "workload" in line}
    known |= {f"{line['median_ttft_ms'] / 1000:.1f}" for line in lines if "rate" in line}
    known |= {str(line["preemptions"]) for line in lines if "rate" in line}
    known |= {f"{line['requests_per_s']:.1f}" for line in lines if "documents" in line}
    table = (ROOT / "README.md").read_text().split("| one GPU |")[1].split("\n\n")[0]
    rows = [row.strip("|").split("|")[1:] for row in table.splitlines()[2:]]
    numbers = [re.match(r"[\d,.]+", cell.strip()) for row in rows for cell in row]
    shown = [number[0] for number in numbers if number]
    assert len(shown) > 8 and set(shown) <= known


def language(block: Block) -> str:
    return "json" if not block.language and block.text.startswith("{") else block.language


@pytest.mark.parametrize(
    "block", [b for b in blocks() if language(b)], ids=lambda block: f"{name(block.path)}"
)
def test_code_can_be_read(block: Block) -> None:
    kind = language(block)
    if kind == "python":
        compile(block.text, name(block.path), "exec")
    elif kind == "json":
        json.loads(block.text)
    elif kind in ("yaml", "yml"):
        list(yaml.safe_load_all(block.text))
    elif kind == "toml" and sys.version_info >= (3, 11):
        import tomllib

        tomllib.loads(block.text)


def test_every_document_has_its_place() -> None:
    navigation = (ROOT / ".ci/mkdocs.yml").read_text()
    for path in ROOT.glob("docs/*.md"):
        assert f"- {path.name}" in navigation or f": {path.name}" in navigation
        if path.name != "README.md":
            assert f"]({path.name})" in (ROOT / "docs/README.md").read_text()
    decisions = (ROOT / "docs/decisions/README.md").read_text()
    for path in ROOT.glob("docs/decisions/0*.md"):
        assert f"]({path.name})" in decisions
