# SPDX-License-Identifier: Apache-2.0
"""The one configuration object, its defaults, and how users write it.

Three spellings reach the same object: ``key=value,key=value`` (command line), a YAML file, and a
dict (``additional_config["kv_compress"]``). Every bad key or value is a ``ValueError`` that names
the key, the value and what is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from kvcompress_vllm import policies
from kvcompress_vllm.compression.allocation import ALLOCATORS
from kvcompress_vllm.config.rules import Rule, choice, number, refusal, shown
from kvcompress_vllm.config.rules import integer as _integer

DEFAULT_RATIO = 4.0
BUDGETS = ("ratio", "budget_tokens", "mass")
"""How much is kept; exclude each other."""
AUTO = "auto"
GENERAL: dict[str, Any] = {
    "window": 8, "recent": 16, "pool": 15, "allocator": "global", "query_stride": 0,
}  # fmt: skip
"""What ``auto`` stands for where the policy names nothing else."""
POLICY_OPTIONS = "policy_options"


def _or_auto(rule: Rule) -> Rule:
    accepted, accepts = rule
    return f"{accepted}, or {AUTO}", lambda value: value == AUTO or accepts(value)


def _option(
    default: Any, help: str, accepted: str, accepts: Callable[[Any], bool], optional: bool = False
) -> Any:
    metadata = {"help": help, "accepted": accepted, "accepts": accepts, "optional": optional}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class KVCompressConfig:
    """What to keep, and how to choose it. Immutable; validated when built.

    Exactly one of ``ratio``, ``budget_tokens`` and ``mass`` is set; if none is given, ``ratio`` is
    4. What is given as ``auto`` is what the policy prefers; the built object holds the values.

    Raises:
        ValueError: a value is not accepted, or several of those are given.
    """

    policy: str = _option(
        AUTO,
        "how keys are scored",
        f"one of {', '.join(policies.BUILT_IN)}, a policy of another installed package, or {AUTO}",
        lambda value: isinstance(value, str),
    )
    policy_options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "options of the policy itself, see docs/policies.md",
            "accepted": "a mapping of option names to values, on the command line name=value,...",
            "accepts": lambda value: isinstance(value, Mapping),
            "optional": False,
        },
    )
    ratio: float | None = _option(
        None,
        "compressible blocks per kept block; 1 keeps everything",
        *number(1),
        optional=True,
    )
    budget_tokens: int | None = _option(
        None,
        "tokens kept per KV head on average, instead of a ratio",
        *_integer(1),
        optional=True,
    )
    mass: float | None = _option(
        None,
        "share of the score mass that each compression keeps, in as few blocks as do, instead of a "
        "ratio",
        *number(0, 1, above=True),
        optional=True,
    )
    allow_policies: bool = _option(
        False,
        "requests may choose another policy",
        "true or false",
        lambda value: isinstance(value, bool),
    )
    window: int = _option(
        AUTO, "how many of the last prompt queries are observed", *_or_auto(_integer(1, 512))
    )
    query_stride: int = _option(
        AUTO,
        "policies that judge by all queries observe every so-many-th one; 1 is exact, 0 leaves "
        "them with the last window",
        *_or_auto(_integer(0, 4096)),
    )
    recent: int = _option(AUTO, "last prompt tokens that are always kept", *_or_auto(_integer(0)))
    sinks: int = _option(4, "first prompt tokens that are always kept", *_integer(0))
    min_tokens_per_head: int = _option(16, "tokens that every KV head keeps at least", *_integer(0))
    min_prompt_tokens: int = _option(128, "shorter requests are never compressed", *_integer(1))
    min_budget_tokens: int = _option(
        0,
        "tokens kept per KV head on average that neither ratio nor mass goes below; short requests "
        "keep more",
        *_integer(0),
    )
    decode: bool = _option(
        True,
        "compress what is generated, too, whenever it has outgrown the budget",
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
    prefill_peak_tokens: int | None = _option(
        None,
        "tokens of KV cache that a prompt may hold while it is read; a longer one is compressed "
        "in between; none: the whole prompt",
        *_integer(256),
        optional=True,
    )
    min_ratio: float | None = _option(
        None,
        "least ratio that a request may ask for",
        *number(1),
        optional=True,
    )
    max_ratio: float | None = _option(
        None,
        "highest ratio that a request may ask for, or be compressed to when the KV cache runs "
        "short; none: as asked for, and never beyond the budget",
        *number(1),
        optional=True,
    )
    pool: int = _option(
        AUTO,
        "width of the pooling of scores over neighbouring tokens; 1 is off",
        *_or_auto(_integer(1, odd=True)),
    )
    allocator: str = _option(
        AUTO,
        "which heads compete for the budget: all of the request, those of a layer, or none",
        *_or_auto(choice(*ALLOCATORS)),
    )

    def __post_init__(self) -> None:
        if self.policy == AUTO:
            object.__setattr__(self, "policy", policies.default(mass=self.mass is not None))
        policy = policies.find(self.policy)
        for name, general in GENERAL.items():
            if getattr(self, name) == AUTO:
                preferred = getattr(policy.defaults, name)
                object.__setattr__(self, name, general if preferred is None else preferred)
        if self.ratio is self.budget_tokens is self.mass is None:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        for option in fields(self):
            value = getattr(self, option.name)
            if value is None and option.metadata["optional"]:
                continue
            if not option.metadata["accepts"](value):
                raise refusal(option.name, value, option.metadata["accepted"])
        given = [f"{name}={getattr(self, name)!r}" for name in BUDGETS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"kv_compress: {' and '.join(given)} exclude each other; give exactly one"
            )
        if self.ratio is not None:
            object.__setattr__(self, "ratio", float(self.ratio))
        limits = (self.min_ratio or 1.0, self.ratio, self.max_ratio)
        set_limits = [limit for limit in limits if limit is not None]
        if set_limits != sorted(set_limits):
            raise ValueError(
                f"kv_compress: min_ratio={self.min_ratio!r}, ratio={self.ratio!r} and "
                f"max_ratio={self.max_ratio!r} must not decrease"
            )
        if self.query_stride and not (policy.observes_all or self.allow_policies):
            raise ValueError(
                f"kv_compress: query_stride={self.query_stride!r} is for policies that judge by "
                f"all queries ({', '.join(policies.observing_all())}); {self.policy!r} does not"
            )
        if policy.keeps_window:
            object.__setattr__(self, "recent", max(self.recent, self.window))
        object.__setattr__(self, POLICY_OPTIONS, dict(self.policy_options))
        self.create_policy()

    def create_policy(self) -> policies.Policy:
        """The policy with its options."""
        return policies.create(self.policy, self.pool, self.policy_options)

    def with_policy(self, name: str | None) -> KVCompressConfig:
        """The same for a request that chose its policy: at what that one prefers, except that no
        more queries are observed than this configuration has room for. Never refused for another
        reason than the policy itself.

        Raises:
            ValueError: the policy is unknown.
        """
        if name in (None, self.policy):
            return self
        assert name is not None
        preferred = policies.find(name).defaults.window or GENERAL["window"]
        own = {"policy", POLICY_OPTIONS, *GENERAL}
        options = {key: value for key, value in self.to_dict().items() if key not in own}
        options["window"] = min(preferred, self.window)
        options["query_stride"] = self.query_stride if policies.find(name).observes_all else 0
        return KVCompressConfig(policy=name, **options)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> KVCompressConfig:
        """Build from user options.

        Raises:
            ValueError: an unknown key, or as the class says.
        """
        if not isinstance(options, Mapping):
            raise ValueError(
                f"kv_compress: {shown(options)} is not a mapping of options; {known_keys()}"
            )
        unknown = [key for key in options if not is_key(key)]
        if unknown:
            raise ValueError(f"kv_compress: unknown key {shown(unknown[0])}; {known_keys()}")
        config = cls(**_nested(options))
        # Not in the constructor: a request that chooses such a policy has a budget of its own.
        if config.mass is not None:
            check_mass(config.policy, "mass", config.mass)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The set options, JSON-serialisable; ``from_dict`` of it is an equal object."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}

    def __str__(self) -> str:
        options = self.to_dict()
        for name, value in options.pop(POLICY_OPTIONS, {}).items():
            options[f"{POLICY_OPTIONS}.{name}"] = value
        return " ".join(f"{key}={value}" for key, value in options.items())


OPTIONS = {option.name: option for option in fields(KVCompressConfig)}


def check_mass(policy: str, key: str, mass: float) -> None:
    """Refuse a mass of scores that do not add up to one.

    Args:
        key: under which the mass was given.

    Raises:
        ValueError: the policy's scores depend on the budget, which a mass is to decide.
    """
    if not policies.find(policy).additive:
        raise ValueError(
            f"kv_compress: {key}={mass!r} needs a policy whose scores do not depend on how much is "
            f"kept, such as {policies.default(mass=True)!r}; those of {policy!r} do"
        )


def default_text(name: str) -> str:
    """The default of an option, for help texts."""
    if name == "policy":
        return f"{policies.default(mass=False)}, with a mass {policies.default(mass=True)}"
    if name == "ratio":
        return f"{DEFAULT_RATIO:g} unless budget_tokens or mass is given"
    if name in GENERAL:
        return f"{AUTO}, which is {GENERAL[name]} unless the policy prefers another value"
    default = OPTIONS[name].default
    return "none" if default is None or default is MISSING else str(default)


def is_key(key: Any) -> bool:
    """Whether it names an option, or as ``policy_options.NAME`` one of a policy."""
    return key in OPTIONS or (isinstance(key, str) and key.startswith(f"{POLICY_OPTIONS}."))


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """``policy_options.NAME`` moved into the mapping ``policy_options``."""
    prefix = f"{POLICY_OPTIONS}."
    plain = {key: value for key, value in options.items() if not key.startswith(prefix)}
    dotted = {key[len(prefix) :]: options[key] for key in options if key.startswith(prefix)}
    if dotted and isinstance(plain.get(POLICY_OPTIONS, {}), Mapping):
        plain[POLICY_OPTIONS] = {**plain.get(POLICY_OPTIONS, {}), **dotted}
    return plain


def known_keys() -> str:
    return f"the keys are {', '.join(OPTIONS)}"
