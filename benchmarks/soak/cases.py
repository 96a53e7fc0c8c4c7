# SPDX-License-Identifier: Apache-2.0
"""What the soak asks: one request per number, the same for the same seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from kvcompress_vllm.scheduling.replay import ROOM

TOKENS = range(1000, 4000)
"""Plain words in the bundled vocabulary and in every larger one."""
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WORDS = [
    "the",
    "quiet",
    "river",
    "carried",
    "seven",
    "old",
    "boats",
    "past",
    "a",
    "stone",
    "bridge",
    "near",
    "Lisbon",
    "while",
]
NUM_PREFIXES = 8
MIN_CONTEXT = 128
"""The default of ``min_prompt_tokens``; the engine of a soak has no more."""


@dataclass(frozen=True)
class Case:
    """One request and how it should end.

    Attributes:
        kind: a name for the table.
        body: JSON, or bytes to be sent as they are.
        exact: tokens that each choice must have; None: at most ``max_tokens``.
        leaves: the client disconnects after so many chunks of the stream, or seconds without one.
        refused: None: it must be answered; else HTTP 4xx whose message contains this.
    """

    kind: str
    path: str
    body: dict[str, Any] | bytes
    exact: int | None = None
    leaves: float | None = None
    refused: str | None = None


class Cases:
    """The requests of one run.

    Args:
        seed: the same seed and number make the same request.
        max_model_len: tokens.
        compressing: whether the server compresses, and so knows our keys.
    """

    def __init__(self, seed: int, max_model_len: int, compressing: bool) -> None:
        self.seed = seed
        self.max_model_len = max_model_len
        self.compressing = compressing
        choice = random.Random(seed)
        lengths = [choice.randint(16, max_model_len // 2) for _ in range(NUM_PREFIXES)]
        self._prefixes = [choice.choices(TOKENS, k=length) for length in lengths]

    def case(self, number: int) -> Case:
        """Request ``number``."""
        choice = random.Random(self.seed * 1_000_003 + number)
        kind = choice.random()
        if kind < 0.08:
            return self._bad(choice)
        if self.compressing and kind < 0.11:
            return self._bad_wish(choice)
        if kind < 0.13:
            return self._longest(choice)
        if kind < 0.15:
            return self._structured(choice)
        if kind < 0.16:
            return self._beams(choice)
        return self._ordinary(choice)

    def prompt_tokens(self, case: Case) -> int:
        """About how many tokens of prompt a case has, 0 if it is refused."""
        if case.refused is not None or isinstance(case.body, bytes):
            return 0
        if "prompt" in case.body:
            return len(case.body["prompt"])
        return sum(len(message["content"].split()) * 2 for message in case.body["messages"])

    def _ordinary(self, choice: random.Random) -> Case:
        tokens = choice.choice([1, 8, 16, 16, 32, 32, 64, 128])
        if choice.random() < 0.02:
            tokens = min(400, self.max_model_len // 4)
        body: dict[str, Any] = {"model": "model", "max_tokens": tokens}
        room = self.max_model_len - tokens
        chat = choice.random() < 0.3
        if chat:
            # Two tokens per word and 200 for the template are more than any text here takes.
            words = choice.choices(WORDS, k=self._length(choice, max(1, room // 2 - 100)))
            body["messages"] = [{"role": "user", "content": " ".join(words)}]
        elif choice.random() < 0.4:
            prefix = choice.choice(self._prefixes)[:room]
            own = choice.choices(TOKENS, k=choice.randint(1, max(1, min(200, room - len(prefix)))))
            body["prompt"] = (prefix + own)[:room]
        else:
            body["prompt"] = choice.choices(TOKENS, k=self._length(choice, room))
        exact: int | None = tokens
        body["ignore_eos"] = True
        if choice.random() < 0.3:
            body["ignore_eos"], exact = False, None
        if choice.random() < 0.15:
            body["stop"], exact = choice.choice([["e"], "a", ["qu", "the "]]), None
        if choice.random() < 0.15:
            body["n"] = 2
        if choice.random() < 0.15:
            body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
        if choice.random() < 0.1:
            body |= {"min_tokens": min(4, tokens), "repetition_penalty": 1.1}
        if choice.random() < 0.1:
            body |= {"presence_penalty": 0.5, "frequency_penalty": 0.5}
        if choice.random() < 0.1:
            body["priority"] = 0
        body["temperature"] = choice.choice([0, 0.7, 1]) if "n" not in body else 1
        if choice.random() < 0.2:
            body["seed"] = choice.randint(0, 99)
        kind = "chat" if chat else "completion"
        if choice.random() < 0.4:
            wish = self._wish(choice)
            if "kv_compress_context_tokens" in wish:
                wish = self._context(choice, body)
            if self.compressing:
                body["vllm_xargs"] = wish
            kind += ", own budget" if wish.get("kv_compress", 1) else ", opted out"
        leaves = None
        if choice.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            kind += ", streamed"
            if choice.random() < 0.2:
                leaves = choice.randint(0, 8)
        elif choice.random() < 0.1:
            leaves = choice.choice([0.01, 0.1, 1.0])
        if leaves is not None:
            kind = f"disconnected ({'in the stream' if 'stream' in body else 'waiting'})"
        return Case(kind, CHAT if chat else COMPLETIONS, body, exact, leaves)

    def _length(self, choice: random.Random, longest: int) -> int:
        """From 1 on, every order of magnitude alike."""
        return max(1, min(longest, int(longest ** choice.uniform(0, 1.02))))

    def _wish(self, choice: random.Random) -> dict[str, Any]:
        return choice.choice(
            [
                {"kv_compress": False},
                {"kv_compress": True},
                {"kv_compress_ratio": choice.choice([1, 1.5, 2, 16, 1000])},
                {"kv_compress_budget_tokens": choice.choice([1, 64, 300, 10**6])},
                {"kv_compress_protect": "0:64,100:180", "kv_compress_ratio": 16},
                {"kv_compress_context_tokens": None},
                {"kv_compress_policy": choice.choice(["snapkv", "tova", "streaming"])},
            ]
        )

    def _context(self, choice: random.Random, body: dict[str, Any]) -> dict[str, Any]:
        """A context within a prompt of known length that is long enough to be compressed."""
        length = len(body.get("prompt", ()))
        if length < MIN_CONTEXT:
            return {}
        return {"kv_compress_context_tokens": choice.randint(MIN_CONTEXT, length)}

    def _longest(self, choice: random.Random) -> Case:
        """A prompt that leaves room for one token, or none for more than the model has."""
        prompt = choice.choices(TOKENS, k=self.max_model_len - 1)
        body = {"model": "model", "prompt": prompt, "max_tokens": 1, "ignore_eos": True}
        return Case("longest prompt", COMPLETIONS, body, exact=1)

    def _structured(self, choice: random.Random) -> Case:
        prompt = choice.choices(TOKENS, k=self._length(choice, self.max_model_len - 64))
        body = {"model": "model", "prompt": prompt, "max_tokens": 32}
        body["structured_outputs"] = choice.choice(
            [{"choice": ["red", "green"]}, {"regex": "[0-9]{3}"}]
        )
        return Case("structured output", COMPLETIONS, body)

    def _beams(self, choice: random.Random) -> Case:
        prompt = choice.choices(TOKENS, k=self._length(choice, self.max_model_len // 2))
        body = {"model": "model", "prompt": prompt, "max_tokens": 4, "use_beam_search": True,
                "n": 2, "temperature": 0, "ignore_eos": True}  # fmt: skip
        return Case("beam search", COMPLETIONS, body)

    def _bad_wish(self, choice: random.Random) -> Case:
        key, value = choice.choice(
            [
                ("kv_compress_ratio", 0.5),
                ("kv_compress_ratio", "8"),
                ("kv_compress_ratio", 10**30),
                ("kv_compress_budget_tokens", -1),
                ("kv_compress_budget_tokens", 2**40),
                ("kv_compress_budget_tokens", [64]),
                ("kv_compress_policy", "best"),
                ("kv_compress_context_tokens", 0),
                ("kv_compress_context_tokens", 10**6),
                ("kv_compress_ratio", True),
                ("kvcompress_ratio", 2),
                ("kv_compress_protect", "9:3"),
                ("kv_compress", "no"),
                ("kv_compress_window", 3),
            ]
        )
        body: dict[str, Any] = {"model": "model", "max_tokens": 4, "vllm_xargs": {key: value}}
        body["stream"] = choice.random() < 0.5
        if choice.random() < 0.5:
            body["messages"] = [{"role": "user", "content": "hello"}]
            return Case("bad vllm_xargs", CHAT, body, refused=key)
        body["prompt"] = choice.choices(TOKENS, k=200)
        return Case("bad vllm_xargs", COMPLETIONS, body, refused=key)

    def _bad(self, choice: random.Random) -> Case:
        prompt = choice.choices(TOKENS, k=50)
        good = {"model": "model", "prompt": prompt, "max_tokens": 4}
        # Not among them: a JSON list, to which vLLM 0.26 itself answers with HTTP 500.
        body, refused = choice.choice(
            [
                (b"{", ""),
                (b"\xff\xfe", ""),
                (json.dumps(good).encode()[:-9], ""),
                ({"model": "model", "max_tokens": 4}, "prompt"),
                (good | {"prompt": []}, ""),
                (good | {"prompt": choice.choices(TOKENS, k=self.max_model_len + 1)}, "length"),
                (good | {"prompt": [10**9]}, "vocab"),
                (good | {"model": "another"}, "another"),
                (good | {"temperature": -1}, "temperature"),
                (good | {"temperature": "hot"}, "temperature"),
                (good | {"max_tokens": -5}, "max_tokens"),
                (good | {"n": 0}, "n"),
                (good | {"top_p": 7}, "top_p"),
                (good | {"logprobs": 10**6}, "logprobs"),
                (good | {"stop": {"a": 1}}, "stop"),
                (good | {"vllm_xargs": "kv_compress"}, "vllm_xargs"),
                (good | {"structured_outputs": {"regex": "("}}, ""),
                (good | {"stream_options": {"include_usage": True}}, "stream"),
            ]
        )
        return Case("bad body", COMPLETIONS, body, refused=refused)


class SharedCases:
    """Requests about few documents, most of which name theirs as their context; others leave it to
    the server's stride, chat, or opt out. Some clients leave.

    Args:
        documents: how many there are.
        seed, max_model_len, compressing: as of :class:`Cases`.
    """

    def __init__(self, documents: int, seed: int, max_model_len: int, compressing: bool) -> None:
        self.seed, self.compressing = seed, compressing
        choice = random.Random(seed)
        most = max_model_len - max(_QUESTION + _ANSWER, ROOM)
        self._documents = [
            choice.choices(TOKENS, k=choice.randint(most // 4, most)) for _ in range(documents)
        ]

    def case(self, number: int) -> Case:
        """Request ``number``."""
        choice = random.Random(self.seed * 1_000_003 + number)
        rank = int(choice.paretovariate(1)) - 1  # the first ones are asked about most
        document = self._documents[min(rank, len(self._documents) - 1)]
        tokens = choice.choice([1, 8, 32, _ANSWER])
        body: dict[str, Any] = {
            "model": "model",
            "prompt": [*document, *choice.choices(TOKENS, k=choice.randint(1, _QUESTION))],
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        kind = "on a document"
        if self.compressing:
            kind, asked = choice.choice(_ASKED)
            named = {
                "kv_compress_context_tokens": choice.choice(
                    [len(document), min(150, len(document))]
                )
            }
            body["vllm_xargs"] = asked if "stride" in kind or "opted" in kind else asked | named
        leaves = None
        if choice.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            leaves = choice.randint(0, 6) if choice.random() < 0.2 else None
        return Case(kind, COMPLETIONS, body, tokens, leaves)

    def prompt_tokens(self, case: Case) -> int:
        """How many tokens of prompt a case has."""
        assert isinstance(case.body, dict)
        return len(case.body["prompt"])


_QUESTION, _ANSWER = 80, 100
_ASKED: list[tuple[str, dict[str, Any]]] = [
    ("on a context", {}),
    ("on a context", {}),
    ("on a context, own budget", {"kv_compress_ratio": 4}),
    ("on a context, protected", {"kv_compress_protect": "0:40"}),
    ("on a context, own policy", {"kv_compress_policy": "snapkv"}),
    ("on a context, repeated", {"kv_compress_exact": "kvzip"}),
    ("with a stride", {"kv_compress_context_stride": 256}),
    ("with a stride, own policy",
     {"kv_compress_context_stride": 256, "kv_compress_policy": "diverse"}),
    ("opted out", {"kv_compress": False}),
]  # fmt: skip
