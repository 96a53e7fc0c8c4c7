# SPDX-License-Identifier: Apache-2.0
"""The one configuration object, its defaults, and how users write it.

Three spellings reach the same object: ``key=value,key=value`` (command line), a YAML file, and a
dict (``additional_config["kv_compress"]``). Every bad key or value is a ``ValueError`` that names
the key, the value and what is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from kvcompress_vllm import policies
from kvcompress_vllm.config.auto import AUTO, GENERAL, or_auto, preferred
from kvcompress_vllm.config.combinations import (
    check_budgets,
    check_combinations,
    check_mass,
    named_policies,
)
from kvcompress_vllm.config.keys import POLICY_OPTIONS, nested
from kvcompress_vllm.config.rules import (
    WIDEST_POOL,
    choice,
    flag,
    integer,
    multiple,
    number,
    option,
    refusal,
    shown,
    unknown,
)
from kvcompress_vllm.ops.channels import ECHO
from kvcompress_vllm.scheduling.repeated import STRIDE
from kvcompress_vllm.scheduling.segments import DECODED, SEGMENT

if TYPE_CHECKING:
    from kvcompress_vllm.cache.page_format import PageFormat

DEFAULT_RATIO = 2.0
"""In fp8 every key stays. In 16 bits 93% of a real model's answers do, and more where the question
is not about what was generated; see docs/quality.md."""
SHARES = ("context", "auto", "off")
"""Which packed prefixes requests share; see ``scheduling/contexts.py``."""
EXACT = ("off", "kvzip")
"""How contexts are scored that policies judge by echo scores; see ``scheduling/replay.py``."""
ALLOCATORS = ("global", "layer", "uniform")
"""Which heads compete for pages; see ``compression/allocation.py``."""


@dataclass(frozen=True)
class KVCompressConfig:
    """What to keep, and how to choose it. Immutable; validated when built.

    Exactly one of ``ratio``, ``budget_tokens`` and ``mass`` is set; if none is given, ``ratio`` is
    2. What is given as ``auto`` is what the policy prefers; the built object holds the values.
    ``page_dtype`` may be None until the cache is known (``start/pages.py``), and is as good as
    ``auto`` then.

    Raises:
        ValueError: a value is not accepted, or several of those are given.
    """

    policy: str = option(
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
    ratio: float | None = option(
        None, "compressible blocks per kept block; 1 keeps everything", *number(1), optional=True
    )
    budget_tokens: int | None = option(
        None, "tokens kept per KV head on average, instead of a ratio", *integer(1), optional=True
    )
    mass: float | None = option(
        None,
        "share of the score mass that each compression keeps, in as few blocks as do, instead of a "
        "ratio",
        *number(0, 1, above=True),
        optional=True,
    )
    page_dtype: str | None = option(
        None,
        "what packed pages hold: keys as in the cache (auto), two in the bytes of one (fp8), or "
        "four (int4)",
        *choice(AUTO, "fp8", "int4"),
        optional=True,
    )
    allow_policies: bool | tuple[str, ...] = option(
        False,
        "requests may choose another policy: any, or one of these; true leaves out policies of "
        "other packages that fail a trial at startup",
        "true, false or names of policies such as snapkv+keydiff",
        lambda value: isinstance(value, bool) or (isinstance(value, tuple) and bool(value)),
    )
    window: int = option(
        AUTO, "how many of the last prompt queries are observed", *or_auto(integer(1, 512))
    )
    query_stride: int = option(
        AUTO,
        "policies that judge by all queries observe every so-many-th one; 1 is exact, 0 leaves "
        "them with the last window",
        *or_auto(integer(0, 4096)),
    )
    echo_distance: int = option(
        256,
        "positions between a token and its repetition, as policies imagine it that read echo "
        "scores",
        *integer(1, 1 << 20),
    )
    recent: int = option(AUTO, "last prompt tokens that are always kept", *or_auto(integer(0)))
    sinks: int = option(4, "first prompt tokens that are always kept", *integer(0))
    min_tokens_per_head: int = option(16, "tokens that every KV head keeps at least", *integer(0))
    min_prompt_tokens: int = option(128, "shorter requests are never compressed", *integer(1))
    min_budget_tokens: int = option(
        0,
        "tokens kept per KV head on average that neither ratio nor mass goes below; short requests "
        "keep more",
        *integer(0),
    )
    decode: bool = option(
        True, "compress what is generated, too, whenever it has outgrown the budget", *flag()
    )
    interval: int = option(
        8,
        "blocks by which a generation outgrows its budget before it is compressed again",
        *integer(1),
    )
    on_pressure: bool = option(
        True, "when the KV cache runs short, compress early rather than have vLLM preempt", *flag()
    )
    share: str = option(
        "context",
        "packed prefixes that requests share: those that requests name as their context, those too "
        "that are found to come again (auto), or none",
        *choice(*SHARES),
    )
    context_stride: int | None = option(
        None,
        "compress prompts and answers at every multiple of so many tokens, and nowhere else, and "
        "hold each of these for whoever comes with the same beginning: the next turn of a "
        "conversation",
        *multiple(STRIDE),
        optional=True,
    )
    exact: str = option(
        "off",
        "have contexts that requests share repeated by the model once, and keep what the "
        "repetition attends to (kvzip): dearer to compress, and better answers",
        *choice(*EXACT),
    )
    prefill_peak_tokens: int | None = option(
        None,
        "tokens of KV cache that a prompt may hold while it is read; a longer one is compressed "
        "in between; none: the whole prompt",
        *integer(256),
        optional=True,
    )
    min_ratio: float | None = option(
        None, "least ratio that a request may ask for", *number(1), optional=True
    )
    max_ratio: float | None = option(
        None,
        "highest ratio that a request may ask for, or be compressed to when the KV cache runs "
        "short; none: as asked for, and never beyond the budget",
        *number(1),
        optional=True,
    )
    pool: int = option(
        AUTO,
        "width of the pooling of scores over neighbouring tokens; 1 is off",
        *or_auto(integer(1, WIDEST_POOL, odd=True)),
    )
    allocator: str = option(
        AUTO,
        "which heads compete for the budget: all of the request, those of a layer, or none",
        *or_auto(choice(*ALLOCATORS)),
    )

    shares: str = option(
        AUTO,
        "how layers share the budget, and the heads of each: as another policy's paper has it, "
        "such as diverse with shares=cake",
        policies.shares.ACCEPTED,
        lambda value: isinstance(value, str),
    )

    def __post_init__(self) -> None:
        if self.policy == AUTO:
            object.__setattr__(self, "policy", policies.default(mass=self.mass is not None))
        policy = policies.find(self.policy)
        values = {**GENERAL, **preferred(policy, self.shares)}
        for name, value in values.items():
            if getattr(self, name) == AUTO:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "allow_policies", named_policies(self.allow_policies))
        defaulted = self.ratio is self.budget_tokens is self.mass is None
        if defaulted:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        for name in OPTIONS:
            check_value(name, getattr(self, name))
        check_budgets(self)
        if self.ratio is not None:
            object.__setattr__(self, "ratio", float(self.ratio))
        if policy.keeps_window:
            object.__setattr__(self, "recent", max(self.recent, self.window))
        object.__setattr__(self, POLICY_OPTIONS, dict(self.policy_options))
        self.create_policy()
        check_combinations(self, " (the default; give another ratio)" if defaulted else "")

    def allowed_policies(self) -> tuple[str, ...]:
        """What requests may name as their policy; the configured one, always."""
        if isinstance(self.allow_policies, bool):
            return policies.names() if self.allow_policies else (self.policy,)
        return tuple(dict.fromkeys((self.policy, *self.allow_policies)))

    @property
    def page_format(self) -> PageFormat:
        """Of packed pages."""
        from kvcompress_vllm.cache.page_format import PageFormat  # loads torch

        return PageFormat.of(self.page_dtype or AUTO)

    @property
    def stores_echo(self) -> bool:
        """Whether a policy that may be used reads echo scores: they are stored with the cache."""
        return any(map(self.reads_echo, self.allowed_policies()))

    @property
    def listens(self) -> bool:
        """Whether what requests decode gets echo scores, too."""
        return self.stores_echo and self.decode

    def ring(self, drafts: int = 0) -> int:
        """Queries that an observation slot holds: the window, or whole segments.

        Args:
            drafts: tokens that a step may compute beyond its next; they must not take the places of
                a segment that is still to be scored.
        """
        if not self.listens:
            return self.window
        # With a stride, answers are scored as prompts are.
        segment = DECODED if self.context_stride is None else SEGMENT
        return -(-max(self.window, segment + drafts) // segment) * segment

    def reads_echo(self, name: str | None = None) -> bool:
        """Whether a policy reads echo scores; None: the configured one. False of one that cannot
        be used."""
        try:
            return ECHO in self.with_policy(name).create_policy().channels
        except ValueError:
            return False

    def create_policy(self) -> policies.Policy:
        """The policy with its options."""
        return policies.create(self.policy, self.pool, self.policy_options, self.shares)

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
        window = policies.find(name).defaults.window or GENERAL["window"]
        own = {"policy", POLICY_OPTIONS, "shares", "exact", "context_stride", *GENERAL}
        options = {key: value for key, value in self.to_dict().items() if key not in own}
        options["window"] = min(window, self.window)
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
        for key in options:
            if not is_key(key):
                raise ValueError(f"kv_compress: {unknown('key', key, OPTIONS)}; {known_keys()}")
        config = cls(**nested(options))
        # Not in the constructor: a request that chooses such a policy has a budget of its own.
        if config.mass is not None:
            check_mass(config.policy, "mass", config.mass)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The set options, JSON-serialisable; ``from_dict`` of it is an equal object."""
        options = {key: value for key, value in asdict(self).items() if value not in (None, {})}
        if isinstance(self.allow_policies, tuple):
            options["allow_policies"] = list(self.allow_policies)
        return options

    def __str__(self) -> str:
        options = replace(self, page_dtype=self.page_dtype or AUTO).to_dict()
        if isinstance(self.allow_policies, tuple):
            options["allow_policies"] = "+".join(self.allow_policies)
        for name, value in options.pop(POLICY_OPTIONS, {}).items():
            options[f"{POLICY_OPTIONS}.{name}"] = value
        return " ".join(f"{key}={value}" for key, value in options.items())


OPTIONS = {entry.name: entry for entry in fields(KVCompressConfig)}


def check_value(name: str, value: Any) -> None:
    """Refuse what an option does not accept, whatever the others are.

    Raises:
        ValueError: naming option, value and what is accepted.
    """
    rule = OPTIONS[name].metadata
    if name == "allow_policies":
        value = named_policies(value)
    if not (value is None and rule["optional"]) and not rule["accepts"](value):
        raise refusal(name, value, rule["accepted"])


def is_key(key: Any) -> bool:
    """Whether it names an option, or as ``policy_options.NAME`` one of a policy."""
    return key in OPTIONS or (isinstance(key, str) and key.startswith(f"{POLICY_OPTIONS}."))


def known_keys() -> str:
    return f"the keys are {', '.join(OPTIONS)}"
