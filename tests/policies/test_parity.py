# SPDX-License-Identifier: Apache-2.0
"""Every policy keeps the keys that a literal implementation of its paper keeps."""

from __future__ import annotations

import inspect

import pytest
import torch

from kvcompress_vllm import policies
from kvcompress_vllm.config.options import KVCompressConfig
from tests.policies import literal, prompts

torch.set_num_threads(1)

LAYER_WEIGHTS = {
    "cake": literal.cake_layers,
    "scissorhands": literal.scissorhands_layers,
    "pyramidkv": literal.pyramidkv_layers,
}
HEAD_WEIGHTS = {"adakv": literal.adakv_heads}
SAME_SCORE = {"pyramidkv": literal.snapkv, "adakv": literal.snapkv}

# Short windows so that slow code ends; one shorter than a block, and one of several blocks. The
# papers' pools: wider ones, the defaults, leave few different scores in prompts so short.
CASES = [
    {"policy": "kv_compress"},
    {"policy": "kv_compress", "policy_options": {"norm": "L1"}, "pool": 7, "window": 20},
    {"policy": "kv_compress", "policy_options": {"aggregation": "average"}, "window": 33},
    {"policy": "echo"},
    {"policy": "echo", "policy_options": {"value_norms": False, "weight": 0}},
    {"policy": "echo", "policy_options": {"norm": "L2", "weight": 1}, "window": 20, "pool": 5},
    {"policy": "diverse"},
    {"policy": "diverse", "policy_options": {"share": 0.8, "key_pool": 1}, "pool": 5, "window": 20},
    {"policy": "roco", "pool": 1, "window": 24},
    {"policy": "roco", "policy_options": {"recent_ratio": 0.4}, "window": 9, "pool": 3},
    {"policy": "cake", "pool": 5},
    {
        "policy": "cake",
        "pool": 5,
        "window": 17,
        "policy_options": {"gamma": 5, "tau1": 1.6, "tau2": 0.4},
    },
    {"policy": "cake", "pool": 5, "window": 6},
    {"policy": "scissorhands", "pool": 1, "window": 24},
    {"policy": "scissorhands", "pool": 1, "window": 12, "policy_options": {"later": 0.25}},
    {"policy": "snapkv", "pool": 7},
    {"policy": "snapkv", "window": 16, "pool": 5, "policy_options": {"pooling": "average"}},
    {"policy": "pyramidkv", "pool": 7, "window": 16},
    {"policy": "pyramidkv", "pool": 7, "window": 10, "policy_options": {"beta": 2}},
    {"policy": "adakv", "pool": 7},
    {"policy": "adakv", "pool": 7, "window": 8, "policy_options": {"alpha": 0.7}},
    {"policy": "h2o", "pool": 1, "window": 24},
    {"policy": "tova", "pool": 1},
    {"policy": "mean_attention", "window": 30, "pool": 3},
    {"policy": "keydiff", "pool": 1},
    {"policy": "knorm"},
    {"policy": "expected_attention", "pool": 1, "window": 24, "policy_options": {"epsilon": 0.001}},
    {"policy": "expected_attention", "pool": 1, "window": 300},
    {"policy": "mean_attention", "window": 300},
    {"policy": "random"},
    {"policy": "random", "policy_options": {"seed": 7}},
    # As wide as their defaults.
    *({"policy": name, "window": 24} for name in ("snapkv", "cake", "h2o", "scissorhands")),
    {"policy": "tova"},
    {"policy": "keydiff"},
    {"policy": "expected_attention", "window": 24},
]
CASES += [
    {"policy": name} for name in policies.BUILT_IN if name not in {c["policy"] for c in CASES}
]
# Not on the model: where a layer's keys depend on the token alone, all that repeat tie in their
# norm but for the rounding of RoPE, and pooling makes five ties of one.
RANDOM_CASES = [*CASES, {"policy": "knorm", "pool": 5}]
RANDOM = [(213, 1.7), (160, 4), (335, 3)]


def accepted(function, options):
    """The options that a literal function has parameters for."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def expected(config: KVCompressConfig, a: literal.Attention):
    """Kept keys, and the scores by which they were chosen."""
    s, options = prompts.setting(config, a.length), config.policy_options
    score = SAME_SCORE.get(config.policy) or getattr(literal, config.policy)
    scores = score(a, s, **accepted(score, options))
    weights = {}
    for name, known in (("layer_weights", LAYER_WEIGHTS), ("head_weights", HEAD_WEIGHTS)):
        function = known.get(config.policy)
        weights[name] = function and function(a, s, **accepted(function, options))
    return literal.kept_keys(a, s, scores, config.allocator, **weights), scores.flatten(0, 1)


def assert_same_choice(kept, wanted, scores) -> None:
    """The same keys, but for those whose scores fp32 cannot tell apart."""
    assert [len(keys) for keys in kept] == [len(keys) for keys in wanted]
    swapped = 0
    for mine, theirs, score in zip(kept, wanted, scores, strict=True):
        extra, missing = sorted({*mine} - {*theirs}), sorted({*theirs} - {*mine})
        swapped += len(extra)
        torch.testing.assert_close(
            score[extra].sort().values, score[missing].sort().values, rtol=1e-4, atol=1e-9
        )
    assert swapped <= 0.01 * sum(map(len, wanted))


def case_id(case) -> str:
    return " ".join(map(str, (case["policy"], *case.get("policy_options", {}).values())))


@pytest.mark.parametrize("allocator", ["global", "layer", "uniform"])
@pytest.mark.parametrize("case", RANDOM_CASES, ids=case_id)
def test_random_attention(case, allocator) -> None:
    for seed, (length, ratio) in enumerate(RANDOM):
        config = KVCompressConfig.from_dict({**case, "allocator": allocator, "ratio": ratio})
        a = prompts.random_prompt(length, seed)
        (kept,) = prompts.compress(config, [a])
        assert_same_choice(kept, *expected(config, a))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_real_attention(case) -> None:
    """The bundled model reading a task, with its preferred allocator; two prompts in one batch."""
    pytest.importorskip("transformers")
    config = KVCompressConfig.from_dict({**case, "ratio": 4})
    pair = [prompts.real_prompt("single", 400), prompts.real_prompt("kv40", 330)]
    for a, kept in zip(pair, prompts.compress(config, pair), strict=True):
        assert_same_choice(kept, *expected(config, a))


@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_the_same_twice(policy: str) -> None:
    config = prompts.config(policy, ratio=3, window=8)
    a, b = prompts.random_prompt(213, 0), prompts.random_prompt(160, 1)
    alone = prompts.compress(config, [a]) + prompts.compress(config, [b])
    assert prompts.compress(config, [a, b]) == alone


@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_shields_hold_for_all(policy: str) -> None:
    config = prompts.config(policy, ratio=5, window=8, sinks=7, recent=29)
    a = prompts.random_prompt(335, 2)
    (kept,) = prompts.compress(config, [a])
    floor = prompts.setting(config, a.length).floor * prompts.BLOCK
    for keys in kept:
        assert {*range(7), *range(335 - 29, 320)} <= {*keys}
        assert len(keys) >= floor
