# SPDX-License-Identifier: Apache-2.0
"""Mutation testing as a pytest plugin (docs/decisions/022-mutation.md).

    python -m pytest -p tests.mutation --mutate FILES --sample 200 --seed 1 TESTS

Tests are imported and collected once. A child runs them without a mutant and notes which of them
reach which line (``coverage``). Then each mutant is a child of its own: one function has another
``__code__``, and the tests that reach the changed line run, quick ones first, until one fails. No
file is changed. Error messages, logs, annotations and what a module computes once are left alone.
"""

from __future__ import annotations

import ast
import glob
import importlib
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And, ast.USub: ast.UAdd,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
UNCHANGED = 99
"""Exit status of a child whose mutant could not be put in place."""


class Mutant(NamedTuple):
    """One change of one file."""

    path: str
    index: int
    """Of the changed node in ``ast.walk``."""
    kind: str


def mutants(path: str) -> Iterator[Mutant]:
    """All of a file."""
    tree = ast.parse(Path(path).read_text())
    inside: set[int] = set()
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            inside |= {id(n) for statement in node.body for n in ast.walk(statement)}
        is_text = isinstance(node, ast.Expr) and (
            isinstance(node.value, ast.Constant) or ast.unparse(node).startswith("logger.")
        )
        annotations = [getattr(node, name, None) for name in ("annotation", "returns")]
        for part in (node if is_text or isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert)
                     else None, *annotations):  # fmt: skip
            if part is not None:
                skipped |= {id(n) for n in ast.walk(part)}
    for index, node in enumerate(ast.walk(tree)):
        if id(node) in inside and id(node) not in skipped:
            yield from (Mutant(path, index, kind) for kind in kinds(node))


def kinds(node: ast.AST) -> Iterator[str]:
    """What can be changed of a node."""
    if isinstance(node, ast.Compare):
        yield from (f"op{place}" for place, op in enumerate(node.ops) if type(op) in SWAPS)
    elif isinstance(node, ast.BinOp | ast.UnaryOp | ast.BoolOp | ast.AugAssign):
        if type(node.op) in SWAPS:
            yield "op"
        if isinstance(node.op, ast.Not):
            yield "not"
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        yield "constant"
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield "name"
    elif isinstance(node, ast.If | ast.IfExp):
        yield from ("never", "always")
    elif isinstance(node, ast.Return) and node.value is not None:
        if not isinstance(node.value, ast.Constant):
            yield "none"
    elif (
        isinstance(node, ast.Continue | ast.Break)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        or (isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name))
    ):
        yield "drop"
    if isinstance(node, ast.AugAssign):
        yield "drop"


def mutated(mutant: Mutant) -> tuple[ast.Module, int, str]:
    """The changed file, the line of the change, and the change in words."""
    tree = ast.parse(Path(mutant.path).read_text())
    node: Any = list(ast.walk(tree))[mutant.index]
    kind, line, before = mutant.kind, node.lineno, ast.unparse(node).split("\n")[0]
    if kind == "op":
        node.op = SWAPS[type(node.op)]()
    elif kind.startswith("op"):
        place = int(kind[2:])
        node.ops[place] = SWAPS[type(node.ops[place])]()
    elif kind == "constant":
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif kind == "name":
        node.id = NAMES[node.id]
    elif kind == "not":
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif kind in ("never", "always"):
        node.test = ast.Constant(kind == "always")
    elif kind == "none":
        node.value = ast.Constant(None)
    after = ast.unparse(node).split("\n")[0]
    if kind == "drop":
        after = "pass"
        for parent in ast.walk(tree):
            for _, values in ast.iter_fields(parent):
                if isinstance(values, list) and node in values:
                    values[values.index(node)] = ast.copy_location(ast.Pass(), node)
    return ast.fix_missing_locations(tree), line, f"[{kind}] {before}  ->  {after}"


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of every function of a module's."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes(constant)


def place_of(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def functions(module: ModuleType) -> Iterator[FunctionType]:
    """Those of a loaded module and of its classes."""
    classes = [v for v in vars(module).values() if isinstance(v, type)]
    for owner in (module, *(c for c in classes if c.__module__ == module.__name__)):
        for value in list(vars(owner).values()):
            if isinstance(value, property):
                value = value.fget
            elif isinstance(value, cached_property):
                value = value.func
            value = getattr(value, "__wrapped__", getattr(value, "__func__", value))
            if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                yield value


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def put_in_place(path: str, tree: ast.Module) -> bool:
    """Give the loaded functions of a file the code of its mutant; False where none changes."""
    compiled = compile(tree, os.path.abspath(path), "exec")
    new = {place_of(code): code for code in codes(compiled)}
    changed = False
    for function in functions(sys.modules[module_name(path)]):
        code = new.get(place_of(function.__code__))
        if code is not None and code != function.__code__:
            try:
                function.__code__ = code
            except ValueError:  # super(), or the variable of a closure, has gone
                return False
            changed = True
    return changed


def in_child(work: Callable[[], int]) -> int:
    """The exit status of ``work`` in a fork; negative where a signal ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(
    session: pytest.Session,
    items: Sequence[pytest.Item],
    around: Callable[[pytest.Item], None] = lambda item: None,
) -> int:
    """0 if all tests pass, 1 with the first that fails."""
    for item, after in zip(items, [*items[1:], None], strict=True):
        around(item)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if session.testsfailed:
            return 1
    return 0


def reached(session: pytest.Session, paths: Sequence[str], file: Path) -> int:
    """Run all tests and write to ``file`` which of them reach which line, and how long each takes.

    The names of the tests are the contexts of the coverage's data.
    """
    import coverage

    measured = coverage.Coverage(
        data_file=None, include=[os.path.abspath(path) for path in paths], config_file=False
    )
    marks: list[tuple[str, float]] = []

    def around(item: pytest.Item) -> None:
        measured.switch_context(item.nodeid)
        marks.append((item.nodeid, time.process_time()))

    measured.start()
    status = run(session, session.items, around)
    measured.stop()
    ends = [*(begin for _, begin in marks[1:]), time.process_time()]
    spent = {name: end - begin for (name, begin), end in zip(marks, ends, strict=True)}
    data = measured.get_data()
    lines = {path: data.contexts_by_lineno(os.path.abspath(path)) for path in paths}
    file.write_text(json.dumps({"spent": spent, "lines": lines, "last": marks[-1][0]}))
    return status


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutate", nargs="+", metavar="FILE", help="files or patterns")
    parser.addoption("--sample", type=int, metavar="N", help="only so many mutants, at random")
    parser.addoption("--seed", type=int, default=0, help="of the sample")
    parser.addoption("--quick", type=float, default=float("inf"), metavar="SECONDS",
                     help="only tests that take less; survivors go on with --only")  # fmt: skip
    parser.addoption("--minutes", type=float, default=float("inf"), help="begin no mutant after")
    parser.addoption("--reach", type=Path, metavar="FILE", default=Path("reach.json"),
                     help="which test reaches which line; measured if it is not there")  # fmt: skip
    parser.addoption("--results", type=Path, metavar="FILE", default=Path("mutants.tsv"),
                     help="a line per mutant, as --only takes them")  # fmt: skip
    parser.addoption("--only", type=Path, metavar="FILE", help="the mutants of these lines")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    from hypothesis import settings

    settings.register_profile("mutation", deadline=None, derandomize=True, database=None)
    settings.load_profile("mutation")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    option = session.config.getoption
    if not option("mutate"):
        return None
    session.config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=True)
    paths = sorted({path for pattern in option("mutate") for path in glob.glob(pattern)})
    paths = [path for path in paths if not path.endswith("__init__.py")]
    for path in paths:
        importlib.import_module(module_name(path))
    if not option("reach").exists():
        failed = in_child(lambda: reached(session, paths, option("reach")))
        if failed:
            raise pytest.UsageError(f"the tests fail without a mutant: {option('reach')}")
    known = json.loads(option("reach").read_text())
    every = [mutant for path in paths for mutant in mutants(path)]
    random.Random(option("seed")).shuffle(every)
    chosen = every[: option("sample")]
    if option("only"):
        rows = [line.split("\t") for line in option("only").read_text().splitlines()]
        chosen = [Mutant(row[0], int(row[1]), row[2]) for row in rows]
    print(f"\n{len(chosen)} of {len(every)} mutants of {len(paths)} files")
    by_name = {item.nodeid: item for item in session.items}
    counts: dict[str, Counter[str]] = {path: Counter() for path in paths}
    begun = time.monotonic()
    with option("results").open("a", buffering=1) as results:
        for mutant in chosen:
            if time.monotonic() - begun > 60 * option("minutes"):
                print("stopped by --minutes")
                break
            tree, line, change = mutated(mutant)
            names = known["lines"][mutant.path].get(str(line), [])
            items = sorted(
                (
                    by_name[name]
                    for name in names
                    if name in by_name and known["spent"][name] < option("quick")
                ),
                key=lambda item: known["spent"][item.nodeid],
            )
            limit = 20 + int(5 * sum(known["spent"][item.nodeid] for item in items))
            state = outcome(session, mutant.path, tree, items, limit)
            counts[mutant.path][state] += 1
            row = (*mutant, line, state, f"{len(items)} tests", change)
            print(*row, sep="\t", file=results)
            if state != "killed":
                print(f"{state} {mutant.path}:{line}: {change} ({len(items)} tests)", flush=True)
    for path, count in counts.items():
        print(path, dict(count))
    print(dict(sum(counts.values(), Counter())))
    return True


def outcome(
    session: pytest.Session,
    path: str,
    tree: ast.Module,
    items: Sequence[pytest.Item],
    limit: int,
) -> str:
    """Whether one of the tests fails with a mutant, or takes more than ``limit`` CPU seconds."""
    if not items:
        return "not reached"

    def work() -> int:
        if not put_in_place(path, tree):
            return UNCHANGED
        end = int(time.process_time()) + limit
        resource.setrlimit(resource.RLIMIT_CPU, (end, end))
        return run(session, items)

    status = in_child(work)
    return {0: "survived", UNCHANGED: "not put in place"}.get(status, "killed")
