# SPDX-License-Identifier: Apache-2.0
"""The one configuration object, its defaults, and how users write it.

Three spellings reach the same object: ``key=value,key=value`` (command line), a YAML file, and a
dict (``additional_config["kv_compress"]``). Every bad key or value is a ``ValueError`` that names
the key, the value and what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from kvcompress_vllm import policies

ALLOCATORS = ("global", "layer", "uniform")
DEFAULT_RATIO = 4.0


def _integer(
    low: int, high: int | None = None, odd: bool = False
) -> tuple[str, Callable[[Any], bool]]:
    accepted = f"an {'odd ' if odd else ''}integer >= {low}" + (
        "" if high is None else f" and <= {high}"
    )

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value >= low
            and (high is None or value <= high)
            and (not odd or value % 2 == 1)
        )

    return accepted, accepts


def _ratio(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= 1
    )


def _option(
    default: Any, help: str, accepted: str, accepts: Callable[[Any], bool], optional: bool = False
) -> Any:
    metadata = {"help": help, "accepted": accepted, "accepts": accepts, "optional": optional}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class KVCompressConfig:
    """What to keep, and how to choose it. Immutable; validated when built.

    Exactly one of ``ratio`` and ``budget_tokens`` is set; if neither is given, ``ratio`` is 4.

    Raises:
        ValueError: a value is not accepted, or both ``ratio`` and ``budget_tokens`` are given.
    """

    policy: str = _option(
        "kv_compress",
        "how keys are scored",
        f"one of {', '.join(policies.names())}",
        lambda value: value in policies.names(),
    )
    ratio: float | None = _option(
        None,
        "compressible blocks per kept block; 1 keeps everything",
        "a number >= 1",
        _ratio,
        optional=True,
    )
    budget_tokens: int | None = _option(
        None,
        "tokens kept per KV head on average, instead of a ratio",
        *_integer(1),
        optional=True,
    )
    window: int = _option(8, "how many of the last prompt queries are observed", *_integer(1, 512))
    recent: int = _option(16, "last prompt tokens that are always kept", *_integer(0))
    sinks: int = _option(4, "first prompt tokens that are always kept", *_integer(0))
    min_tokens_per_head: int = _option(16, "tokens that every KV head keeps at least", *_integer(0))
    min_prompt_tokens: int = _option(128, "shorter requests are never compressed", *_integer(1))
    decode: bool = _option(
        True,
        "compress what is generated, too",
        "true or false",
        lambda value: isinstance(value, bool),
    )
    interval: int = _option(
        8,
        "blocks by which a generation outgrows its budget before it is compressed again",
        *_integer(1),
    )
    on_pressure: bool = _option(
        True,
        "when the KV cache runs short, compress early rather than have vLLM preempt",
        "true or false",
        lambda value: isinstance(value, bool),
    )
    min_ratio: float | None = _option(
        None,
        "least ratio that a request may ask for",
        "a number >= 1",
        _ratio,
        optional=True,
    )
    max_ratio: float | None = _option(
        None,
        "highest ratio that a request may ask for, or be compressed to when the KV cache runs "
        "short; none: as asked for, and never beyond the budget",
        "a number >= 1",
        _ratio,
        optional=True,
    )
    pool: int = _option(
        15,
        "width of the max-pooling of scores over neighbouring tokens; 1 is off",
        *_integer(1, odd=True),
    )
    allocator: str = _option(
        "global",
        "which heads compete for the budget: all of the request, those of a layer, or none",
        f"one of {', '.join(ALLOCATORS)}",
        lambda value: value in ALLOCATORS,
    )

    def __post_init__(self) -> None:
        if self.ratio is None and self.budget_tokens is None:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        for option in fields(self):
            value = getattr(self, option.name)
            if value is None and option.metadata["optional"]:
                continue
            if not option.metadata["accepts"](value):
                raise ValueError(
                    f"kv_compress: {option.name}={value!r} is not accepted; "
                    f"it must be {option.metadata['accepted']}"
                )
        if self.ratio is not None and self.budget_tokens is not None:
            raise ValueError(
                f"kv_compress: ratio={self.ratio!r} and budget_tokens={self.budget_tokens!r} "
                "exclude each other; give exactly one"
            )
        if self.ratio is not None:
            object.__setattr__(self, "ratio", float(self.ratio))
        limits = (self.min_ratio or 1.0, self.ratio, self.max_ratio)
        given = [limit for limit in limits if limit is not None]
        if given != sorted(given):
            raise ValueError(
                f"kv_compress: min_ratio={self.min_ratio!r}, ratio={self.ratio!r} and "
                f"max_ratio={self.max_ratio!r} must not decrease"
            )

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> KVCompressConfig:
        """Build from user options.

        Raises:
            ValueError: an unknown key, or as the class says.
        """
        if not isinstance(options, Mapping):
            raise ValueError(f"kv_compress: {options!r} is not a mapping of options; {_known()}")
        unknown = [key for key in options if key not in OPTIONS]
        if unknown:
            raise ValueError(f"kv_compress: unknown key {unknown[0]!r}; {_known()}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The set options, JSON-serialisable; ``from_dict`` of it is an equal object."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.to_dict().items())


OPTIONS = {option.name: option for option in fields(KVCompressConfig)}


def default_text(name: str) -> str:
    """The default of an option, for help texts."""
    if name == "ratio":
        return f"{DEFAULT_RATIO:g} unless budget_tokens is given"
    default = OPTIONS[name].default
    return "none" if default is None or default is MISSING else str(default)


def parse_value(name: str, text: str) -> Any:
    """Read one option value from the command line; types as in YAML.

    Raises:
        ValueError: the text is not a scalar.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if value is None or isinstance(value, list | dict):
        raise ValueError(
            f"kv_compress: {name}={text!r} is not accepted; "
            f"it must be {OPTIONS[name].metadata['accepted']}"
        )
    return value


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
    for item in filter(None, (part.strip() for part in spec.split(","))):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(
                f"kv_compress: {item!r} is neither key=value nor a .yaml file; give options as "
                "--kv-compress ratio=8,window=16, and the model before --kv-compress"
            )
        if name not in OPTIONS:
            raise ValueError(f"kv_compress: unknown key {name!r}; {_known()}")
        if name in options:
            raise ValueError(f"kv_compress: {name} is given twice in {spec!r}")
        options[name] = parse_value(name, text)
    return options


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"kv_compress: cannot read {str(path)!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"kv_compress: {str(path)!r} must hold a mapping of options; {_known()}")
    KVCompressConfig.from_dict(options)
    return options


def _known() -> str:
    return f"the keys are {', '.join(OPTIONS)}"
