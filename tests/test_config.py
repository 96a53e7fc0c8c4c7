# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from kvcompress_vllm import policies
from kvcompress_vllm.config.options import OPTIONS, KVCompressConfig
from kvcompress_vllm.config.spelling import check, parse_spec, parse_value

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_nothing_given_means_the_documented_defaults() -> None:
    config = KVCompressConfig.from_dict({})
    assert (config.policy, config.ratio, config.budget_tokens) == ("diverse", 4.0, None)
    assert KVCompressConfig.from_dict(config.to_dict()) == config
    json.dumps(config.to_dict())  # additional_config is hashed as JSON


def test_budget_tokens_replaces_the_default_ratio() -> None:
    config = KVCompressConfig.from_dict({"budget_tokens": 256})
    assert (config.ratio, config.budget_tokens) == (None, 256)


@pytest.mark.parametrize(
    ("options", "key", "value", "accepted"),
    [
        ({"ratio": 0.5}, "ratio", "0.5", "a number >= 1"),
        ({"ratio": True}, "ratio", "True", "a number >= 1"),
        ({"ratio": float("nan")}, "ratio", "nan", "a number >= 1"),
        ({"ratio": float("inf")}, "ratio", "inf", "a number >= 1"),
        ({"ratio": "8"}, "ratio", "'8'", "a number >= 1"),
        ({"ratio": 10**5000}, "ratio", "10**40 or more (too large)", "a number >= 1"),
        ({"interval": 2**31}, "interval", "2147483648 (too large)", "an integer >= 1"),
        ({"sinks": -(10**5000)}, "sinks", "less than -10**9", "an integer >= 0"),
        ({"budget_tokens": 0}, "budget_tokens", "0", "an integer >= 1"),
        ({"mass": 0}, "mass", "0", "a number > 0 and <= 1"),
        ({"mass": 98}, "mass", "98", "a number > 0 and <= 1"),
        ({"window": 0}, "window", "0", "an integer >= 1 and <= 512"),
        ({"window": 2.0}, "window", "2.0", "an integer >= 1 and <= 512"),
        ({"window": None}, "window", "None", "an integer >= 1 and <= 512"),
        ({"recent": -1}, "recent", "-1", "an integer >= 0"),
        ({"sinks": "x"}, "sinks", "'x'", "an integer >= 0"),
        ({"min_tokens_per_head": -5}, "min_tokens_per_head", "-5", "an integer >= 0"),
        ({"min_prompt_tokens": 0}, "min_prompt_tokens", "0", "an integer >= 1"),
        ({"min_budget_tokens": -1}, "min_budget_tokens", "-1", "an integer >= 0"),
        ({"pool": 4}, "pool", "4", "an odd integer >= 1"),
        ({"allocator": "pyramid"}, "allocator", "'pyramid'", "global, layer, uniform"),
        ({"policy": 3}, "policy", "3", "kv_compress"),
        ({"policy_options": [3]}, "policy_options", "[3]", "a mapping"),
        ({"window": "all"}, "window", "'all'", "or auto"),
        ({"policy": "best"}, "policy", "'best'", "kv_compress"),
    ],
)
def test_bad_value_names_key_value_and_what_is_accepted(
    options: dict, key: str, value: str, accepted: str
) -> None:
    with pytest.raises(ValueError) as error:
        KVCompressConfig.from_dict(options)
    for part in (key, value, accepted):
        assert part in str(error.value)


def test_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown key 'ration'") as error:
        KVCompressConfig.from_dict({"ration": 4})
    assert all(name in str(error.value) for name in OPTIONS)


def test_ratio_and_budget_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"ratio=2.*budget_tokens=64.*exactly one"):
        KVCompressConfig.from_dict({"ratio": 2, "budget_tokens": 64})


def test_mass_is_a_third_way_to_say_how_much() -> None:
    config = KVCompressConfig.from_dict({"mass": 0.98})
    assert (config.mass, config.ratio, config.budget_tokens) == (0.98, None, None)
    assert KVCompressConfig.from_dict(config.to_dict()) == config
    for other in ({"ratio": 2}, {"budget_tokens": 64}):
        with pytest.raises(ValueError, match=r"and mass=0\.98 exclude each other.*exactly one"):
            KVCompressConfig.from_dict({"mass": 0.98, **other})
    KVCompressConfig.from_dict({"mass": 0.98, "min_ratio": 2, "max_ratio": 8})
    check({"mass": 0.98, "min_ratio": 8})  # the default ratio of 4 is not meant


def test_spec_text() -> None:
    assert parse_spec("") == {}
    assert parse_spec(" ratio=8, policy=kv_compress ,window=16") == {
        "ratio": 8,
        "policy": "kv_compress",
        "window": 16,
    }


def test_policy_options_are_written_in_three_ways(tmp_path: Path) -> None:
    wanted = KVCompressConfig.from_dict(
        {"policy": "cake", "policy_options": {"gamma": 100, "tau1": 0.01}}
    )
    dotted = "policy=cake, policy_options.gamma=100, policy_options.tau1=1e-2"
    path = tmp_path / "cake.yaml"
    path.write_text("policy: cake\npolicy_options:\n  gamma: 100\n  tau1: 0.01\n")
    for spec in (dotted, str(path)):
        assert KVCompressConfig.from_dict(parse_spec(spec)) == wanted
    flag = parse_value("policy_options", "gamma=100, tau1=1e-2")
    assert flag == wanted.policy_options
    # What is given for one option later leaves the others alone.
    later = {"policy": "cake", "policy_options": flag, "policy_options.gamma": 5}
    assert KVCompressConfig.from_dict(later).policy_options == {"gamma": 5, "tau1": 0.01}
    assert "policy_options.gamma=100" in str(wanted)


def test_options_of_a_policy_may_come_before_its_name() -> None:
    check({"query_stride": 4})
    check({"query_stride": 4, "policy": "roco"})
    check({"query_stride": 4, "policy": "kv_compress"})  # allow_policies may follow
    check({"policy_options.gamma": 5})
    check({"policy_options": {"gamma": 5}, "policy": "cake"})
    with pytest.raises(ValueError, match=r"unknown policy_options\.gamma for policy='roco'"):
        check({"policy_options.gamma": 5, "policy": "roco"})
    with pytest.raises(ValueError, match=r"unknown policy_options\.gamma for policy='diverse'"):
        KVCompressConfig.from_dict({"policy_options.gamma": 5})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("policy_options=3", "policy_options='3' is not accepted; it must be a mapping"),
        ("policy_options.gamma=", "policy_options.gamma='' is not accepted"),
        ("policy=cake,policy_options.=1", "unknown policy_options. for"),
        ("ratio", "neither key=value"),
        ("./some/model", "the model before --kv-compress"),
        ("ratio=2,ratio=3", "given twice"),
        ("speed=9", "unknown key 'speed'"),
        ("ratio=", "ratio=''"),
        ("ratio=[2", "ratio='\\[2'"),
        ("no/such.yaml", "cannot read"),
    ],
)
def test_bad_spec_text(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCompressConfig.from_dict(parse_spec(spec))


def test_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("ratio: 2  # comment\nsinks: 8\n")
    assert parse_spec(str(path)) == {"ratio": 2, "sinks": 8}
    for text, message in [("- 1\n", "mapping"), ("a: [", "cannot read"), ("speed: 1\n", "unknown")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse_spec(str(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    KVCompressConfig.from_dict(parse_spec(str(path)))


def test_every_paper_has_a_preset() -> None:
    presets = {KVCompressConfig.from_dict(parse_spec(str(path))).policy for path in CONFIGS}
    # mean_attention is RoCo without its scope, and random has no paper.
    assert presets == set(policies.BUILT_IN) - {"mean_attention", "random"}


def test_another_policy_brings_its_own_preferences() -> None:
    config = KVCompressConfig(ratio=8, sinks=2, window=16, pool=3, allow_policies=True)
    assert config.with_policy(None) is config and config.with_policy("diverse") is config
    other = config.with_policy("snapkv")
    assert (other.policy, other.allocator, other.pool) == ("snapkv", "uniform", 127)
    assert other.window == 16, "no more than the ring holds, though snapkv prefers 32"
    assert (other.ratio, other.sinks, other.recent) == (8.0, 2, 16)
    assert config.with_policy("tova").window == 1
    with pytest.raises(ValueError, match="policy='nap' is not accepted"):
        config.with_policy("nap")


def test_a_mass_is_of_scores_that_add_up() -> None:
    assert KVCompressConfig.from_dict({"mass": 0.98}).policy == "kv_compress"
    assert KVCompressConfig.from_dict({"mass": 0.98, "policy": "cake"}).policy == "cake"
    for policy in ("diverse", "roco"):
        with pytest.raises(ValueError, match=f"mass=0.98 needs a policy .*those of '{policy}' do"):
            KVCompressConfig.from_dict({"mass": 0.98, "policy": policy})


def test_limits_may_be_given_before_the_ratio() -> None:
    check({"max_ratio": 3})
    check({"max_ratio": 3, "ratio": 2})
    with pytest.raises(ValueError, match="must not decrease"):
        check({"max_ratio": 3, "min_ratio": 5})
    with pytest.raises(ValueError, match="must not decrease"):
        KVCompressConfig(max_ratio=3)  # in the end the default ratio is 4
    with pytest.raises(ValueError, match=r"max_ratio=0.5 is not accepted"):
        check({"max_ratio": 0.5})
