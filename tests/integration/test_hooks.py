# SPDX-License-Identifier: Apache-2.0
"""The contract with vLLM: of the installed release, and of all others as they were recorded."""

from __future__ import annotations

import importlib
import re
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvcompress_vllm.integration.compat import contract, ours, releases, source
from kvcompress_vllm.integration.compat.contract import Recorded, not_taken
from kvcompress_vllm.integration.compat.hooks import HOOKS, Hook
from kvcompress_vllm.integration.compat.tested import TESTED
from kvcompress_vllm.integration.frontend import usage

RECORDED = Recorded.load()
INSTALLED = version("vllm").partition("+")[0]
NEWEST = RECORDED.releases[-1]


@pytest.fixture(scope="module")
def vllm() -> source.Source:
    found = source.installed(INSTALLED)
    assert found is not None
    return found


def test_the_installed_release_keeps_the_contract(vllm: source.Source) -> None:
    assert contract.check(vllm.answer, INSTALLED) == []
    assert contract.unimportable(INSTALLED) == []


@pytest.mark.parametrize("release", RECORDED.releases)
def test_every_release_keeps_the_contract(release: str) -> None:
    assert contract.check(lambda question: RECORDED.answer(release, question), release) == []


def test_records_are_complete(vllm: source.Source) -> None:
    """Whatever ``integration/`` relies on by now. Else: ``python -m tests.releases.record``."""
    if INSTALLED not in RECORDED.releases:
        pytest.skip(f"nothing is recorded of vLLM {INSTALLED}")
    different = [
        question
        for question in sorted(contract.questions())
        if vllm.answer(question) != RECORDED.answer(INSTALLED, question)
    ]
    assert different == []


def test_what_is_tested_is_what_is_recorded() -> None:
    assert list(TESTED) == RECORDED.releases


def changed(changes: dict[str, str | None], release: str = NEWEST) -> list[str]:
    """What the contract says of a later release that differs so from a recorded one."""

    def answer(question: str) -> str | None:
        return changes[question] if question in changes else RECORDED.answer(release, question)

    return contract.check(answer, "0.99.0")


_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # vLLM passes more than an override takes (0.30 and 0.31 did so).
        (
            {f"{_MANAGER}.pop_blocks_for_free": "(self, request_id, *, lazily)"},
            r"KVCompressManager.pop_blocks_for_free .*'lazily' cannot be named",
        ),
        (
            {"vllm.v1.attention.backend:AttentionBackend.get_name": "(kv_cache_spec=0)"},
            r"KVCompressBackend.get_name .*'kv_cache_spec' is one too many",
        ),
        # ... than a function takes that stands in the place of vLLM's (0.33 did so).
        (
            {"vllm.engine.arg_utils:EngineArgs.add_cli_args": "(parser, group=0)"},
            r"add_cli_args passes .*'group' is one too many",
        ),
        # ... also of two in one assignment, in the place of those of two classes.
        (
            {"vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": "(self, step)"},
            r"execute_model takes \['self', 'step'\], we need .*replaced on the runner's instance",
        ),
        (
            {"vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": "(self, a, b, *, c)"},
            r"sample_tokens passes .*'a' arrives as 'grammar_output'",
        ),
        # An attribute is gone that a method of ours reads (0.31: skipped_waiting).
        ({f"{_SCHEDULER}.running": None}, r"Scheduler.running: not there; engine/scheduler.py"),
        # ... of an object whose class nothing in our source tells.
        ({"*:num_gpu_blocks": None}, "num_gpu_blocks: not there"),
        # An override that overrides nothing any more, and a switch that switches nothing.
        (
            {f"{_SCHEDULER}._mamba_block_aligned_split": None},
            r"_mamba_block_aligned_split: not there",
        ),
        (
            {f"{_SCHEDULER}.need_mamba_block_aligned_split": None},
            r"need_mamba_block_aligned_split: not there",
        ),
        # vLLM leaves a method to its subclasses (0.33 did so): ours cannot be made any more.
        (
            {"vllm.v1.outputs:AsyncModelRunnerOutput.__abstractmethods__": "get_output wait"},
            r"AsyncModelRunnerOutput.wait is abstract; _WithReports does not define it",
        ),
        # ... also where a class of ours stands between.
        (
            {"vllm.v1.attention.backend:AttentionBackend.__abstractmethods__": "get_name kind"},
            r"AttentionBackend.kind is abstract; KVCompressCudaBackend does not define it",
        ),
        # An import.
        ({"vllm.v1.request:RequestStatus": None}, r"vllm.v1.request:RequestStatus: not there"),
        # What a hook needs, and its order.
        (
            {"vllm.v1.core.block_pool:BlockPool.get_new_blocks": "(self, count)"},
            r"get_new_blocks takes \['self', 'count'\], we need .*allocates packed blocks",
        ),
        (
            {"vllm.v1.core.block_pool:BlockPool.get_new_blocks": "(num_blocks, self)"},
            "in this order",
        ),
    ],
)
def test_a_change_is_named(changes: dict[str, str | None], message: str) -> None:
    problems = changed(changes)
    assert len(problems) >= 1
    assert any(re.search(message, problem) for problem in problems), problems


def test_without_a_change_nothing_is_named() -> None:
    assert changed({}) == []


def test_since_and_until() -> None:
    hook = Hook("vllm.x:Y", (), "why", "never", since="0.29", until="0.31")
    here = [r for r in RECORDED.releases if contract.in_force(hook, r)]
    assert here == ["0.29.0", "0.30.0"]
    # What went with 0.29 is no problem there; before, it would be one.
    gone = "vllm.v1.attention.backend:AttentionBackend.get_kv_cache_shape"
    assert RECORDED.answer("0.28.0", gone) and RECORDED.answer("0.29.0", gone) is None
    problems = contract.check(
        lambda question: None if question == gone else RECORDED.answer("0.28.0", question), "0.28.0"
    )
    assert problems and all("get_kv_cache_shape: not there" in p for p in problems)


@pytest.mark.parametrize(
    ("stock", "own", "expected"),
    [
        ("(self, a, b=0)", "(self, a, b=0)", []),
        ("(self, a, b=0)", "(self, a, *args, **kwargs)", []),
        (
            "(self, a, b=0, *, c)",
            "(self, a, *args)",
            ["'b' cannot be named", "'c' cannot be named"],
        ),
        ("(self, a)", "(self)", ["'a' is one too many"]),
        ("(self, a)", "(self, b)", ["'a' arrives as 'b'", "'b' is not passed"]),
        (
            "(self, *args, **kwargs)",
            "(self)",
            ["*args is one too many", "**kwargs is one too many"],
        ),
        ("(cls, a, /)", "(self, b=0)", []),
        ("(self)", "(self, a)", ["'a' is not passed"]),
    ],
)
def test_what_a_signature_does_not_take(stock: str, own: str, expected: list[str]) -> None:
    assert list(not_taken(stock, own)) == expected


def test_patches_are_all_registered() -> None:
    """Each function that the source puts in the place of one of vLLM's has its hook."""
    # Of our block manager, of our contexts, of our other groups, of a response under way; Python's.
    own = {"on_release", "on_drop", "on_packed", "append_output", "vars"}
    found = {patch.name for patch in ours.reliance().patches} - own
    annotated = {
        name
        for path in ours.INTEGRATION.rglob("*.py")
        for name in re.findall(r"(\w+)\.__annotations__\[", path.read_text())
    }
    found |= annotated | {method for _, method, _ in usage._WRAPPED}
    found |= {name for _, name in releases.INITIALISERS}
    assert found == {re.split("[.:]", hook.path)[-1] for hook in HOOKS if hook.patched}


def test_our_overrides_are_found() -> None:
    """A few of every kind, so that an empty search does not pass for a kept contract."""
    found = {override.question for override in ours.reliance().overrides}
    assert {
        f"{_SCHEDULER}.schedule",
        f"{_MANAGER}.pop_blocks_for_free",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler.update_from_output",
        "vllm.v1.worker.cpu_worker:CPUWorker.initialize_from_config",
        "vllm.platforms.cpu:CpuPlatform.import_kernels",
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
    } <= found
    reads = ours.reliance().reads
    assert {f"{_SCHEDULER}.deferred_frees", f"{_SCHEDULER}.requests"} <= reads.keys()


def test_what_vllm_leaves_to_subclasses_is_recorded() -> None:
    """As Python says of the installed release; 0.33 left one more to a class of ours."""
    for subclass in ours.reliance().subclasses:
        module, _, name = subclass.question.partition(":")
        recorded = RECORDED.answer(INSTALLED, subclass.question)
        if recorded is None or ("ray" in module and find_spec("ray") is None):
            continue  # not of this release, or it does not load
        cls = getattr(importlib.import_module(module), name.partition(".")[0])
        expected = sorted(getattr(cls, "__abstractmethods__", ()))
        assert recorded.split() == expected, subclass
    output = "vllm.v1.outputs:AsyncModelRunnerOutput.__abstractmethods__"
    assert RECORDED.answer("0.32.0", output) == "get_output"
    assert RECORDED.answer("0.33.0", output) == "get_kv_connector_output get_output"


WHEEL = {
    "vllm/__init__.py": 'ATTRS = {"LLM": ".entrypoints.llm:LLM"}\n',
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/llm.py": (
        "from ..base import Base\nclass LLM(Base):\n    def run(self, a): 0\n"
    ),
    "vllm/base.py": (
        "from dataclasses import dataclass\n"
        "class Base:\n"
        "    kind: int = 0\n"
        "    def __init__(self, model, *, dtype='auto', **kwargs): self.model = model\n"
        "    @property\n"
        "    def name(self): return 0\n"
        "    @property\n"
        "    @abstractmethod\n"
        "    def run(self): 0\n"
        "    @abc.abstractmethod\n"
        "    def stop(self): 0\n"
        "@dataclass\n"
        "class Fields:\n"
        "    a: int\n"
        "    b: str = ''\n"
        "if True:\n"
        "    def late(x, /, y, *rest): 0\n"
    ),
    "vllm/v1/__init__.py": "",
    "vllm/v1/deep.py": "class C:\n    def f(self):\n        self.only_here = 1\n",
    "vllm/models/__init__.py": "",
    "vllm/models/m.py": "class M:\n    not_of_the_engine = 1\n",
}


def test_questions_to_a_wheel(tmp_path: Path) -> None:
    path = tmp_path / "vllm-0.34.0-cp38-abi3-linux.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in WHEEL.items():
            archive.writestr(name, text)
    found = source.wheel(path)
    assert found.version == "0.34.0"
    expected = {
        "vllm:LLM": "(self, model, *, dtype=0, **kwargs)",
        "vllm:LLM.run": "(self, a)",
        "vllm:LLM.name": "",
        "vllm:LLM.kind": "",
        "vllm:LLM.model": "",
        "vllm:LLM.gone": None,
        "vllm:LLM.__abstractmethods__": "stop",
        "vllm.base:Base.__abstractmethods__": "run stop",
        "vllm.base:Fields.__abstractmethods__": "",
        "vllm.gone:Base.__abstractmethods__": None,
        "vllm:base.late": "(x, /, y, *rest)",
        "vllm.base:Fields": "(a, b=0)",
        "vllm.base:Base.__init__": "(self, model, *, dtype=0, **kwargs)",
        "vllm.gone:X": None,
        "*:only_here": "",
        "*:not_of_the_engine": None,
    }
    assert {question: found.answer(question) for question in expected} == expected


@pytest.mark.parametrize("content", [None, b"no archive", b"empty"])
def test_no_wheel_of_vllm(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.whl"
    if content == b"empty":
        zipfile.ZipFile(path, "w").close()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a wheel|holds no vLLM"):
        source.wheel(path)
