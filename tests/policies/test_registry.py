# SPDX-License-Identifier: Apache-2.0
"""Policies by name, their options, and those of other packages."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcompress_vllm import ops, policies
from kvcompress_vllm.config.auto import GENERAL
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.rules import integer, option
from kvcompress_vllm.policies import Defaults, Evidence, Policy
from kvcompress_vllm.policies.random_keys import RandomKeys
from tests.policies import prompts
from tests.policies.installed import install


@dataclass(frozen=True)
class FirstKeys(Policy):
    """A policy of another package."""

    skip: int = option(0, "keys to skip", *integer(0))

    defaults = Defaults(allocator="layer", window=3)

    def score(self, evidence: Evidence) -> Tensor:
        positions = torch.arange(evidence.num_keys, device=evidence.device).float()
        return (-(positions - self.skip).abs()).expand(evidence.layers * evidence.heads, -1)


NOT_A_POLICY = "a string"


class Unbuilt(Policy):
    """Leaves its method abstract."""


@dataclass(frozen=True)
class UnknownChannel(FirstKeys):
    channels = (ops.SUM, 99)


@dataclass(frozen=True)
class ManyChannels(FirstKeys):
    channels = (ops.SUM, ops.SUM_SQUARES, ops.ENTROPY, ops.LAST, ops.NORM)
    observes_all = True


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    here = "tests.policies.test_registry"
    install(
        monkeypatch,
        first=f"{here}:FirstKeys",
        random=f"{here}:FirstKeys",
        broken="no_such_package.module:Policy",
        missing=f"{here}:NoSuchClass",
        wrong=f"{here}:NOT_A_POLICY",
        leaving="tests.policies.leaving:Policy",
        unbuilt=f"{here}:Unbuilt",
        channels=f"{here}:UnknownChannel",
        many=f"{here}:ManyChannels",
    )


@pytest.mark.usefixtures("others")
def test_a_policy_of_another_package() -> None:
    assert "first" in policies.names()
    config = KVCompressConfig.from_dict({"policy": "first", "policy_options": {"skip": 30}})
    assert (config.allocator, config.window, config.pool) == ("layer", 3, 15)
    (kept,) = prompts.compress(config, [prompts.random_prompt(160, 1)])
    # Sinks, the neighbourhood of key 30, the last 16 keys.
    assert all({*range(4), *range(20, 40), *range(144, 160)} <= {*keys} for keys in kept)


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "'broken' cannot be loaded from no_such_package.module:Policy: ModuleNotFound"),
        ("missing", "'missing' cannot be loaded from .*:NoSuchClass: AttributeError"),
        ("wrong", "'wrong' from .*:NOT_A_POLICY is no subclass of"),
        ("unknown", "'unknown' is not accepted; .* kv_compress, .*, random, broken, channels, fir"),
        ("leaving", "'leaving' cannot be loaded from tests.policies.leaving:Policy: SystemExit: 3"),
        ("unbuilt", "'unbuilt' cannot be built: TypeError: .*abstract"),
        ("channels", r"'channels' has channels=\(0, 99\); they must be some of .*SUM, SUM_SQUARES"),
        ("many", "'many' judges by all queries with 4 channels of the attention; .* room for 3"),
    ],
)
def test_a_bad_policy_is_a_problem_only_where_it_is_named(name: str, message: str) -> None:
    KVCompressConfig.from_dict({"policy": "cake"})
    with pytest.raises(ValueError, match=f"kv_compress: policy={message}"):
        KVCompressConfig.from_dict({"policy": name})


@pytest.mark.usefixtures("others")
def test_our_names_are_ours() -> None:
    assert policies.find("random") is RandomKeys
    assert policies.names().count("random") == 1


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("cake", {"gama": 3}, "unknown policy_options.gama for policy='cake'; its options are gam"),
        ("knorm", {"x": 1}, "unknown policy_options.x for policy='knorm'; it has none"),
        ("cake", {"gamma": -1}, r"policy_options.gamma=-1 is not accepted; .* a number >= 0"),
        ("cake", {"tau1": 0}, r"policy_options.tau1=0 is not accepted; .* a number > 0"),
        ("cake", {"tau2": "x"}, r"policy_options.tau2='x' is not accepted"),
        ("cake", {"tau2": True}, r"policy_options.tau2=True is not accepted"),
        ("adakv", {"alpha": 1.5}, r"alpha=1.5 is not accepted; .* >= 0 and <= 1"),
        ("snapkv", {"pooling": "min"}, "pooling='min' is not accepted; .* one of max, average"),
        ("kv_compress", {"norm": "L3"}, "norm='L3' is not accepted; .* one of L2, L1"),
        ("random", {"seed": 1.0}, r"seed=1.0 is not accepted; .* an integer >= 0"),
        ("cake", {"pool": 3}, "unknown policy_options.pool"),
        ("cake", {4: 3}, "unknown policy_options.4"),
    ],
)
def test_bad_policy_options(policy: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCompressConfig.from_dict({"policy": policy, "policy_options": options})


@pytest.mark.parametrize("name", policies.BUILT_IN)
def test_every_policy_is_described(name: str) -> None:
    """Its paper is named, its options have help and rules, its preferences are valid."""
    policy = policies.find(name)
    module = __import__(policy.__module__, fromlist=["_"])
    assert "https://arxiv.org/abs/" in module.__doc__ or name == "random"
    for known in policies.options_of(name).values():
        assert known.metadata["help"] and known.metadata["accepts"](known.default)
    built = policies.create(name, 1, {})
    assert list(built.channels) == sorted(set(built.channels))
    assert all(0 <= channel < len(ops.CHANNELS) for channel in built.channels)
    assert {f.name for f in fields(Defaults)} == {*GENERAL}
    config = KVCompressConfig.from_dict({"policy": name})
    assert KVCompressConfig.from_dict(config.to_dict()) == config
    documentation = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    assert f"`{name}`" in documentation
    assert all(f"`{key}`" in documentation for key in policies.options_of(name))


def test_what_auto_stands_for() -> None:
    def values(**options):
        config = KVCompressConfig.from_dict(options)
        return config.allocator, config.window, config.pool, config.recent

    assert values() == values(policy="echo") == ("global", 8, 15, 16)
    assert values(mass=0.9) == values(policy="kv_compress") == ("global", 8, 127, 16)
    assert values(policy="kv_compress", window=64) == ("global", 64, 127, 16)
    assert values(policy="snapkv") == ("uniform", 32, 127, 32)
    assert values(policy="snapkv", window="auto", pool=3) == ("uniform", 32, 3, 32)
    assert values(policy="adakv", window=8) == ("layer", 8, 127, 16)
    assert values(policy="pyramidkv")[2] == 31  # late layers have room for few passages
    # A policy that keeps its window keeps it, whatever `recent` says.
    assert values(policy="cake", window=40, recent=2)[3] == 40
    assert values(policy="tova", allocator="global") == ("global", 1, 127, 16)


def test_what_is_installed_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = install(monkeypatch, first="tests.policies.test_registry:FirstKeys")
    config = KVCompressConfig.from_dict({"policy": "first", "allow_policies": True})
    for _ in range(3):
        assert policies.find("first") is FirstKeys and "first" in policies.names()
        config.with_policy("snapkv")
        with pytest.raises(ValueError, match="'nobody' is not accepted"):
            policies.find("nobody")
    assert asked == [policies.ENTRY_POINTS]
