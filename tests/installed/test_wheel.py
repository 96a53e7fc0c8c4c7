# SPDX-License-Identifier: Apache-2.0
"""What `make wheel` builds, from installing it to taking it away again."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

import openai
import pytest
from elftools.elf.elffile import ELFFile

from tests.installed.collector import Collector
from tests.installed.conftest import ROOT, Environment, Server

UNTOUCHED = """
import json, pathlib, sys
from importlib import metadata

from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
import vllm

load_general_plugins()
entries = [e.value for g in ("vllm.general_plugins", "vllm.platform_plugins")
           for e in metadata.entry_points(group=g)]
add = EngineArgs.add_cli_args
print(json.dumps([add.__module__, EngineArgs.create_engine_config.__module__, entries,
                  [m for m in sys.modules if m.startswith("kvcompress")]]))
"""


def test_one_wheel_serves_every_python_and_torch(wheel: Path) -> None:
    assert re.search(r"-cp310-abi3-manylinux_2_27_[a-z0-9_]+\.whl$", wheel.name)
    assert list(wheel.parent.glob("kvcompress_vllm-*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
        assert libraries == ["kvcompress_vllm/_C.abi3.so"]
        names = archive.namelist()
        assert {f"kvcompress_vllm/presets/{p.name}" for p in ROOT.glob("configs/*")} <= {*names}
        with archive.open(libraries[0]) as library:
            table = ELFFile(library).get_section_by_name(".dynsym")
            wanted = [s.name for s in table.iter_symbols() if s["st_shndx"] == "SHN_UNDEF"]
    assert "torch_call_dispatcher" in wanted
    # Nothing of Python, and of PyTorch nothing but the C functions of its stable ABI.
    assert [n for n in wanted if re.match(r"_?Py|_ZNK?K?(2at|3c10|5torch)", n)] == []


def test_it_is_fit_to_run(installed: Environment) -> None:
    report = json.loads(installed.run("-m", "kvcompress_vllm", "doctor", "--json"))
    assert report["problems"] == [] and all(report["kernels"]["CPU"].values())
    where = installed.run("-c", "import kvcompress_vllm; print(kvcompress_vllm.__file__)")
    assert Path(where.strip()).is_relative_to(installed.packages)


def test_it_serves(server: Server, spans: Collector) -> None:
    """The first answer is compressed, and the span of its request says so, too."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import document
    finally:
        sys.path.pop(0)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": document.PROMPT}], temperature=0
    )
    assert reply.choices[0].message.content == document.ANSWER
    usage = reply.usage.model_dump()["kv_compress"]
    assert usage["compressions"] == 1 and usage["blocks_after"] * 5 < usage["blocks_before"]
    print(f"the server was ready after {server.seconds:.0f} s")

    (span,) = spans.of(reply.id)
    ours = {key.removeprefix("kv_compress."): value for key, value in span.items()}
    assert {key: ours[key] for key in usage} == usage
    assert span["gen_ai.usage.prompt_tokens"] == reply.usage.prompt_tokens


def test_vllm_is_untouched_once_it_is_gone(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("again")
    environment = Environment(folder / "environment")

    def files() -> dict[str, tuple[int, int]]:
        """Everything in the environment, what is behind links to vLLM included."""
        vllm = environment.packages / "vllm"
        found = [*folder.rglob("*"), *vllm.rglob("*.py"), *vllm.rglob("*.so")]
        stats = {str(p): p.stat() for p in found if "__pycache__" not in p.parts and p.is_file()}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    before = files()
    environment.install(wheel)
    assert len(files()) > len(before) + 100
    environment.run("-m", "pip", "uninstall", "--quiet", "--yes", "kvcompress_vllm")
    assert files() == before
    adds, creates, entries, ours = json.loads(environment.run("-c", UNTOUCHED).splitlines()[-1])
    assert adds == creates == "vllm.engine.arg_utils"
    assert not [value for value in entries if "kvcompress" in value] and ours == []
