# SPDX-License-Identifier: Apache-2.0
"""Files in LongBench's format (<https://arxiv.org/abs/2308.14508>), one JSON object per line:
``input``, ``context``, ``answers``, ``all_classes``, ``dataset``, ``length``.

The prompts are ours; a JSON file of templates replaces them, or adds data sets:

    {"my_set": {"prompt": "{context}\\n\\n{input}", "metric": "f1", "max_tokens": 32}}

What stands before the end of ``{context}`` can be compressed without the rest, so ``{input}`` must
come after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.quality.scores import LONGBENCH

FIELDS = ("input", "context", "answers", "all_classes", "dataset")

QA = (
    "{context}\n\nAnswer the question from the text above, in as few words as possible.\n"
    "Question: {input}\nAnswer:"
)
SUMMARY = "{context}\n\nSummarise the text above in a few paragraphs.\n{input}\nSummary:"
EXAMPLES = "{context}\n{input}"
CODE = "{context}{input}"
COUNT = (
    "{context}\n\nSome of the paragraphs above may be repeated. How many different ones are there? "
    "Reply with the number only.\nNumber:"
)
FIND = (
    "{context}\n\nWhich of the paragraphs above does this abstract describe?\n{input}\n"
    "Reply like: Paragraph 1\nThe abstract describes:"
)


@dataclass(frozen=True)
class Form:
    """How a data set is asked and scored.

    Attributes:
        first_line: only that of the reply counts.
        chat: through the chat template; not where examples or code are continued.
    """

    prompt: str
    metric: str
    max_tokens: int
    first_line: bool = False
    chat: bool = True

    def render(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """The text up to the end of the context, and the rest."""
        before, after = self.prompt.split("{context}")
        return before + row["context"], after.replace("{input}", row["input"])


FORMS: dict[str, Form] = {
    "narrativeqa": Form(QA, "f1", 128),
    "qasper": Form(QA, "f1", 128),
    "multifieldqa_en": Form(QA, "f1", 64),
    "hotpotqa": Form(QA, "f1", 32),
    "2wikimqa": Form(QA, "f1", 32),
    "musique": Form(QA, "f1", 32),
    "gov_report": Form(SUMMARY, "rouge_l", 512),
    "qmsum": Form(QA, "rouge_l", 512),
    "multi_news": Form(SUMMARY, "rouge_l", 512),
    "trec": Form(EXAMPLES, "class", 64, first_line=True, chat=False),
    "triviaqa": Form(EXAMPLES, "f1", 32, first_line=True, chat=False),
    "samsum": Form(EXAMPLES, "rouge_l", 128, first_line=True, chat=False),
    "passage_count": Form(COUNT, "number", 32),
    "passage_retrieval_en": Form(FIND, "number", 32),
    "lcc": Form(CODE, "edit", 64, chat=False),
    "repobench-p": Form(CODE, "edit", 64, chat=False),
}
"""By data set; those of LongBench-E (``_e``) as without. The Chinese ones need a word splitter."""


@dataclass(frozen=True)
class DataSet:
    """Rows of one data set and how they are asked."""

    form: Form
    rows: list[dict[str, Any]]


def read(files: Sequence[Path], templates: Path | None = None) -> dict[str, DataSet]:
    """Rows by data set, in the order of the files.

    Raises:
        ValueError: a row lacks a field, or nothing says how to ask and score its data set.
    """
    forms = dict(FORMS)
    for name, given in json.loads(templates.read_text()).items() if templates else ():
        forms[name] = _form(name, given, forms.get(name.removesuffix("_e")))
    data_sets: dict[str, DataSet] = {}
    for file in files:
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(text)
            missing = [name for name in FIELDS if name not in row]
            if missing:
                raise ValueError(f"{file}, line {number}: no field {missing[0]!r}")
            name = row["dataset"]
            form = forms.get(name) or forms.get(name.removesuffix("_e"))
            if form is None:
                raise ValueError(
                    f"{file}, line {number}: no template for data set {name!r}; known are "
                    f"{', '.join(forms)}; --templates adds others"
                )
            data_sets.setdefault(name, DataSet(form, [])).rows.append(row)
    return data_sets


def _form(name: str, given: Mapping[str, Any], known: Form | None) -> Form:
    if known is None and not {"prompt", "metric", "max_tokens"} <= given.keys():
        raise ValueError(f"template {name!r} needs prompt, metric and max_tokens: {given}")
    try:
        form = replace(known or Form("{context}", "f1", 1), **given)
    except TypeError as error:
        names = ", ".join(Form.__dataclass_fields__)
        raise ValueError(f"template {name!r}: {error}; the keys are {names}") from None
    before = form.prompt.partition("{context}")[0]
    if form.prompt.count("{context}") != 1 or "{input}" in before:
        raise ValueError(f"template {name!r} needs {{context}} once, before {{input}}: {given}")
    if form.metric not in LONGBENCH:
        raise ValueError(
            f"template {name!r}: metric={form.metric!r} is not accepted; it must be one of "
            f"{', '.join(LONGBENCH)}"
        )
    if not isinstance(form.max_tokens, int) or form.max_tokens < 1:
        raise ValueError(f"template {name!r}: max_tokens={form.max_tokens!r} must be >= 1")
    return form


def truncated(tokens: list[int], context: int, most: int) -> tuple[list[int], int]:
    """At most ``most`` tokens, those in the middle left out, and how many are of the context."""
    if len(tokens) <= most:
        return tokens, context
    head, tail = most // 2, len(tokens) - (most - most // 2)
    return tokens[:head] + tokens[tail:], min(context, head) + max(0, context - tail)
