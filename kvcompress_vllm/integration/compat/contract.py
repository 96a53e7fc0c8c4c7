# SPDX-License-Identifier: Apache-2.0
"""Whether a vLLM still has what we rely on, passes our functions no more than they take, and asks
of our classes no more than they define.

Works on source (``source.py``), so on a wheel that is not installed as well, and on recorded
answers. ``recorded.json`` holds those of the releases that we support: what an earlier release had
and a later one lacks has been renamed or removed, and is broken unless ``hooks`` says since or
until when.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from kvcompress_vllm.integration.compat.hooks import HOOKS, Hook
from kvcompress_vllm.integration.compat.ours import Reliance, reliance
from kvcompress_vllm.integration.compat.source import signature

RECORDED = Path(__file__).with_name("recorded.json")
Answer = Callable[[str], str | None]


class Recorded:
    """Answers of all releases: per question a list of (first release, answer)."""

    def __init__(self, releases: list[str], answers: Mapping[str, list[Any]]) -> None:
        self.releases, self._answers = releases, answers

    @classmethod
    @cache
    def load(cls) -> Recorded:
        """What the package brings."""
        content = json.loads(RECORDED.read_text("utf-8"))
        return cls(content["releases"], content["answers"])

    def answer(self, release: str, question: str) -> str | None:
        """As :meth:`source.Source.answer`; None as well where nobody asked."""
        found: str | None = None
        for since, text in self._answers.get(question, ()):
            if self.releases.index(since) <= self.releases.index(release):
                found = text
        return found

    def had_before(self, version: str, question: str) -> bool:
        """Whether a release before this version had it."""
        earlier = [release for release in self.releases if numbers(release) < numbers(version)]
        return any(self.answer(release, question) is not None for release in earlier)


def numbers(version: str) -> tuple[int, ...]:
    """``0.26.1+cu129`` as (0, 26, 1)."""
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def questions() -> set[str]:
    """All that is asked of a vLLM."""
    return {*reliance().questions(), *(hook.path for hook in HOOKS)}


def check(
    answer: Answer,
    version: str,
    hooks: tuple[Hook, ...] | None = None,
    ours: Reliance | None = None,
) -> list[str]:
    """What is broken with a vLLM: a line each, naming it, our file and what it is for."""
    hooks, ours, recorded = hooks or HOOKS, ours or reliance(), Recorded.load()
    problems: dict[str, None] = {}

    def missing(question: str, where: str) -> None:
        if not _excused(hooks, question, version):
            problems[f"{question.removeprefix('*:')}: not there; {where} uses it"] = None

    for hook in hooks:
        if in_force(hook, version):
            problems |= dict.fromkeys(_hook_problems(hook, answer(hook.path)))
    for question, where in (ours.imports | ours.reads).items():
        if answer(question) is None:
            missing(question, where)
    for question, where in (ours.sets | ours.names).items():
        if recorded.had_before(version, question) and answer(question) is None:
            missing(question, where)
    for override in ours.overrides:
        stock = answer(override.question)
        if stock is not None:
            why = "; ".join(not_taken(stock, override.signature))
            if why:
                said = f"{override.question} passes {stock}, {override.where} takes "
                problems[f"{said}{override.signature}: {why}"] = None
        elif recorded.had_before(version, override.question):
            missing(override.question, f"{override.where}, which overrides it,")
    for subclass in ours.subclasses:
        for name in (answer(subclass.question) or "").split():
            if name not in subclass.defines:
                base = subclass.question.rpartition(".")[0]
                problems[f"{base}.{name} is abstract; {subclass.where} does not define it"] = None
    replaced = [h for h in hooks if h.patched and in_force(h, version)]
    for patch, hook in product(ours.patches, replaced):
        *_, owner, name = re.split("[.:]", hook.path)
        stock = answer(hook.path) if name == patch.name else None
        # ``Class.name = function`` says whose it is, ``runner.name = function`` does not.
        if stock is not None and (not patch.owner[:1].isupper() or patch.owner == owner):
            bound = stock if patch.signature[1:].startswith(("self", "cls")) else _unbound(stock)
            why = "; ".join(not_taken(bound, patch.signature))
            if why:
                said = f"{patch.name} passes {bound}, {patch.where} takes {patch.signature}"
                problems[f"{said}: {why}"] = None
    return list(problems)


def unimportable(version: str) -> list[str]:
    """Modules of the installed vLLM that we rely on and that do not load."""
    problems = []
    for module in dict.fromkeys(h.path.split(":")[0] for h in HOOKS if in_force(h, version)):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever it is that a broken vLLM raises on import
            problems.append(f"{module}: {error}")
    return problems


def in_force(hook: Hook, version: str) -> bool:
    """Whether that release has it."""
    here = numbers(version)
    return (not hook.since or numbers(hook.since) <= here) and (
        not hook.until or here < numbers(hook.until)
    )


def _excused(hooks: tuple[Hook, ...], question: str, version: str) -> bool:
    """Whether a hook says that this release need not have it."""
    name = question.replace(":", ".")
    for hook in hooks:
        path = hook.path.replace(":", ".")
        if f"{path}.".startswith(f"{name}.") and not in_force(hook, version):
            return True
    return False


def _hook_problems(hook: Hook, found: str | None) -> Iterator[str]:
    if found is None:
        yield f"{hook.path}: not there (we use it: {hook.reason})"
        return
    if not hook.parameters:
        return
    names = [name for name, _, _ in _parameters(found)]
    positions = [names.index(p) if p in names else -1 for p in hook.parameters]
    if -1 in positions or positions != sorted(positions):
        yield (
            f"{hook.path} takes {names}, we need {list(hook.parameters)} in this order "
            f"(we use it: {hook.reason})"
        )


def not_taken(stock: str, ours: str) -> Iterator[str]:
    """What vLLM may pass to a function with one signature that another would not take."""
    theirs, own = _parameters(stock), _parameters(ours)
    by_name = {name: kind for name, kind, _ in own}
    positional = [name for name, kind, _ in own if kind in ("positional", "either")]
    anything, any_name = "rest" in by_name.values(), "names" in by_name.values()
    for index, (name, kind, _) in enumerate(p for p in theirs if p[1] in ("positional", "either")):
        if index < len(positional):
            taken = positional[index] == name or (index == 0 and name in ("self", "cls"))
            if not taken and kind == "either":
                yield f"{name!r} arrives as {positional[index]!r}"
        elif not anything:
            yield f"{name!r} is one too many"
        elif not any_name and kind == "either" and name not in by_name:
            yield f"{name!r} cannot be named"
    for name, kind, _ in theirs:
        if kind == "named" and by_name.get(name) not in ("either", "named") and not any_name:
            yield f"{name!r} cannot be named"
        if kind == "rest" and not anything:
            yield f"*{name} is one too many"
        if kind == "names" and not any_name:
            yield f"**{name} is one too many"
    given = {name for name, _, _ in theirs}
    for name, _, required in own:
        if required and name not in given and name not in ("self", "cls"):
            yield f"{name!r} is not passed"


def _parameters(text: str) -> list[tuple[str, str, bool]]:
    """(name, kind, whether it must be passed) of a signature; kinds are positional, either, named,
    rest (``*args``) and names (``**kwargs``)."""
    if not text:
        return []
    expression = ast.parse(f"lambda {text[1:-1]}: 0", mode="eval").body
    assert isinstance(expression, ast.Lambda)
    arguments = expression.args
    assert signature(arguments) == text, text
    both = [*arguments.posonlyargs, *arguments.args]
    required = len(both) - len(arguments.defaults)
    found = [
        (a.arg, "positional" if i < len(arguments.posonlyargs) else "either", i < required)
        for i, a in enumerate(both)
    ]
    found += [(arguments.vararg.arg, "rest", False)] if arguments.vararg else []
    found += [
        (a.arg, "named", default is None)
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return found + ([(arguments.kwarg.arg, "names", False)] if arguments.kwarg else [])


def _unbound(text: str) -> str:
    """Without ``self`` or ``cls``."""
    return re.sub(r"^\((?:self|cls)(?:, )?", "(", text)
