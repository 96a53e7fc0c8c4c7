# SPDX-License-Identifier: Apache-2.0
"""From the user's flags to ``VllmConfig.additional_config["kv_compress"]`` and back.

vLLM carries ``additional_config`` to the engine core and to every worker, so it is the one channel;
the key is present exactly when compression is on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvcompress_vllm.config.options import BUDGETS, OPTIONS, KVCompressConfig, default_text
from kvcompress_vllm.config.spelling import check, parse_spec, parse_value

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "kv_compress"
GROUP = "KVCompress"


def resolved_config(vllm_config: VllmConfig) -> KVCompressConfig | None:
    """The configuration of this engine; None where compression is off."""
    additional = vllm_config.additional_config
    options = additional.get(KEY) if isinstance(additional, Mapping) else None
    return None if options is None else KVCompressConfig.from_dict(options)


def user_options(additional_config: Any) -> KVCompressConfig | None:
    """Read what a user put into ``additional_config``; ``False`` and ``None`` mean off.

    Raises:
        ValueError: unknown keys or bad values.
    """
    value = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if value is None or value is False:
        return None
    if isinstance(value, str):
        value = parse_spec(value)
    return KVCompressConfig.from_dict({} if value is True else value)


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
        help="Compress the KV cache. SPEC is key=value,... or the path of a .yaml file; without "
        "it the defaults below apply.",
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
    options = getattr(args, KEY, None)
    if options is None:
        return
    additional = dict(getattr(args, "additional_config", None) or {})
    given = additional.get(KEY)
    if isinstance(given, str):
        given = parse_spec(given)
    base = dict(given) if isinstance(given, Mapping) else {}
    # The ways to state the budget exclude each other: the flag wins over the dict.
    if set(BUDGETS) & options.keys():
        for name in BUDGETS:
            base.pop(name, None)
    additional[KEY] = {**base, **options}
    args.additional_config = additional


class _MergeSpec(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        # vLLM's YAML --config turns `kv-compress: true` into a bare flag, but a mapping into JSON.
        try:
            options = parse_spec(values or "")
            _merge(namespace, options)
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
            _merge(namespace, {self.option: parse_value(self.option, values)})
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error


def _merge(namespace: argparse.Namespace, options: dict[str, Any]) -> None:
    merged = {**getattr(namespace, KEY, {}), **options}
    check(merged)
    setattr(namespace, KEY, merged)
