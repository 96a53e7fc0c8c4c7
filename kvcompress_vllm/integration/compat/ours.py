# SPDX-License-Identifier: Apache-2.0
"""What ``integration/`` takes for granted of vLLM, found in its own source by AST.

Imports; overrides of methods; what subclasses define of what vLLM leaves to them; attributes that
they read or set on ``self``; functions put in the place of vLLM's; and every other attribute name,
which vLLM must at least know somewhere.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kvcompress_vllm.integration.compat.source import ABSTRACT, ANYWHERE, signature

INTEGRATION = Path(__file__).parents[1]
_OWN = "kvcompress_vllm."


class Override(NamedTuple):
    """A method of ours that may replace one of vLLM's.

    Attributes:
        question: ``module:Class.method`` of vLLM's.
        signature: of ours.
        where: ``Class.method`` of ours.
    """

    question: str
    signature: str
    where: str


class Subclass(NamedTuple):
    """A class of ours, and one of vLLM's that it is made of.

    Attributes:
        question: the abstract methods of vLLM's, ``module:Class.__abstractmethods__``.
        defines: all that ours and its bases of ours define.
        where: name of ours.
    """

    question: str
    defines: frozenset[str]
    where: str


class Patch(NamedTuple):
    """A function of ours that is put in the place of one of vLLM's of the same name.

    Attributes:
        owner: whose attribute is assigned.
        name: of the attribute.
        signature: of ours.
        where: our file.
    """

    owner: str
    name: str
    signature: str
    where: str


class Reliance(NamedTuple):
    """Everything found; see the module's docstring.

    Attributes:
        imports: questions that must have an answer.
        reads: questions about attributes that our subclasses read of vLLM's classes.
        sets: questions about attributes that our subclasses set; vLLM may have them, too.
        names: ``*:name`` of all other attributes that are not ours.
    """

    imports: dict[str, str]
    reads: dict[str, str]
    sets: dict[str, str]
    overrides: tuple[Override, ...]
    subclasses: tuple[Subclass, ...]
    patches: tuple[Patch, ...]
    names: dict[str, str]

    def questions(self) -> set[str]:
        """All that is asked of a vLLM."""
        return {
            *self.imports, *self.reads, *self.sets, *self.names,
            *(override.question for override in self.overrides),
            *(subclass.question for subclass in self.subclasses),
        }  # fmt: skip


class _OwnClass(NamedTuple):
    name: str
    file: str
    bases: list[str]
    """``module:Class`` of vLLM's, names of ours."""
    methods: dict[str, str]
    attributes: set[str]
    reads: set[str]
    sets: set[str]


@cache
def reliance() -> Reliance:
    """Of this installation's ``integration/``."""
    files = {p.relative_to(INTEGRATION).as_posix(): p for p in INTEGRATION.rglob("*.py")}
    trees = {
        name: ast.parse(path.read_text("utf-8"))
        for name, path in sorted(files.items())
        if not name.startswith("compat/") or name == "compat/releases.py"
    }
    classes: dict[str, _OwnClass] = {}
    imports: dict[str, str] = {}
    patches: list[Patch] = []
    for name, tree in trees.items():
        imported = _imported(tree)
        asked = [q for q in imported.values() if not q.endswith(":")]
        imports |= dict.fromkeys([*asked, *_chains(tree, imported)], name)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = _own_class(name, node, imported)
        patches += _patches(name, tree)
    reads: dict[str, str] = {}
    sets: dict[str, str] = {}
    overrides: list[Override] = []
    subclasses: list[Subclass] = []
    for name in classes:
        lineage = list(_lineage(name, classes))
        own = {part for c in lineage for part in (*c.methods, *c.attributes, *c.sets)}
        defines = frozenset(part for c in lineage for part in (*c.methods, *c.attributes))
        for base in sorted({b for c in lineage for b in c.bases if ":" in b}):
            subclasses.append(Subclass(f"{base}.{ABSTRACT}", defines, name))
            for c in lineage:
                reads |= {f"{base}.{part}": c.file for part in c.reads - own}
                sets |= {f"{base}.{part}": c.file for part in c.sets | c.attributes}
                overrides += [
                    Override(f"{base}.{method}", signature_, f"{c.name}.{method}")
                    for method, signature_ in c.methods.items()
                ]
    return Reliance(
        imports, reads, sets, tuple(dict.fromkeys(overrides)), tuple(subclasses), tuple(patches),
        _names(trees),
    )  # fmt: skip


def _imported(tree: ast.Module) -> dict[str, str]:
    """vLLM's names in a file of ours: local name to ``module:name``."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}:{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    found[alias.asname or "vllm"] = "vllm:"
    return found


def _chains(tree: ast.Module, imported: dict[str, str]) -> Iterator[str]:
    """``local.name`` in a file, for imported local names, as questions."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and isinstance(node.value, ast.Name)
            and node.value.id in imported
            and not node.attr.startswith("__")
        ):
            question = imported[node.value.id]
            yield f"{question}{'' if question.endswith(':') else '.'}{node.attr}"


def _own_class(file: str, node: ast.ClassDef, imported: dict[str, str]) -> _OwnClass:
    bases: list[str] = []
    for base in node.bases:
        text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        head, _, rest = text.partition(".")
        known = imported.get(head)
        bases.append(f"{known}{rest}" if known and rest else known or text)
    methods: dict[str, str] = {}
    attributes: set[str] = set()
    reads: set[str] = set()
    sets: set[str] = set()
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            methods[statement.name] = signature(statement.args)
            for inner in ast.walk(statement):
                if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                    if inner.value.id in ("self", "cls"):
                        (reads if isinstance(inner.ctx, ast.Load) else sets).add(inner.attr)
                elif _is_super(inner):
                    reads.add(inner.attr)  # type: ignore[attr-defined]
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            attributes.add(statement.target.id)
        elif isinstance(statement, ast.Assign):
            attributes |= {t.id for t in statement.targets if isinstance(t, ast.Name)}
    reads = {part for part in reads if not part.startswith("__")}
    return _OwnClass(node.name, file, bases, methods, attributes, reads, sets)


def _is_super(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "super"
    )


def _lineage(name: str, classes: dict[str, _OwnClass]) -> Iterator[_OwnClass]:
    yield classes[name]
    for base in classes[name].bases:
        if base in classes:
            yield from _lineage(base, classes)


def _patches(file: str, tree: ast.Module) -> Iterator[Patch]:
    """``anything.name = function``, where the function is ours and stands in the same file."""
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.name not in functions or _wraps(node)
        ):
            functions[node.name] = node
    for target, value in _assignments(tree):
        function = _function(value, functions)
        if isinstance(target, ast.Attribute) and function is not None:
            bound = isinstance(value, ast.Attribute)
            text = signature(function.args)
            text = text.replace("(self, ", "(") if bound else text
            yield Patch(ast.unparse(target.value), target.attr, text, file)


def _assignments(tree: ast.Module) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Target and value, also of ``a.x, a.y = x, y``."""
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            value = node.value  # type: ignore[attr-defined]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                yield from zip(target.elts, value.elts, strict=False)
            else:
                yield target, value


def _wraps(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(d).startswith("functools.wraps") for d in function.decorator_list)


def _function(
    value: ast.expr, functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef]
) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """What an assigned expression calls in the end: ``f``, ``classmethod(f)``, ``self.f``, and
    ``make(stock)`` for a function that returns one of its own."""
    if isinstance(value, ast.Name):
        return functions.get(value.id)
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
        return functions.get(value.attr) if value.value.id == "self" else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        if value.func.id in ("staticmethod", "classmethod"):
            return _function(value.args[0], functions)
        maker = functions.get(value.func.id)
        for inner in maker.body if maker else ():
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                return inner
    return None


def _names(trees: dict[str, ast.Module]) -> dict[str, str]:
    found = {
        node.attr: file
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    return {
        f"{ANYWHERE}{name}": file
        for name, file in sorted(found.items())
        if not name.startswith("__") and name not in _own_names()
    }


@cache
def _own_names() -> set[str]:
    """Attributes that the package itself defines anywhere."""
    names: set[str] = set()
    for path in INTEGRATION.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names
