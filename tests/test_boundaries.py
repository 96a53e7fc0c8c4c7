# SPDX-License-Identifier: Apache-2.0
"""Only ``integration/`` imports vLLM, and importing the package has no side effects."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "kvcompress_vllm"


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_nothing_outside_integration_imports_vllm() -> None:
    outside = [
        p for p in PACKAGE.rglob("*.py") if "integration" not in p.relative_to(PACKAGE).parts
    ]
    assert len(outside) > 10
    for path in outside:
        for name in imported(path):
            assert name.split(".")[0] != "vllm", path
            is_lazy = path in (PACKAGE / "__init__.py", PACKAGE / "cli.py")
            assert not name.startswith("kvcompress_vllm.integration") or is_lazy, path


def test_core_imports_leave_vllm_out() -> None:
    modules = [
        ".".join(("kvcompress_vllm", *p.relative_to(PACKAGE).with_suffix("").parts))
        for p in PACKAGE.rglob("*.py")
        if "integration" not in p.relative_to(PACKAGE).parts and p.name != "__init__.py"
    ]
    code = f"import sys, {', '.join(modules)}\nassert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_the_plugin_module_is_cheap() -> None:
    code = (
        "import sys, kvcompress_vllm.integration.plugin\n"
        "assert not {'vllm', 'transformers', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_and_policies_load_no_library() -> None:
    """Every process of vLLM imports the plugin, most of them without the flag."""
    code = (
        "import sys, kvcompress_vllm.integration.plugin, kvcompress_vllm.config.spelling\n"
        "from kvcompress_vllm import ops, policies\n"
        "assert 'torch' not in sys.modules and ops.SUM == 0 and 'cake' in policies.names()\n"
        "kvcompress_vllm.KVCompressConfig.from_dict({'policy': 'cake', 'ratio': 3})\n"
        "libraries = [line for line in open('/proc/self/maps') if 'kvcompress_vllm/_C' in line]\n"
        "others = {'snapkv', 'diverse', 'kv_compress'}\n"
        "assert not libraries and not {f'kvcompress_vllm.policies.{o}' for o in others} & "
        "sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_utils_modules_are_not_wanted() -> None:
    assert not list(PACKAGE.rglob("utils*.py"))
