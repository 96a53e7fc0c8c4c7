# SPDX-License-Identifier: Apache-2.0
"""From the user's flags to ``VllmConfig.additional_config["kv_compress"]`` and back.

vLLM carries ``additional_config`` to the engine core and to every worker, so it is the one channel;
the key is present exactly when compression is on.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from kvcompress_vllm.config import presets
from kvcompress_vllm.config.options import OPTIONS, KVCompressConfig
from kvcompress_vllm.config.rules import closeness, shown
from kvcompress_vllm.config.spelling import (
    check,
    default_text,
    over,
    parse_spec,
    parse_value,
    split_spec,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "kv_compress"
GROUP = "KVCompress"
_PRESET = f"{KEY}_preset"
"""Where the options of presets and files wait; those written out wait under ``KEY``."""

_read: dict[str, tuple[Mapping[str, Any], KVCompressConfig]] = {}
"""The options that were read last, and the configuration that they make: every request asks, and
they are the same in all of a process."""


def resolved_config(vllm_config: VllmConfig) -> KVCompressConfig | None:
    """The configuration of this engine; None where compression is off."""
    additional = vllm_config.additional_config
    options = additional.get(KEY) if isinstance(additional, Mapping) else None
    if options is None:
        return None
    read = _read.get(KEY)
    if read is None or read[0] != options:
        read = _read[KEY] = deepcopy(options), KVCompressConfig.from_dict(options)
    return read[1]


def user_options(additional_config: Any) -> KVCompressConfig | None:
    """Read what a user put into ``additional_config``; ``False`` and ``None`` mean off.

    Raises:
        ValueError: unknown keys or bad values, or a key that was probably meant to be ours.
    """
    _check_spelling(additional_config)
    value = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if value is None or value is False:
        return None
    if isinstance(value, str):
        value = parse_spec(value)
    return KVCompressConfig.from_dict({} if value is True else value)


def _check_spelling(additional_config: Any) -> None:
    """Refuse keys that would silently leave compression off.

    Raises:
        ValueError: naming the key and ours.
    """
    for key in additional_config if isinstance(additional_config, Mapping) else ():
        letters = re.sub("[^a-z]", "", key.lower()) if isinstance(key, str) else ""
        meant = letters.startswith(("kvcompress", "kvcachecompress")) or (
            letters.startswith("k") and closeness(letters, "kvcompress") > 0.85
        )
        if key != KEY and meant:
            raise ValueError(
                f"kv_compress: the key {shown(key)} of additional_config is not accepted; it must "
                f'be {KEY!r}, which holds the options: {{"{KEY}": {{"ratio": 8}}}}'
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--kv-compress`` and one flag per option.

    The values wait in ``namespace.kv_compress`` until :func:`merge_arguments`, so that a later
    ``--additional-config`` cannot overwrite them.
    """
    group = parser.add_argument_group(
        GROUP, "KV cache compression (kvcompress_vllm). Any of these flags turns it on."
    )
    group.add_argument(
        "--kv-compress",
        action=_MergeSpec,
        dest=KEY,
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="SPEC",
        help="Compress the KV cache. SPEC is a preset, the path of a .yaml file, key=value, or "
        "several of these with commas between, as cake,ratio=8; without it the defaults below "
        f"apply. What is written out wins over presets and files. Presets: "
        f"{', '.join(presets.names())}.",
    )
    for name, option in OPTIONS.items():
        group.add_argument(
            f"--kv-compress-{name.replace('_', '-')}",
            action=_MergeOption,
            dest=KEY,
            option=name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{option.metadata['help'][0].upper()}{option.metadata['help'][1:]}: "
            f"{option.metadata['accepted']}. Default: {default_text(name)}.",
        )


def merge_arguments(args: argparse.Namespace) -> None:
    """Move the parsed flags into ``args.additional_config``, over what it holds already."""
    options, preset = getattr(args, KEY, None), getattr(args, _PRESET, None)
    if options is None and preset is None:
        return
    additional = dict(getattr(args, "additional_config", None) or {})
    given = additional.get(KEY)
    if isinstance(given, str):
        given = parse_spec(given)
    base = dict(given) if isinstance(given, Mapping) else {}
    # The ways to state the budget exclude each other: the flag wins over the dict.
    additional[KEY] = over(over(base, preset or {}), options or {})
    args.additional_config = additional


class _MergeSpec(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        # vLLM's YAML --config turns `kv-compress: true` into a bare flag, and a mapping into JSON.
        try:
            _merge(namespace, *split_spec(values or ""))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error


class _MergeOption(argparse.Action):
    def __init__(self, *args: Any, option: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.option = option

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            _merge(namespace, {}, {self.option: parse_value(self.option, values)})
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error


def _merge(
    namespace: argparse.Namespace, preset: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Add to what waits. Of two presets the later wins; two budgets written out exclude each
    other, since none of them is more particular."""
    preset = over(getattr(namespace, _PRESET, {}), preset)
    options = {**getattr(namespace, KEY, {}), **options}
    check(options)
    check(over(preset, options))
    setattr(namespace, _PRESET, preset)
    setattr(namespace, KEY, options)
