# SPDX-License-Identifier: Apache-2.0
"""YAML as this package reads it: what is written is what is meant.

YAML 1.1 reads ``010`` as 8, ``1:30`` as 90, ``1e-2`` as a word and ``2026-01-02`` as a date; lets
a later key silently replace an earlier one; and lets aliases write a gigabyte in a hundred bytes.
Here numbers are decimal, everything else unquoted is a word, true, false or null, a key is given
once, and there are no aliases.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

_INTEGER = re.compile(r"[-+]?[0-9]+$")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$")
_KEPT = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null")


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not accepted", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = Counter(keys) - Counter(set(keys))
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{min(twice)!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("!integer", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("!number", _NUMBER, list("-+.0123456789"))
_Loader.add_constructor("!integer", lambda loader, node: int(node.value))
_Loader.add_constructor("!number", lambda loader, node: float(node.value))


def read(text: str | bytes) -> Any:
    """The value that a YAML text holds.

    Raises:
        yaml.YAMLError: it is no YAML, or uses what is not accepted.
        ValueError: a number has thousands of digits.
        RecursionError: it nests too deeply.
    """
    return yaml.load(text, Loader=_Loader)
