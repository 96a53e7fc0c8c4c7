# SPDX-License-Identifier: Apache-2.0
"""Scores of one policy with shares of others: what the formulas keep, and what is refused."""

from __future__ import annotations

import pytest

from kvcompress_vllm.config.options import KVCompressConfig
from tests.policies import literal, prompts
from tests.policies.test_parity import assert_same_choice


@pytest.mark.parametrize(
    ("options", "layers", "heads"),
    [
        ({"policy": "diverse", "shares": "cake", "window": 24}, literal.cake_layers, None),
        ({"policy": "kv_compress", "shares": "pyramidkv"}, literal.pyramidkv_layers, None),
        ({"policy": "keydiff", "shares": "scissorhands"}, literal.scissorhands_layers, None),
        ({"policy": "snapkv", "shares": "adakv", "window": 16}, None, literal.adakv_heads),
        (
            {"policy": "snapkv", "shares": "cake+adakv", "window": 16},
            literal.cake_layers,
            literal.adakv_heads,
        ),
        ({"policy": "cake", "shares": "none", "pool": 5, "window": 16}, None, None),
    ],
    ids=lambda value: f"{value['policy']} {value['shares']}" if isinstance(value, dict) else "",
)
def test_shares_go_with_any_score(options, layers, heads) -> None:
    a = prompts.random_prompt(335, 2)
    config = KVCompressConfig.from_dict({**options, "ratio": 4})
    assert config.allocator in ("layer", "uniform")
    s = prompts.setting(config, a.length)
    scores = getattr(literal, config.policy)(a, s)
    wanted = literal.kept_keys(
        a,
        s,
        scores,
        config.allocator,
        layer_weights=layers and layers(a, s),
        head_weights=heads and heads(a, s),
    )
    (kept,) = prompts.compress(config, [a])
    assert_same_choice(kept, wanted, scores.flatten(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": "cak"}, "shares='cak' is not accepted; it must be auto .*, none, or of cake, "),
        ({"shares": "cake+pyramidkv"}, "shares='cake\\+pyramidkv' is not accepted; .* one for lay"),
        ({"shares": 3}, "shares=3 is not accepted"),
        ({"shares": "cake", "allocator": "global"}, "allocator='global': 'cake' needs layer or un"),
        ({"shares": "adakv", "allocator": "uniform"}, "allocator='uniform': 'adakv' needs layer"),
        ({"shares": "cake", "policy": "roco"}, "shares='cake' cannot .* with policy='roco'"),
        ({"shares": "cake", "window": 1}, "window=1: 'cake' compares at least 2 queries"),
        (
            {"shares": "none", "policy": "cake", "policy_options": {"tau1": 2}},
            "unknown policy_options.tau1 for policy='cake' with shares='none'; .* are gamma",
        ),
    ],
)
def test_what_cannot_be_combined(options, message) -> None:
    with pytest.raises(ValueError, match=f"kv_compress: .*{message}"):
        KVCompressConfig.from_dict(options)


def test_what_auto_stands_for_with_shares() -> None:
    def values(**options):
        config = KVCompressConfig.from_dict(options)
        return config.allocator, config.window

    assert values(shares="cake") == ("layer", 32)  # `global` shares nothing; a variance of 32
    assert values(policy="snapkv", shares="pyramidkv") == ("uniform", 32)
    assert values(policy="snapkv", shares="adakv") == ("layer", 32)
    assert values(policy="tova", shares="cake") == ("uniform", 32)
    assert values(policy="diverse", shares="none") == ("global", 8)
    options = {"policy": "diverse", "shares": "cake", "policy_options": {"share": 0.3, "tau1": 2}}
    built = KVCompressConfig.from_dict(options).create_policy()
    assert (built.scorer.share, built.layers.tau1, built.heads) == (0.3, 2, None)
    # Who chooses another policy gets it as it is.
    config = KVCompressConfig.from_dict({**options, "allow_policies": True})
    assert config.with_policy("adakv").shares == "auto"
