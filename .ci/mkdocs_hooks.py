# SPDX-License-Identifier: Apache-2.0
"""What GitHub does by itself and MkDocs does not."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
FOLDERS = ("results",)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links that leave ``docs/`` lead to the repository where ``repo_url`` names it, and are text
    otherwise; ``tests/test_docs.py`` checks them all. So are links to folders of data."""
    here = posixpath.dirname(page.file.src_uri)

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, link[2]))
        if target.startswith("docs/") and target.removeprefix("docs/") not in FOLDERS:
            return link[0]
        return f"[{link[1]}]({config.repo_url}/blob/main/{target})" if config.repo_url else link[1]

    return LINK.sub(replace, markdown)
