# SPDX-License-Identifier: Apache-2.0
"""How users write the configuration: on the command line, and in a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kvcompress_vllm.config.options import (
    BUDGETS,
    OPTIONS,
    POLICY_OPTIONS,
    KVCompressConfig,
    is_key,
    known_keys,
)
from kvcompress_vllm.config.rules import refusal


def parse_value(name: str, text: str) -> Any:
    """Read one option value from the command line; types as in YAML.

    Raises:
        ValueError: the text is not a scalar, or for ``policy_options`` not name=value,...
    """
    if name == POLICY_OPTIONS:
        return {key: parse_value(f"{name}.{key}", value) for key, value in _pairs(text, name)}
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: 2026-13-45 looks like a date
        value = text
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        value = float(value)  # YAML 1.1 takes 1e-2 for a word
    if value is None or isinstance(value, list | dict):
        accepted = OPTIONS[name].metadata["accepted"] if name in OPTIONS else "a number or a word"
        raise refusal(name, text, accepted)
    return value


def check(options: Mapping[str, Any]) -> None:
    """Refuse what no further option can mend, while flags are still being read.

    Raises:
        ValueError: as :meth:`KVCompressConfig.from_dict`; but whose options ``policy_options`` are
            is only known once ``policy`` is given.
    """
    if "policy" not in options:
        later = (POLICY_OPTIONS, "query_stride")
        options = {k: v for k, v in options.items() if k.split(".")[0] not in later}
    if "allow_policies" not in options:
        # Requests may yet be allowed to choose one that observes more.
        options = {key: value for key, value in options.items() if key != "query_stride"}
    if not set(BUDGETS) & options.keys():
        # The default ratio may still be replaced: a limit below it is not yet wrong.
        options = {**options, "budget_tokens": 1}
    KVCompressConfig.from_dict(options)


def parse_spec(spec: str) -> dict[str, Any]:
    """Read what follows ``--kv-compress``: nothing, ``key=value,...`` or the path of a YAML file.

    Returns:
        The options given, unchecked except for their names.

    Raises:
        ValueError: unknown key, malformed text, or an unreadable file.
    """
    spec = spec.strip()
    if spec.endswith((".yaml", ".yml")):
        return _read_yaml(Path(spec))
    options: dict[str, Any] = {}
    for name, text in _pairs(spec, "--kv-compress"):
        if not is_key(name):
            raise ValueError(f"kv_compress: unknown key {name!r}; {known_keys()}")
        options[name] = parse_value(name, text)
    return options


def _pairs(spec: str, flag: str) -> list[tuple[str, str]]:
    """The names and values of ``name=value,name=value``."""
    pairs: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals and flag == POLICY_OPTIONS:
            raise refusal(flag, spec, OPTIONS[flag].metadata["accepted"])
        if not equals:
            raise ValueError(
                f"kv_compress: {item!r} is neither key=value nor a .yaml file; give options as "
                "--kv-compress ratio=8,window=16, and the model before --kv-compress"
            )
        if name in pairs:
            raise ValueError(f"kv_compress: {name} is given twice in {spec!r}")
        pairs[name] = text
    return list(pairs.items())


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"kv_compress: cannot read {str(path)!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(
            f"kv_compress: {str(path)!r} must hold a mapping of options; {known_keys()}"
        )
    KVCompressConfig.from_dict(options)
    return options
