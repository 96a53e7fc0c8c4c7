# SPDX-License-Identifier: Apache-2.0
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvcompress_vllm import policies
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.config import presets
from kvcompress_vllm.config.options import OPTIONS, KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.config.spelling import check, parse_spec, parse_value

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_nothing_given_means_the_documented_defaults() -> None:
    config = KVCompressConfig.from_dict({})
    assert (config.policy, config.ratio, config.budget_tokens) == ("echo", 2.0, None)
    assert KVCompressConfig.from_dict(config.to_dict()) == config
    json.dumps(config.to_dict())  # additional_config is hashed as JSON


def test_what_pages_hold_may_be_undecided() -> None:
    undecided = KVCompressConfig()
    assert undecided.page_dtype is None and undecided.page_format is PageFormat.AUTO
    assert "page_dtype" not in undecided.to_dict() and "page_dtype=auto" in str(undecided)


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
        ({"pool": 4097}, "pool", "4097", "an odd integer >= 1 and <= 4095"),
        (
            {"policy": "diverse", "policy_options": {"key_pool": 2**31 - 1}},
            "policy_options.key_pool",
            "2147483647",
            "an odd integer >= 1 and <= 4095",
        ),
        ({"context_stride": 2**31}, "context_stride", "2147483648 (too large)", "a multiple"),
        ({"context_stride": 2**64}, "context_stride", f"{2**64} (too large)", "a multiple of 256"),
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
    check({"mass": 0.98, "min_ratio": 8})  # the default ratio of 2 is not meant


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


@pytest.mark.parametrize("spec", ["echo,policy=snapkv", "echo,snapkv", "roco,policy=kv_compress"])
def test_another_policy_comes_without_the_options_of_a_presets_own(spec):
    given = parse_spec(spec)
    config = KVCompressConfig.from_dict(given)
    assert config.policy == given["policy"] != spec.split(",")[0]
    assert "value_norms" not in config.policy_options


def test_options_of_a_presets_policy_stay_beside_its_name():
    assert parse_spec("echo,policy=echo,policy_options.weight=0.2")["policy_options"] == {
        "value_norms": True, "norm": "L1", "weight": 0.2,
    }  # fmt: skip


def test_options_of_a_policy_may_come_before_its_name() -> None:
    check({"query_stride": 4})
    check({"query_stride": 4, "policy": "roco"})
    check({"query_stride": 4, "policy": "kv_compress"})  # allow_policies may follow
    for name, value in [("query_stride", 5000), ("policy_options.gamma", "x")]:
        with pytest.raises(ValueError, match=f"{name}='?{value}'? is not accepted"):
            check({name: value})  # whatever follows
    with pytest.raises(
        ValueError, match=r"unknown policy_options key 'gama' \(did you mean 'gamma'"
    ):
        check({"policy_options": {"gama": 5}})
    check({"policy_options.gamma": 5})
    check({"policy_options": {"gamma": 5}, "policy": "cake"})
    with pytest.raises(ValueError, match=r"unknown policy_options\.gamma for policy='roco'"):
        check({"policy_options.gamma": 5, "policy": "roco"})
    with pytest.raises(ValueError, match=r"unknown policy_options\.gamma for policy='echo'"):
        KVCompressConfig.from_dict({"policy_options.gamma": 5})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("policy_options=3", "policy_options='3' is not accepted; it must be a mapping"),
        ("policy_options.gamma=", "policy_options.gamma='' is not accepted"),
        ("policy=cake,policy_options.=1", "unknown policy_options. for"),
        ("ratio", "ratio has no value; give options as ratio=VALUE"),
        ("cakes", "unknown preset 'cakes' \\(did you mean 'cake'\\?\\).*neither key=value"),
        ("./some/model", "the model before --kv-compress"),
        ("ratio=2,ratio=3", "given twice"),
        ("speed=9", "unknown key 'speed'"),
        ("ratio=", "ratio=''"),
        ("ratio=[2", "ratio='\\[2'"),
        ("ratio=1:30", "ratio='1:30' is not accepted"),  # 90 in YAML 1.1
        ("ratio=0x10", "ratio='0x10' is not accepted"),
        ("ratio=1_0", "ratio='1_0' is not accepted"),
        ("rati=8", "unknown key 'rati' \\(did you mean 'ratio'\\?\\)"),
        ("{ratio: 8, ratio: 2}", "'ratio' is given twice"),
        ("{" + "x" * 999 + ": 1}", "unknown key 'xxx"),
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


def test_off_is_a_word_where_an_option_takes_it(tmp_path: Path) -> None:
    """YAML reads it as false."""
    path = tmp_path / "off.yaml"
    path.write_text("share: off\ndecode: off\n")
    for spec in ("share=off,decode=off", str(path), '{"share": "off", "decode": false}'):
        config = KVCompressConfig.from_dict(parse_spec(spec))
        assert (config.share, config.decode) == ("off", False)
    with pytest.raises(ValueError, match="share=False is not accepted"):
        KVCompressConfig.from_dict({"share": False})


def test_numbers_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text("window: 010\nratio: 1e1\n")
    wanted = {"window": 10, "ratio": 10.0}
    assert parse_spec(str(path)) == parse_spec("window=010,ratio=1e1") == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: 2\nratio: 3\n", "'ratio' is given twice"),
        ("sinks: &a 4\nrecent: *a\n", "aliases are not accepted"),
        ("policy_options: !!python/name:os.system\n", "could not determine a constructor"),
        (f"policy: {'x' * 20_000}\n", "policy='xxx"),
        (f"ratio: {'[' * 60}{']' * 60}\n", "ratio=\\[\\["),
        ("#" * 70_000, "it has 70000 bytes, more than 65536"),
        (f"!!{'y' * 9999} ratio: 2\n", "cannot read"),
        ("? [1, 2]\n: 3\n", "cannot read|unknown key"),
    ],
    ids=["twice", "alias", "tag", "long word", "nested", "long file", "long tag", "list as key"],
)
def test_a_bad_file_is_refused_in_a_few_lines(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        parse_spec(str(path))
    assert len(str(error.value)) < 1000


def test_nested_aliases_are_refused_before_they_grow(tmp_path: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(["a0: &a0 [x]", *levels]))
    with pytest.raises(ValueError, match="aliases are not accepted") as error:
        parse_spec(str(path))
    assert len(str(error.value)) < 1000


def test_values_that_nest_make_no_long_message() -> None:
    value: Any = ["x"] * 9
    for _ in range(9):
        value = [value] * 9
    with pytest.raises(ValueError, match="ratio=") as error:
        KVCompressConfig.from_dict({"ratio": value})
    assert len(str(error.value)) < 300


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")  # reading it would wait for ever
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    for name in ("fifo", "folder", "device"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}.yaml': it is no regular file"):
            parse_spec(str(tmp_path / f"{name}.yaml"))


def test_presets_are_found_by_name() -> None:
    assert presets.names() == tuple(path.stem for path in CONFIGS)
    for path in CONFIGS:
        assert parse_spec(path.stem) == parse_spec(str(path))
    assert parse_spec("expected_attention")["policy"] == "expected_attention"


def test_options_written_out_win_over_a_preset_or_file(tmp_path: Path) -> None:
    preset = parse_spec("cake")
    path = tmp_path / "own.yaml"
    path.write_text("ratio: 6\npolicy_options:\n  gamma: 7\n")
    assert preset["budget_tokens"] == 1024
    without = {key: value for key, value in preset.items() if key != "budget_tokens"}
    # One budget takes the place of another, whichever comes first.
    for spec in ("cake,ratio=3", "ratio=3,cake", "cake, ratio-8, ratio=3"):
        assert parse_spec(spec) == {**without, "ratio": 3}
    mixed = parse_spec(f"cake,{path},policy_options.tau1=2")
    assert mixed["policy_options"] == {"gamma": 7, "tau1": 2, "tau2": 1}
    assert mixed["ratio"] == 6 and "budget_tokens" not in mixed
    with pytest.raises(ValueError, match="exclude each other"):
        KVCompressConfig.from_dict(parse_spec("cake,ratio=3,mass=0.5"))
    KVCompressConfig.from_dict(mixed)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    KVCompressConfig.from_dict(parse_spec(str(path)))


def test_the_preset_for_reasoning_drops_no_key_of_a_long_output() -> None:
    """Two keys have the bytes of one: half of the blocks hold all. A higher ratio drops some, but
    none of what is short."""
    for spec, long, short in (("reasoning", 128, 8), ("reasoning,ratio=4", 64, 8)):
        config = KVCompressConfig.from_dict(parse_spec(spec))
        assert resolve(config).packed_blocks(4096, 16) == long
        assert resolve(config).packed_blocks(256, 16) == short
        assert config.decode and config.policy == "echo"


def test_every_paper_has_a_preset() -> None:
    presets = {KVCompressConfig.from_dict(parse_spec(str(path))).policy for path in CONFIGS}
    # mean_attention is RoCo without its scope, and random has no paper.
    assert presets == set(policies.BUILT_IN) - {"mean_attention", "random"}


def test_another_policy_brings_its_own_preferences() -> None:
    config = KVCompressConfig(ratio=8, sinks=2, window=16, pool=3, allow_policies=True)
    assert config.with_policy(None) is config and config.with_policy("echo") is config
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
    with pytest.raises(ValueError, match=r"max_ratio=3 .* at least min_ratio=5"):
        check({"max_ratio": 3, "min_ratio": 5})
    # In the end the default ratio is 2.
    for options, message in [
        (
            {"max_ratio": 1.5},
            r"max_ratio=1\.5 .* at least ratio=2 \(the default; give another ratio\)",
        ),
        ({"min_ratio": 5}, r"min_ratio=5 .* at most ratio=2 \(the default; give another ratio\)"),
        ({"max_ratio": 2, "ratio": 8}, "max_ratio=2 .* at least ratio=8$"),
        ({"min_ratio": 9, "ratio": 8}, "min_ratio=9 .* at most ratio=8$"),
    ]:
        with pytest.raises(ValueError, match=message):
            KVCompressConfig.from_dict(options)
    with pytest.raises(ValueError, match=r"max_ratio=0.5 is not accepted"):
        check({"max_ratio": 0.5})


def test_flags_may_name_the_allowed_policies() -> None:
    options = parse_spec("ratio=4,allow_policies=snapkv+keydiff")
    check(options)  # as flags are, one by one
    assert KVCompressConfig.from_dict(options).allow_policies == ("snapkv", "keydiff")
    with pytest.raises(ValueError, match="allow_policies='nobody' is not accepted"):
        check(parse_spec("allow_policies=nobody"))
