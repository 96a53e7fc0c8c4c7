# SPDX-License-Identifier: Apache-2.0
"""The live page: one file that asks for nothing but its data."""

from __future__ import annotations

import functools
from importlib import resources


@functools.cache
def html() -> str:
    """``page/page.html`` with the library that it draws with inside."""
    folder = resources.files("kvcompress_vllm") / "page"
    text = (folder / "page.html").read_text("utf-8")
    for name in ("uPlot.min.css", "uPlot.iife.min.js"):
        text = text.replace(f"/* {name} */", (folder / name).read_text("utf-8"))
    return text
