# SPDX-License-Identifier: Apache-2.0
"""What the CPU platform mends in newer releases of vLLM."""

from __future__ import annotations

import sys
import types

import pytest

from kvcompress_vllm.integration.cpu import newer


class Library:
    """Like llvmlite's: whatever it is asked for, it makes."""

    @property
    def __dict__(self):  # type: ignore[override]
        return object()


def test_kernels_are_looked_for_among_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = pytest.importorskip("vllm.triton_utils.dispatcher")
    owner = types.SimpleNamespace(kernel="before")
    module = types.ModuleType("holds_a_library")
    module.lib, module.owner = Library(), owner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "holds_a_library", module)
    monkeypatch.delattr(dispatcher, "vars", raising=False)
    overrides = [(owner.kernel, "after")]
    with pytest.raises(AttributeError):
        dispatcher._rebind_kernels(overrides)
    newer.mend_kernel_scan()
    dispatcher._rebind_kernels(overrides)
    assert owner.kernel == "after"
