# SPDX-License-Identifier: Apache-2.0
"""How users write the configuration, on the command line, in a YAML file or as a preset's name; and
how help texts write its defaults."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml

from kvcompress_vllm import policies
from kvcompress_vllm.config import presets
from kvcompress_vllm.config.auto import AUTO, GENERAL, PREFERRED_PAGES
from kvcompress_vllm.config.combinations import BUDGETS
from kvcompress_vllm.config.keys import POLICY_OPTIONS, nested
from kvcompress_vllm.config.options import (
    DEFAULT_RATIO,
    OPTIONS,
    KVCompressConfig,
    check_value,
    is_key,
    known_keys,
)
from kvcompress_vllm.config.rules import refusal, shortened, shown, unknown
from kvcompress_vllm.config.yaml_reader import read

LARGEST_FILE = 1 << 16
"""Bytes of a configuration file; the longest of ours has 600."""
LONGEST_REASON = 300
"""Characters that an error message repeats of what the YAML reader says."""


def default_text(name: str) -> str:
    """The default of an option, for help texts."""
    if name == "policy":
        return f"{policies.default(mass=False)}, with a mass {policies.default(mass=True)}"
    if name == "ratio":
        return f"{DEFAULT_RATIO:g} unless budget_tokens or mass is given"
    if name == "page_dtype":
        return f"{PREFERRED_PAGES} where the cache can have it, else {AUTO}"
    if name in GENERAL:
        usual = policies.default(mass=False)
        preferred = getattr(policies.find(usual).defaults, name)
        value = GENERAL[name] if preferred is None else preferred
        return f"{AUTO}, what the policy prefers: for {usual} {value}"
    default = OPTIONS[name].default
    return "none" if default is None or default is MISSING else str(default)


def parse_value(name: str, text: str) -> Any:
    """Read one option value from the command line; types as in YAML.

    Raises:
        ValueError: the text is not a scalar, or for ``policy_options`` not name=value,...
    """
    if name == POLICY_OPTIONS:
        return {key: parse_value(f"{name}.{key}", value) for key, value in _pairs(text, name)}
    try:
        value = read(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    if value is None or isinstance(value, list | dict):
        accepted = OPTIONS[name].metadata["accepted"] if name in OPTIONS else "a number or a word"
        raise refusal(name, text, accepted)
    return _word(name, value)


def _word(name: Any, value: Any) -> Any:
    """``off`` where YAML made false of it and the option takes the word, not the truth value."""
    if value is False and name in OPTIONS:
        accepts = OPTIONS[name].metadata["accepts"]
        return "off" if accepts("off") and not accepts(value) else value
    return value


def check(options: Mapping[str, Any]) -> None:
    """Refuse what no further option can mend, while flags are still being read.

    Raises:
        ValueError: as :meth:`KVCompressConfig.from_dict`; but whose options ``policy_options`` are
            is only known once ``policy`` is given.
    """
    options = nested(options)
    for name, value in options.items():
        if is_key(name):
            check_value(name, value)
    if "policy" not in options:
        _check_policy_options(options.pop(POLICY_OPTIONS, {}))
        options.pop("query_stride", None)
    if "allow_policies" not in options:
        # Requests may yet be allowed to choose one that observes more.
        options.pop("query_stride", None)
    if not set(BUDGETS) & options.keys():
        # The default ratio may still be replaced: a limit below it is not yet wrong.
        options = {**options, "budget_tokens": 1}
    KVCompressConfig.from_dict(options)


def _check_policy_options(options: Mapping[Any, Any]) -> None:
    """Refuse what no policy accepts."""
    if policies.others():
        return  # another package may have it; none of them is imported before it is named
    every = [policies.options_of(name) for name in policies.BUILT_IN]
    every += [policies.shares.find(name).options() for name in policies.shares.BUILT_IN]
    for name, value in options.items():
        rules = [of_one[name].metadata for of_one in every if name in of_one]
        if not rules:
            known = sorted({name for of_one in every for name in of_one})
            raise ValueError(
                f"kv_compress: {unknown(f'{POLICY_OPTIONS} key', name, known)}; it must be one of "
                f"{', '.join(known)}"
            )
        if not any(rule["accepts"](value) for rule in rules):
            accepted = ", or ".join(dict.fromkeys(rule["accepted"] for rule in rules))
            raise refusal(f"{POLICY_OPTIONS}.{name}", value, accepted)


def over(base: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` where ``options`` say nothing. A budget replaces whichever there was, and another
    policy comes without the options of the first."""
    merged, given = nested(base), nested(options)
    if set(BUDGETS) & given.keys():
        merged = {key: value for key, value in merged.items() if key not in BUDGETS}
    if given.get("policy", merged.get("policy")) != merged.get("policy"):
        merged.pop(POLICY_OPTIONS, None)
    both = merged.get(POLICY_OPTIONS), given.get(POLICY_OPTIONS)
    if isinstance(both[0], Mapping) and isinstance(both[1], Mapping):
        given[POLICY_OPTIONS] = {**both[0], **both[1]}
    return {**merged, **given}


def parse_spec(spec: str) -> dict[str, Any]:
    """Read what follows ``--kv-compress``: nothing, a preset, the path of a YAML file,
    ``key=value``, or several of these with commas between.

    Returns:
        The options given, unchecked except for their names. Those written out win over those of a
        preset or a file, whatever the order.

    Raises:
        ValueError: unknown key or preset, malformed text, or an unreadable file.
    """
    return over(*split_spec(spec))


def split_spec(spec: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the presets and files that a spec names, and those that it writes out.

    Raises:
        ValueError: as :func:`parse_spec`.
    """
    spec = spec.strip()
    if spec.startswith("{"):
        return {}, _mapping(spec.encode(), "--kv-compress")
    if _is_path(spec) and ("," not in spec or Path(spec).is_file()):
        return _read_file(Path(spec)), {}
    base: dict[str, Any] = {}
    pairs: list[str] = []
    for item in filter(None, (part.strip() for part in spec.split(","))):
        if _is_path(item):
            base = over(base, _read_file(Path(item)))
        elif "=" in item:
            pairs.append(item)
        else:
            base = over(base, _read_file(_preset(item)))
    options: dict[str, Any] = {}
    for name, text in _pairs(",".join(pairs), "--kv-compress"):
        if not is_key(name):
            raise ValueError(f"kv_compress: {unknown('key', name, OPTIONS)}; {known_keys()}")
        options[name] = parse_value(name, text)
    return base, options


def _is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def _preset(name: str) -> Path:
    path = presets.find(name)
    if path is None and is_key(name):
        raise ValueError(f"kv_compress: {name} has no value; give options as {name}=VALUE")
    if path is None:
        raise ValueError(
            f"kv_compress: {unknown('preset', name, presets.names())}; where it is neither "
            f"key=value nor a .yaml file, it must be one of {', '.join(presets.names())}; give "
            "options as --kv-compress ratio=8,window=16, and the model before --kv-compress"
        )
    return path


def _pairs(spec: str, flag: str) -> list[tuple[str, str]]:
    """The names and values of ``name=value,name=value``."""
    pairs: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise refusal(flag, spec, OPTIONS[flag].metadata["accepted"])
        if name in pairs:
            raise ValueError(f"kv_compress: {shown(name)} is given twice in {shown(spec)}")
        pairs[name] = text
    return list(pairs.items())


def _read_file(path: Path) -> dict[str, Any]:
    """The options of a YAML file, checked.

    Raises:
        ValueError: it cannot be read, or its options are bad.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")  # a FIFO would wait for a writer
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise ValueError(f"it has {status.st_size} bytes, more than {LARGEST_FILE}")
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), error) from error
    options = _mapping(text, str(path))
    check(options)
    return options


def _mapping(text: bytes, origin: str) -> dict[str, Any]:
    """The mapping that a YAML text holds."""
    try:
        options = read(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise _unreadable(origin, error) from error
    if not isinstance(options, dict):
        raise ValueError(
            f"kv_compress: {shown(origin)} must hold a mapping of options; {known_keys()}"
        )
    return {name: _word(name, value) for name, value in options.items()}


def _unreadable(origin: str, error: BaseException) -> ValueError:
    reason = shortened(" ".join(str(error).split()), LONGEST_REASON)
    return ValueError(f"kv_compress: cannot read {shown(origin)}: {reason}")
