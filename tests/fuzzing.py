# SPDX-License-Identifier: Apache-2.0
"""What the fuzz tests feed, and for how long.

``KVCOMPRESS_FUZZ=20000 pytest tests/test_fuzz_config.py`` tries so many examples per test instead
of 200, other ones each time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kvcompress_vllm.config.options import OPTIONS
from kvcompress_vllm.policies import BUILT_IN, options_of

EXAMPLES = int(os.environ.get("KVCOMPRESS_FUZZ", "200"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="KVCOMPRESS_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

POLICY_OPTIONS = sorted({name for policy in BUILT_IN for name in options_of(policy)})
NUMBERS = (
    st.integers(-2, 300)
    | st.integers()
    | st.floats()
    | st.sampled_from([10**20, -(10**20), 10**400, 2**31, 2**63, 1e300, 1.5, 8, 1])
)
WORDS = st.sampled_from(
    [*BUILT_IN, "global", "layer", "uniform", "auto", "true", "false", "L1", "max", "none", "null"]
)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=9) | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=4,
)
KEYS = (
    st.sampled_from([*OPTIONS, *(f"policy_options.{name}" for name in POLICY_OPTIONS)])
    | st.sampled_from(["policy_options.", "ration", "Ratio", "kv_compress"])
    | st.text(max_size=6)
)
TEXT_VALUES = st.one_of(
    st.text(max_size=12),
    WORDS,
    st.integers(-3, 400).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", " ", "1e-2", "0b_", "0x", "1_0", "2026-13-45", "1:99", "~", "*a", "&a", "!!python/x y",
         "[" * 3000, "{a: 1}", "- 1", ".inf", "-.inf", ".nan", "9" * 400, "9" * 5000, "\x07", "'"]
    ),
)  # fmt: skip
SPECS = st.lists(st.tuples(KEYS, TEXT_VALUES).map("=".join) | st.text(max_size=12), max_size=4).map(
    ",".join
)


def names_what_is_wrong(message: str) -> bool:
    """Whether an error message says whose it is, what is wrong, and what is accepted."""
    reasons = (
        "it must be", "the keys are", "The keys are", "exclude each other", "given twice",
        "has no value", "its options are", "it has none", "this server uses",
        "is for policies", "cannot read", "needs kv_compress", "needs a policy",
    )  # fmt: skip
    return "kv_compress" in message and any(reason in message for reason in reasons)
