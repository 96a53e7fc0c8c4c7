# SPDX-License-Identifier: Apache-2.0
"""Answers questions about a vLLM from its source, by AST: nothing is imported or installed.

A question is a path ``module:name.name``. The answer is the signature as Python writes it, with 0
for every default (``(self, request, *, boundaries=0)``; of a class that of its ``__init__``, or its
fields), empty for what has none, None for what is not there. ``module:Class.__abstractmethods__``
is answered with the names that a subclass must define, ``get_name get_output``. ``*:name`` asks
whether any class of vLLM's engine has an attribute of that name.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ANYWHERE = "*:"
ABSTRACT = "__abstractmethods__"
_ENGINE = ("config", "engine", "entrypoints", "platforms", "plugins", "utils", "v1")
"""Subpackages that ``*:name`` searches, beside the modules directly in vLLM."""
_DEFINES = re.compile(r"(?:\bdef |\bself\.)(\w+)|^ {4}(\w+)\s*[:=]", re.M)


class Class(NamedTuple):
    """What a class statement says."""

    bases: list[str]
    members: dict[str, str]
    """Signatures; empty for attributes, those set on ``self`` included."""
    fields: dict[str, str]
    """Annotated names in order, with their default."""
    abstract: set[str]
    """Members that subclasses must define."""


class Module(NamedTuple):
    """What a module says."""

    classes: dict[str, Class]
    names: dict[str, str]
    """Signatures of functions; empty for variables."""
    imported: dict[str, str]
    """``module:name`` or ``module:`` of everything imported, also on demand."""


class Source:
    """A vLLM that lies in a folder or in a wheel.

    Args:
        version: of this vLLM.
        read: text of a file, ``vllm/...``; None where there is none.
        files: all Python files.
    """

    def __init__(
        self, version: str, read: Callable[[str], str | None], files: Callable[[], Iterator[str]]
    ) -> None:
        self.version = version
        self._read, self._files = read, files
        self._modules: dict[str, Module | None] = {}

    def answer(self, question: str) -> str | None:
        """See the module's docstring."""
        if question.startswith(ANYWHERE):
            return "" if question.removeprefix(ANYWHERE) in self._anywhere else None
        module, _, name = question.partition(":")
        return self._find(module, name.split("."))

    def _find(self, module: str, parts: list[str], depth: int = 0) -> str | None:
        facts = self._module(module)
        if facts is None or depth > 8:
            return None
        first, *rest = parts
        if not first:
            return "" if not rest else self._find(module, rest, depth + 1)
        if first in facts.classes:
            return self._of_class(module, first, rest)
        if first in facts.names:
            return "" if rest else facts.names[first]
        if first in facts.imported:
            where, _, name = facts.imported[first].partition(":")
            if not where.startswith("vllm"):
                return ""
            return self._find(where, [name, *rest] if name else rest or [""], depth + 1)
        return self._find(f"{module}.{first}", rest or [""], depth + 1)

    def _of_class(self, module: str, name: str, rest: list[str]) -> str | None:
        if not rest:
            for _, found in self._mro(module, name):
                if "__init__" in found.members:
                    return found.members["__init__"]
            fields: dict[str, str] = {}
            for _, found in reversed(list(self._mro(module, name))):
                fields |= found.fields
            return f"({', '.join(fields.values())})"
        if rest == [ABSTRACT]:
            abstract: dict[str, bool] = {}
            for _, found in self._mro(module, name):
                for member in found.members:
                    abstract.setdefault(member, member in found.abstract)
            return " ".join(sorted(member for member, left in abstract.items() if left))
        for _, found in self._mro(module, name):
            if rest[0] in found.members:
                return found.members[rest[0]] if len(rest) == 1 else ""
        return None

    def _mro(self, module: str, name: str, depth: int = 0) -> Iterator[tuple[str, Class]]:
        """A class of vLLM and its bases, depth first."""
        facts = self._module(module)
        if facts is None or depth > 12:
            return
        if name in facts.classes:
            yield module, facts.classes[name]
            for base in facts.classes[name].bases:
                yield from self._mro(module, base, depth + 1)
        elif name in facts.imported:
            where, _, original = facts.imported[name].partition(":")
            if where.startswith("vllm"):
                yield from self._mro(where, original, depth + 1)

    def _module(self, name: str) -> Module | None:
        if name not in self._modules:
            path = name.replace(".", "/")
            text = self._read(f"{path}/__init__.py")
            package = name if text is not None else name.rpartition(".")[0]
            text = self._read(f"{path}.py") if text is None else text
            self._modules[name] = None if text is None else _parse(text, package)
        return self._modules[name]

    @cached_property
    def _anywhere(self) -> set[str]:
        names: set[str] = set()
        for path in self._files():
            parts = PurePosixPath(path).parts
            if len(parts) > 2 and parts[1] not in _ENGINE:
                continue
            for found in _DEFINES.findall(self._read(path) or ""):
                names.update(found)
        return names


def installed(version: str) -> Source | None:
    """The vLLM that this Python would import; None where there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return folder(Path(next(iter(spec.submodule_search_locations))).parent, version)


def folder(root: Path, version: str) -> Source:
    """A vLLM in ``root/vllm``."""

    def read(path: str) -> str | None:
        file = root / path
        return file.read_text("utf-8") if file.is_file() else None

    def files() -> Iterator[str]:
        return (p.relative_to(root).as_posix() for p in (root / "vllm").rglob("*.py"))

    return Source(version, read, files)


def wheel(path: Path) -> Source:
    """A vLLM in a wheel file.

    Raises:
        ValueError: it is not a wheel of vLLM.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a wheel: {error}") from error
    names = set(archive.namelist())
    if "vllm/__init__.py" not in names:
        raise ValueError(f"{path} holds no vLLM")

    def read(name: str) -> str | None:
        return archive.read(name).decode("utf-8") if name in names else None

    def files() -> Iterator[str]:
        return (n for n in names if n.startswith("vllm/") and n.endswith(".py"))

    return Source(path.name.split("-")[1], read, files)


def signature(arguments: ast.arguments) -> str:
    """As Python writes it, with 0 for every default."""
    texts: list[str] = []
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    for index, argument in enumerate(positional):
        texts.append(argument.arg + ("=0" if index >= required else ""))
        if arguments.posonlyargs and index == len(arguments.posonlyargs) - 1:
            texts.append("/")
    if arguments.vararg:
        texts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        texts.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        texts.append(argument.arg + ("=0" if default is not None else ""))
    if arguments.kwarg:
        texts.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(texts)})"


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module or class, those under ``if``, ``try`` and ``with`` included."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from statements(getattr(node, part, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from statements(handler.body)


def _parse(text: str, package: str) -> Module:
    module = Module({}, {}, {})
    for node in statements(ast.parse(text).body):
        if isinstance(node, ast.ClassDef):
            module.classes[node.name] = parse_class(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            module.names[node.name] = signature(node.args)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            where = ".".join([*above, *filter(None, [node.module])]) if node.level else node.module
            for alias in node.names:
                module.imported.setdefault(alias.asname or alias.name, f"{where}:{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                module.imported.setdefault(name, f"{alias.name if alias.asname else name}:")
        else:
            for name in _targets(node):
                module.names.setdefault(name, "")
            module.imported.update(_on_demand(node, package))
    return module


def _on_demand(node: ast.stmt, package: str) -> dict[str, str]:
    """Names that a module's ``__getattr__`` imports: ``{"LLM": ".entrypoints.llm:LLM", ...}``."""
    value = getattr(node, "value", None)
    if not isinstance(value, ast.Dict):
        return {}
    found: dict[str, str] = {}
    for key, item in zip(value.keys, value.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(item, ast.Constant):
            match = re.fullmatch(r"\.([\w.]+):(\w+)", str(item.value))
            if match:
                found[str(key.value)] = f"{package}.{match[1]}:{match[2]}"
    return found


def parse_class(node: ast.ClassDef) -> Class:
    """What a class statement says."""
    bases = [ast.unparse(b.value if isinstance(b, ast.Subscript) else b) for b in node.bases]
    found = Class(bases, {}, {}, set())
    for statement in statements(node.body):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(d).rpartition(".")[2] for d in statement.decorator_list}
            attribute = decorators & {"property", "cached_property", "setter"}
            if "abstractmethod" in decorators:
                found.abstract.add(statement.name)
            found.members[statement.name] = "" if attribute else signature(statement.args)
            for inner in ast.walk(statement):
                if (
                    isinstance(inner, ast.Attribute)
                    and isinstance(inner.ctx, ast.Store)
                    and isinstance(inner.value, ast.Name)
                    and inner.value.id == "self"
                ):
                    found.members.setdefault(inner.attr, "")
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            found.members.setdefault(name, "")
            if "ClassVar" not in ast.unparse(statement.annotation):
                found.fields[name] = name + ("=0" if statement.value is not None else "")
        elif isinstance(statement, ast.ClassDef):
            found.members.setdefault(statement.name, "")
        else:
            for name in _targets(statement):
                found.members.setdefault(name, "")
    return found


def _targets(node: ast.stmt) -> Iterator[str]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    for target in targets:
        for inner in ast.walk(target):
            if isinstance(inner, ast.Name):
                yield inner.id
