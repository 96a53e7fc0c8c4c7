# SPDX-License-Identifier: Apache-2.0
"""Whatever is written into a configuration: it is valid, or a ValueError that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.spelling import check, parse_spec, parse_value
from tests.fuzzing import KEYS, SPECS, TEXT_VALUES, VALUES, fuzz, names_what_is_wrong

MAPPINGS = st.dictionaries(KEYS, VALUES, max_size=4)


def built(options: Any) -> KVCompressConfig | None:
    """The configuration, None where it is refused; checks either."""
    try:
        config = KVCompressConfig.from_dict(options)
    except ValueError as error:
        assert names_what_is_wrong(str(error)), error
        # The message grows with the keys that are named, not with what was given.
        assert len(str(error)) < 1000
        return None
    sent = json.loads(json.dumps(config.to_dict()))  # how it reaches the engine
    assert KVCompressConfig.from_dict(sent) == config
    assert str(config)
    return config


@fuzz
@given(MAPPINGS | VALUES)
@example({"ratio": 10**400})
@example({"allocator": ["global"]})
@example({"policy": "cake", "policy_options": {"gamma": 10**400}})
def test_mapping(options: Any) -> None:
    built(options)


@fuzz
@given(SPECS)
@example("ratio=" + "9" * 400)
@example("ratio=2026-13-45")
@example("a\0.yaml")
def test_command_line_text(spec: str) -> None:
    try:
        options = parse_spec(spec)
    except ValueError as error:
        assert names_what_is_wrong(str(error)), error
        return
    built(options)


@fuzz
@given(KEYS, TEXT_VALUES)
def test_one_flag_after_another(name: str, text: str) -> None:
    """What ``--kv-compress-NAME VALUE`` does, ``policy_options`` included."""
    name = name.split(".")[0]
    try:
        check({name: parse_value(name, text)})
    except ValueError as error:
        assert names_what_is_wrong(str(error)), error


@fuzz
@given(data=st.data())
@example(data=b"ratio: 0b_")
@example(data=b"[" * 5000)
@example(data=b"\xff")
def test_yaml_file(data: Any, tmp_path_factory: Any) -> None:
    if not isinstance(data, bytes):
        text = MAPPINGS.map(lambda options: yaml.safe_dump(options, allow_unicode=True))
        data = data.draw(text.map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary())
    path: Path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data)
    try:
        options = parse_spec(str(path))
    except ValueError as error:
        assert names_what_is_wrong(str(error)), error
        return
    assert built(options) is not None, "a file is checked when it is read"
