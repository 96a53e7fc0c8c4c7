# SPDX-License-Identifier: Apache-2.0
"""The tasks: facts woven into filler, then a question with one exact answer.

    generator = TaskGen.load("models/tiny")
    prompt, answer = generator.task("multikey", 1900, seed=7)

Samples are pinned by tests/test_retrieval_tasks.py: the order of calls to the random number
generator is part of the result, so even a harmless looking reordering changes every sample.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .entities import (
    NEEDLES,
    entities,
    entity,
    hexadecimal,
    number,
    pseudo_word,
    value,
    word_pair,
)
from .filler import Filler, NaturalText
from .vocab import ASSISTANT, BOS, EOS, USER, Tokens, Vocab, join
from .words import COLORS, NAMES, NOUNS, OBJECTS, PLACES

TASKS = ("single", "multikey", "multikey32", "dense", "multivalue", "multiquery", "kv40", "kv70",
         "kv100", "vt1", "vt2", "vt3", "vt_list", "copy", "fwe", "qa", "qa2")  # fmt: skip

PREFACES = (
    "Read the text below. You will be asked about it.",
    "Some facts are hidden in the following text. Remember them.",
    "The following text contains facts that you need later.",
    "Here is a document.",
)
FILLER_FILE = Path(__file__).with_name("filler_heldout.txt.xz")

Question = tuple[str, str]
Context = Callable[[int], Tokens]
"""Makes the context, given how many tokens it may have."""


class TaskGen:
    """Samples of every task in :data:`TASKS`.

    ``several`` in the methods below: many questions on one context, of wider variety (the form in
    which the bundled model saw the tasks in training), instead of the one question of ``task``.
    """

    def __init__(self, vocab: Vocab, filler: Filler) -> None:
        self._vocab = vocab
        self._filler = filler
        self._newline = join([vocab.newline])

    @classmethod
    def load(cls, model_dir: str | Path, filler_file: str | Path = FILLER_FILE) -> TaskGen:
        """Use the tokenizer of ``model_dir``; ``filler_file``: xz, form feeds between documents."""
        vocab = Vocab.load(Path(model_dir))
        return cls(vocab, Filler(vocab, NaturalText(vocab, Path(filler_file))))

    def task(self, name: str, length_tokens: int, seed: int) -> tuple[str, str]:
        """One sample as text: (prompt, answer).

        The prompt has the role markers in it, the tokenizer puts ``<s>`` in front.
        ``length_tokens`` bounds everything together: ``<s>``, prompt, answer and ``</s>``.
        """
        for attempt in range(9):  # a draw that does not fit is drawn again
            key = f"eval-{name}-{length_tokens}-{seed}" + (f"+{attempt}" if attempt else "")
            tokens = self._sample(name, random.Random(key), length_tokens, several=False)
            if len(tokens) <= length_tokens:
                break
        begin = int(np.flatnonzero(tokens == ASSISTANT)[0]) + 1
        end = begin + int(np.flatnonzero(tokens[begin:] == EOS)[0])
        return self._vocab.decode(tokens[1:begin]), self._vocab.decode(tokens[begin:end])

    def turns(
        self, name: str, length_tokens: int, seed: int
    ) -> tuple[str, list[tuple[str | None, str]]]:
        """One context with several questions: (first prompt, [(question, answer), ...]).

        The first question is None, as the first prompt holds it. The next prompt is everything so
        far + ``</s><|user|>`` + question + ``<|assistant|>``.
        """
        rng = random.Random(f"turns-{name}-{length_tokens}-{seed}")
        tokens = self._sample(name, rng, length_tokens, several=True)
        first, *others = self._vocab.decode(tokens[1:]).split("</s>")[:-1]
        prompt, answer = first.split("<|assistant|>")
        turns: list[tuple[str | None, str]] = [(None, answer)]
        for turn in others:
            question, answer = turn.removeprefix("<|user|>").split("<|assistant|>")
            turns.append((question, answer))
        return prompt + "<|assistant|>", turns

    def text(self, length_tokens: int, seed: int) -> str:
        """Natural text of about ``length_tokens`` tokens, at most; no markers, nothing asked.

        Raises:
            ValueError: there is no text of that length.
        """
        rng = random.Random(f"text-{length_tokens}-{seed}")
        tokens, _ = self._filler.natural.slice(length_tokens - 1, rng)
        if len(tokens) == 0:
            raise ValueError(f"no natural text of {length_tokens} tokens")
        return self._vocab.decode(tokens)

    def _sample(self, name: str, rng: random.Random, length: int, several: bool) -> Tokens:
        numbered = re.fullmatch(r"(kv|vt)(\d+)", name)
        if numbered and numbered[1] == "kv":
            return self._kv(rng, length, several, int(numbered[2]))
        if numbered:
            return self._vt(rng, length, several, int(numbered[2]))
        tasks: dict[str, Callable[[random.Random, int, bool], Tokens]] = {
            "single": self._single,
            "multikey": self._multikey,
            "multikey32": self._multikey32,
            "dense": self._dense,
            "multivalue": self._multivalue,
            "multiquery": self._multiquery,
            "vt_list": self._vt_list,
            "copy": self._copy,
            "fwe": self._fwe,
            "qa": self._qa,
            "qa2": self._qa2,
        }
        if name not in tasks:
            raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
        return tasks[name](rng, length, several)

    # ------------------------------------------------------------------ assembling a sample

    def _sample_of(
        self,
        rng: random.Random,
        length: int,
        facts: Sequence[str] | Context,
        questions: Sequence[Question],
        ordered: bool = False,
    ) -> Tokens:
        """``<s>``, context and questions, at most ``length`` tokens.

        ``facts`` is what to weave into filler (``ordered``: in this order), or makes the context.
        """
        encode = self._vocab.encode
        turns: list[Tokens] = []
        for question, answer in questions:
            before = join([USER]) if turns else self._newline
            turns.append(join(before, encode(question), [ASSISTANT], encode(answer), [EOS]))
        has_preface = length > 120 and rng.random() < 0.3
        preface = rng.choice(PREFACES) + "\n" if has_preface else ""
        head = join([BOS, USER], encode(preface))
        budget = length - len(head) - sum(map(len, turns))
        context = facts(budget) if callable(facts) else self._weave(rng, budget, facts, ordered)
        return join(head, context, *turns)

    def _weave(
        self, rng: random.Random, budget: int, facts: Sequence[str], ordered: bool
    ) -> Tokens:
        """Spread the facts over filler so that everything fits in ``budget`` tokens."""
        inline = [self._vocab.encode(" " + fact) for fact in facts]
        own_line = [self._vocab.encode("\n" + fact) for fact in facts]
        need = sum(max(len(a), len(b)) for a, b in zip(inline, own_line, strict=True)) + 2
        filler, cuts = self._filler.draw(budget - need, rng)
        if len(filler) == 0:  # the facts alone, one per line or in one paragraph
            separator = "\n" if rng.random() < 0.6 else " "
            return self._vocab.encode(separator.join(facts))
        positions: list[int] = []
        for _ in facts:
            depth = rng.random() * len(filler)
            cut = int(np.searchsorted(cuts, depth))
            position = int(cuts[cut]) if cut < len(cuts) else int(cuts[-1])
            if (cut == 0 and rng.random() < 0.5) or depth < 8:
                position = 0
            positions.append(position)
        if ordered:
            positions.sort()
        parts: list[Tokens] = []
        first: list[str] = []
        last = 0
        for i in sorted(range(len(facts)), key=positions.__getitem__):
            position = positions[i]
            if position == 0:
                first.append(facts[i])
                continue
            parts.append(filler[last:position])
            last = position
            at_line_end = position < len(filler) and filler[position] == self._vocab.newline
            parts.append(own_line[i] if at_line_end and rng.random() < 0.5 else inline[i])
        parts.append(filler[last:])
        if first:
            separator = " " if rng.random() < 0.5 else "\n"
            parts.insert(0, self._vocab.encode(separator.join(first) + "\n"))
        return join(*parts)

    def _around(self, rng: random.Random, budget: int, block: Tokens) -> Tokens:
        """Filler before and after a block."""
        before = int(budget * rng.random())
        filler, _ = self._filler.draw(before, rng)
        parts = [filler, self._newline, block] if len(filler) else [block]
        filler, _ = self._filler.draw(budget - before, rng)
        if len(filler):
            parts += [self._newline, filler]
        return join(*parts)

    @staticmethod
    def _num_questions(rng: random.Random, length: int, several: bool, available: int) -> int:
        if not several:
            return 1
        counts = (1, 1, 2, 3, 4, 6, 8, 12) if length < 1000 else (1, 2, 4, 6, 8, 12, 16)
        return min(available, rng.choice(counts))

    # ------------------------------------------------------------------ needles

    def _single(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """One needle."""
        plain = not several
        needle = NEEDLES[0] if plain or rng.random() < 0.5 else rng.choice(NEEDLES)
        e, v = entity(rng, needle.kind), value(rng, only_numbers=plain)
        facts = [needle.statement.format(e=e, v=v)]
        return self._sample_of(rng, length, facts, [(needle.question.format(e=e), v)])

    def _multikey32(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """33 needles of all forms, also several attributes of one entity, values also words."""
        return self._keys(rng, length, several, count=33, plain=False)

    def _multikey(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """Some needles of one form, one of them asked."""
        return self._keys(rng, length, several, count=None, plain=not several)

    def _keys(
        self, rng: random.Random, length: int, several: bool, count: int | None, plain: bool
    ) -> Tokens:
        if count is None:
            count = rng.randint(2, 40) if several else rng.randint(9, 16)
        count = min(max(2, (length - 50) // 26), count)
        if plain or rng.random() < 0.7:
            needle = NEEDLES[0] if plain or rng.random() < 0.4 else rng.choice(NEEDLES)
            items = [(needle, e) for e in entities(rng, needle.kind, count)]
        else:  # the same entities with several attributes
            kind = rng.choice(("name", "city", "pseudo"))
            names = entities(rng, kind, max(2, count // 2))
            items = []
            for _ in range(20 * count):
                if len(items) == count:
                    break
                item = (rng.choice(NEEDLES), rng.choice(names))
                if item not in items:
                    items.append(item)
        only_numbers = plain or rng.random() < 0.7
        values = [value(rng, only_numbers) for _ in items]
        facts = [n.statement.format(e=e, v=v) for (n, e), v in zip(items, values, strict=True)]
        available = len(items)
        asked = rng.sample(range(available), self._num_questions(rng, length, several, available))
        questions = [(items[i][0].question.format(e=items[i][1]), values[i]) for i in asked]
        return self._sample_of(rng, length, facts, questions)

    def _dense(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """Nothing but needles."""
        needle = rng.choice(NEEDLES)
        n = max(2, (length - 60) // 15)
        if several:
            n = rng.randint(max(2, int(n * 0.4)), n)
        names = entities(rng, needle.kind, n)
        values = [number(rng) for _ in names]
        asked = rng.sample(range(n), self._num_questions(rng, length, several, n))

        def context(budget: int) -> Tokens:
            facts = [needle.statement.format(e=e, v=v) for e, v in zip(names, values, strict=True)]
            lines = [self._vocab.encode("\n" + fact) for fact in facts]
            lines[0] = lines[0][1:]
            total = sum(map(len, lines))
            removable = [i for i in rng.sample(range(n), n) if i not in asked and i != 0]
            removed: set[int] = set()
            while total > budget and removable:
                removed.add(removable[-1])
                total -= len(lines[removable.pop()])
            return join(*(line for i, line in enumerate(lines) if i not in removed))

        questions = [(needle.question.format(e=names[i]), values[i]) for i in asked]
        return self._sample_of(rng, length, context, questions)

    def _multivalue(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """Keys with 1 to 4 values; all values of one are asked, in order of appearance."""
        needle = NEEDLES[0] if rng.random() < 0.5 else rng.choice(NEEDLES)
        left = max(2, (length - 60) // 28)
        num_keys = max(1, min(left // 2, rng.randint(1, 10)))
        names = entities(rng, needle.kind, num_keys)
        owners: list[str] = []
        for name in names:
            count = min(max(1, left), rng.randint(1, 4))
            left -= count
            owners += [name] * count
        rng.shuffle(owners)
        values = [number(rng) for _ in owners]
        facts = [needle.one_of.format(e=e, v=v) for e, v in zip(owners, values, strict=True)]
        asked = names[:1]
        if num_keys > 1:
            more = self._num_questions(rng, length, several, num_keys) - 1
            asked += rng.sample(names[1:], more)
        questions = []
        for name in asked:
            own = [v for e, v in zip(owners, values, strict=True) if e == name]
            questions.append((needle.question_all.format(e=name), ", ".join(own)))
        return self._sample_of(rng, length, facts, questions, ordered=True)

    def _multiquery(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """2 to 4 keys asked at once; the answer is ``A: n; B: m``."""
        needle = NEEDLES[0] if rng.random() < 0.5 else rng.choice(NEEDLES)
        n = rng.randint(2, 24) if several else rng.randint(8, 16)
        n = min(max(2, (length - 90) // 26), n)
        values = {e: number(rng) for e in entities(rng, needle.kind, n)}
        facts = [needle.statement.format(e=e, v=v) for e, v in values.items()]
        questions = []
        for _ in range(rng.choice((1, 1, 2)) if several and length > 400 else 1):
            asked = rng.sample(list(values), min(n, rng.randint(2, 4)))
            listed = ", ".join(asked[:-1]) + " and " + asked[-1]
            answer = "; ".join(f"{e}: {values[e]}" for e in asked)
            questions.append((needle.question.format(e=listed), answer))
        return self._sample_of(rng, length, facts, questions)

    # ------------------------------------------------------------------ key-value lists

    def _kv(self, rng: random.Random, length: int, several: bool, count: int) -> Tokens:
        """A list of ``count`` pairs somewhere in filler; one value asked."""
        hex_digits = rng.choice((6, 6, 8))
        draw: dict[str, Callable[[], str]] = {
            "hex": lambda: hexadecimal(rng, hex_digits),
            "num": lambda: number(rng),
            "word": lambda: rng.choice(NOUNS),
            "pair": lambda: word_pair(rng),
        }
        draw_key = draw[rng.choice(("hex", "hex", "pair", "num", "pair"))]
        draw_value = draw[rng.choice(("hex", "pair", "num", "word"))]
        count = min(max(2, (length - 50) // 20), count)
        pairs: dict[str, str] = {}
        while len(pairs) < count:
            drawn = draw_value()  # before the key
            pairs[draw_key()] = drawn
        asked = rng.sample(list(pairs), self._num_questions(rng, length, several, count))
        value_of = 'What is the value of "{k}"?'
        form = rng.choice((value_of, value_of, 'Find the value for the key "{k}".'))
        style = rng.random()

        def render(keys: Sequence[str]) -> Tokens:
            if style < 0.65:
                text = "{\n" + ",\n".join(f'"{k}": "{pairs[k]}"' for k in keys) + "\n}"
            elif style < 0.85:
                text = "{" + ", ".join(f'"{k}": "{pairs[k]}"' for k in keys) + "}"
            else:
                text = "\n".join(f"{k} = {pairs[k]}" for k in keys)
            return self._vocab.encode(text)

        def context(budget: int) -> Tokens:
            keys = list(pairs)
            block = render(keys)
            while len(block) > budget and len(keys) > 2:
                surplus = max(1, int(len(keys) * (1 - budget / len(block))) + 1)
                removed = [k for k in keys if k not in asked][:surplus]
                if not removed:
                    break
                keys = [k for k in keys if k not in removed]
                block = render(keys)
            left = budget - len(block) - 2
            if left > 60 and (not several or rng.random() < 0.85):
                return self._around(rng, left, block)
            return block

        questions = [(form.format(k=k), pairs[k]) for k in asked]
        return self._sample_of(rng, length, context, questions)

    # ------------------------------------------------------------------ variable tracking

    def _chains(
        self, rng: random.Random, length: int, several: bool, hops: int | None
    ) -> tuple[list[tuple[str, list[str]]], list[str]]:
        """Chains as (value, variables), and the assignments in order of appearance."""
        most = max(2, (length - 60) // 12)
        if hops is None:
            hops = rng.choice((0, 1, 1, 2, 2, 3, 3, 4)) if several else rng.choice((2, 3))
        num_chains = max(1, min(rng.randint(1, 7), most // (hops + 1)))
        if most < hops + 1:
            hops = most - 1
        used: set[str] = set()
        letters = rng.random() < 0.7

        def variable() -> str:
            while True:
                name = pseudo_word(rng) if not letters else "".join(
                    rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(3)
                )  # fmt: skip
                if name not in used:
                    used.add(name)
                    return name

        chains: list[tuple[str, list[str]]] = []
        for chain in range(num_chains):
            own_hops = hops if chain == 0 or rng.random() < 0.5 else rng.randint(0, max(hops, 1))
            chains.append((number(rng), [variable() for _ in range(own_hops + 1)]))
        statements: list[str] = []  # interleaved, in order inside a chain
        done = [0] * num_chains
        while open_chains := [i for i, (_, v) in enumerate(chains) if done[i] < len(v)]:
            chain = rng.choice(open_chains)
            first_value, variables = chains[chain]
            k = done[chain]
            right = first_value if k == 0 else variables[k - 1]
            statements.append(f"VAR {variables[k]} = {right}.")
            done[chain] += 1
        return chains, statements

    def _vt(self, rng: random.Random, length: int, several: bool, hops: int) -> Tokens:
        """Follow a chain of assignments; the answer spells it: ``C = B = A = 48213``."""
        chains, statements = self._chains(rng, length, several, hops)
        asked = [0]
        if len(chains) > 1:
            more = self._num_questions(rng, length, several, len(chains)) - 1
            asked += rng.sample(range(1, len(chains)), min(len(chains) - 1, more))
        questions = []
        for chain in asked:
            first_value, variables = chains[chain]
            from_end = not several or rng.random() < 0.6
            k = len(variables) - 1 if from_end else rng.randrange(len(variables))
            answer = " = ".join([*variables[k::-1], first_value])
            questions.append((f"What is the value of VAR {variables[k]}?", answer))
        return self._sample_of(rng, length, statements, questions, ordered=True)

    def _vt_list(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """All variables with a value, as in RULER. The bundled model has not learned it."""
        chains, statements = self._chains(rng, length, several, None)
        first_value, variables = chains[0]
        question = (f"Which variables have the value {first_value}?", ", ".join(variables))
        return self._sample_of(rng, length, statements, [question], ordered=True)

    # ------------------------------------------------------------------ passages and words

    def _copy(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """Repeat one of several titled passages word by word."""
        n = max(1, min((length - 80) // 140, rng.randint(2, 14)))
        longest = min(90, max(24, (length - 60) // 2 - 30))
        titles: dict[str, None] = {}
        while len(titles) < n:
            titles.setdefault(word_pair(rng, " "))
        passages: list[str] = []
        while len(passages) < n:
            line = self._filler.natural.line(rng)
            if len(line) <= longest:
                passages.append(self._vocab.decode(line))
        titled = dict(zip(titles, passages, strict=True))
        num_asked = min(n, rng.choice((1, 1, 2, 3))) if several and length > 700 else 1
        asked = [list(titled)[i] for i in rng.sample(range(n), num_asked)]

        def context(budget: int) -> Tokens:
            blocks = [self._vocab.encode(f"Passage about {t}: {p}") for t, p in titled.items()]
            left = budget - sum(map(len, blocks)) - 2 * n - 2
            cuts = [0.0, *sorted(rng.random() for _ in range(n)), 1.0]
            shares = np.diff(cuts)
            if several and rng.random() >= 0.8:
                shares = np.zeros(n + 1)
            parts: list[Tokens] = []
            for i in range(n + 1):
                filler, _ = self._filler.draw(int(left * shares[i]) if left > 60 else 0, rng)
                if len(filler):
                    parts += [filler, self._newline]
                if i < n:
                    parts += [blocks[i], self._newline]
            return join(*parts[:-1])

        questions = [(f"Repeat the passage about {title}.", titled[title]) for title in asked]
        return self._sample_of(rng, length, context, questions)

    def _fwe(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """The most frequent word of a list."""
        n = rng.randint(3, 8)
        if rng.random() < 0.6:
            words = rng.sample(NOUNS, n)
        else:
            words = list(dict.fromkeys([pseudo_word(rng) for _ in range(n)]))
            n = len(words)
        longest = max(8, min(300, (length - 60) // 4))
        top = max(3, rng.randint(3, max(3, longest // n * 2)))
        counts = [top] + [rng.randint(1, max(1, int(top * 0.55))) for _ in range(n - 1)]
        listed = [w for w, count in zip(words, counts, strict=True) for _ in range(count)]
        rng.shuffle(listed)

        def count_words() -> dict[str, int]:
            return {w: listed.count(w) for w in dict.fromkeys(listed)}

        while len(self._vocab.encode(", ".join(listed))) > length - 60 and len(listed) > 6:
            listed = listed[::2]  # keeps the proportions, but may tie
            count = count_words()
            best = max(count, key=count.__getitem__)
            tied = [w for w in count if count[w] == count[best]]
            if len(tied) > 1:
                listed = [w for w in listed if w not in tied] + [best] * count[best]

        def context(budget: int) -> Tokens:
            block = self._vocab.encode("Word list: " + ", ".join(listed) + ".")
            left = budget - len(block) - 2
            if left < 60 or (several and rng.random() < 0.2):
                return block
            return self._around(rng, left, block)

        count = count_words()
        question = "Which word appears most often in the word list?"
        return self._sample_of(
            rng, length, context, [(question, max(count, key=count.__getitem__))]
        )

    # ------------------------------------------------------------------ stories

    def _story(
        self, rng: random.Random, length: int
    ) -> tuple[list[str], list[Question], list[Question]]:
        """Events, the questions of one hop and the questions of two hops about how they end."""
        num_events = min(max(4, (length - 60) // 11), rng.randint(4, 30))
        people = rng.sample(NAMES, rng.randint(2, 8))
        objects = [f"{rng.choice(COLORS)} {o}" for o in rng.sample(OBJECTS, rng.randint(1, 6))]
        where: dict[str, str] = {}
        has: dict[str, str] = {}
        events: list[str] = []
        for _ in range(num_events):
            person, kind = rng.choice(people), rng.random()
            free = [o for o in objects if o not in has]
            own = [o for o, owner in has.items() if owner == person]
            if kind < 0.55 or not (free or own):
                place = rng.choice([p for p in PLACES if p != where.get(person)])
                where[person] = place
                verb = rng.choice(("went to", "moved to", "walked to"))
                events.append(f"{person} {verb} the {place}.")
            elif free and (kind < 0.8 or not own):
                thing = rng.choice(free)
                has[thing] = person
                events.append(f"{person} {rng.choice(('picked up', 'took'))} the {thing}.")
            else:
                thing = rng.choice(own)
                has[thing] = rng.choice([p for p in people if p != person])
                events.append(f"{person} gave the {thing} to {has[thing]}.")
        if not where:
            where[people[0]] = rng.choice(PLACES)
            events.append(f"{people[0]} went to the {where[people[0]]}.")
        one_hop = [(f"Where is {p}?", place) for p, place in where.items()]
        one_hop += [(f"Who has the {o}?", p) for o, p in has.items()]
        two_hops = [
            (f"Where is the {o}?", f"{p} has it in the {where[p]}")
            for o, p in has.items()
            if p in where
        ]
        return events, one_hop, two_hops

    def _qa(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """Where somebody is, who has something; the last state counts."""
        events, questions, _ = self._story(rng, length)
        return self._asked(rng, length, several, events, questions)

    def _qa2(self, rng: random.Random, length: int, several: bool) -> Tokens:
        """Who has something, and where."""
        for _ in range(20):
            events, one_hop, two_hops = self._story(rng, length)
            if two_hops:
                break
        return self._asked(rng, length, several, events, two_hops or one_hop)

    def _asked(
        self,
        rng: random.Random,
        length: int,
        several: bool,
        events: list[str],
        questions: list[Question],
    ) -> Tokens:
        rng.shuffle(questions)
        count = self._num_questions(rng, length, several, len(questions))
        return self._sample_of(rng, length, events, questions[:count], ordered=True)
