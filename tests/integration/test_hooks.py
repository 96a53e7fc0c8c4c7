# SPDX-License-Identifier: Apache-2.0
"""The contract with vLLM: every private name we use exists, and only those are patched."""

import re
from pathlib import Path

import pytest

from kvcompress_vllm.integration.compat import hooks
from kvcompress_vllm.integration.compat.hooks import HOOKS, Hook


def test_every_hook_is_intact() -> None:
    assert hooks.check() == []


@pytest.mark.parametrize(
    ("path", "parameters", "message"),
    [
        ("vllm.engine.arg_utils:EngineArgs.gone", (), "gone"),
        ("vllm.no_such_module:X", (), "no_such_module"),
        ("vllm.v1.core.block_pool:BlockPool.get_new_blocks", ("self", "count"), r"need .*count"),
        ("vllm.v1.core.block_pool:BlockPool.get_new_blocks", ("num_blocks", "self"), "order"),
    ],
)
def test_a_changed_hook_is_named(path: str, parameters: tuple[str, ...], message: str) -> None:
    problem = hooks._problem(Hook(path, parameters, "the reason", "never"))
    assert problem is not None and re.search(message, problem) and "the reason" in problem


def test_assignments_to_vllm_are_all_registered() -> None:
    """Each patch in the source (an attribute of a vLLM class or object set) has its hook."""
    folder = Path(hooks.__file__).parents[1]
    assigned = {
        attribute or annotated
        for path in folder.rglob("*.py")
        for attribute, annotated in re.findall(
            r"(?:engine_args|kv_cache_manager|model_state|InputProcessor|StatLoggerManager|plugins"
            r"|cpu_runner|RequestState|chat|completion)"
            r"\.(\w+) = |(\w+)\.__annotations__\[",
            path.read_text(),
        )
    }
    fields = {"additional_config", "block_size"}  # plain fields of the EngineArgs instance
    assert assigned - fields == {re.split("[.:]", h.path)[-1] for h in HOOKS if h.patched}
