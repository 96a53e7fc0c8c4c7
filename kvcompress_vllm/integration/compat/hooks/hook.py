# SPDX-License-Identifier: Apache-2.0
"""What is said of one name."""

from __future__ import annotations

from typing import NamedTuple


class Hook(NamedTuple):
    """One name we rely on.

    Attributes:
        path: ``module:qualified.name``.
        parameters: parameters (or dataclass fields) that must exist, in this order.
        reason: what we do with it.
        remove_when: what must come before we can do without.
        patched: whether we replace it at run time (the others are overridden or called).
        since: first release that has it; empty: all that we support.
        until: first release that has it no more, and needs it no more; empty: none.
    """

    path: str
    parameters: tuple[str, ...]
    reason: str
    remove_when: str
    patched: bool = False
    since: str = ""
    until: str = ""
