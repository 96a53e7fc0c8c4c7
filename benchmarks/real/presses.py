# SPDX-License-Identifier: Apache-2.0
"""The same samples through kvpress (https://github.com/NVIDIA/kvpress), question hidden.

Its own pipeline, token by token: the context is read with a press, which compresses it, then every
question is asked over what is left. Answers are judged as the study judges its own. Each press is
as kvpress has it: its shields, pools and allocation, key by key; it keeps as many keys of a context
as the engine keeps at that ratio, what no page holds included. Presses that choose per head (KVzip,
AdaKV) leave the keys in place and hide them from the question, as kvpress does.

kvpress 0.5.5 wants transformers below 5.3. Newer ones call the cache otherwise, which
:func:`_told` bridges.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real.masks import Shields, count
from benchmarks.real.samples import Sample
from benchmarks.real.study import HIDDEN, continuations

UNUSED = {"datasets": "load_dataset", "fire": "Fire"}
"""What presses that are not used here import, and a name that they take from it."""
PRESSES: dict[str, Callable[[Any, float], Any]] = {
    "kvzip": lambda k, r: k.KVzipPress(r),
    "kvzip_plus": lambda k, r: k.KVzipPress(r, kvzip_plus_normalization=True),
    "compactor": lambda k, r: k.CompactorPress(r),
    "keydiff": lambda k, r: k.KeyDiffPress(r),
    "snapkv": lambda k, r: k.SnapKVPress(r),
    "adakv": lambda k, r: k.AdaKVPress(k.SnapKVPress(r)),
    "expected_attention": lambda k, r: k.ExpectedAttentionPress(r),
    # Its leaderboard's best that reads a context once.
    "adakv_expected_attention": lambda k, r: k.AdaKVPress(
        k.ExpectedAttentionPress(r, epsilon=1e-2)
    ),
    "streaming": lambda k, r: k.StreamingLLMPress(r),
    "random": lambda k, r: k.RandomPress(r, seed=0),
}
"""By name, of the module ``kvpress`` and the share of keys that goes."""
FULL = "full"


def load() -> Any:
    """The module ``kvpress``.

    Raises:
        SystemExit: it is not installed.
    """
    for name, attribute in UNUSED.items():
        try:
            __import__(name)
        except ImportError:
            stub = types.ModuleType(name)
            setattr(stub, attribute, None)
            sys.modules[name] = stub
    try:
        import kvpress
    except ImportError as error:
        raise SystemExit(f"{error}; pip install --no-deps kvpress==0.5.5 cachetools") from error
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    return kvpress


def removed(length: int, ratio: float) -> float:
    """The share of a context's keys with which kvpress keeps as many as the engine does."""
    counts = count(length, ratio, Shields())
    held = counts.kept * counts.page + length - counts.candidates
    # kvpress rounds down; half a key more keeps rounding errors out of it.
    return 1 - (held + 0.5) / length


def _told(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook`` of a press, told of the cache by the names that it knows."""

    def forward_hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        cache = kwargs.get("past_key_values")
        cache = kwargs.get("cache") if cache is None else cache
        seen = cache.layers[module.layer_idx].keys.shape[-2]
        told = {"past_key_values": cache, "cache_position": torch.tensor([seen - 1])}
        return hook(module, args, {**kwargs, **told}, output)

    return forward_hook


class Asker:
    """A checkpoint directory of ``transformers`` behind kvpress's pipeline.

    Args:
        dtype: of weights and activations.
    """

    def __init__(self, directory: Path, device: str, dtype: torch.dtype) -> None:
        self.kvpress = load()
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as noise

        noise.disable_progress_bar()
        # Renamed arguments, once per call.
        warnings.filterwarnings("ignore", category=FutureWarning)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
        self._place = tempfile.TemporaryDirectory()
        # KVzip reads the chat template and takes what stands before the context for a prefix that
        # it does not score. Contexts here are plain text.
        place = Path(self._place.name)
        for path in Path(directory).glob("*token*.json"):
            shutil.copy(path, place)
        settings = place / "tokenizer_config.json"
        plain = json.loads(settings.read_text())
        plain.pop("chat_template", None)
        settings.write_text(json.dumps(plain))
        (place / "config.json").write_text((Path(directory) / "config.json").read_text())
        self.model.config.name_or_path = self.model.config._name_or_path = self._place.name
        tokenizer = AutoTokenizer.from_pretrained(place)

        class Judge(self.kvpress.KVPressTextGenerationPipeline):  # type: ignore[misc, name-defined]
            """The pipeline, with answers that are given instead of decoded."""

            answers: list[list[int]]

            def generate_answer(
                self, question_ids: Tensor, cache: Any, context_length: int, max_new_tokens: int
            ) -> tuple[bool, float]:
                answer = torch.tensor([self.answers.pop(0)], device=question_ids.device)
                steps = [torch.cat([question_ids, answer[:, :-1]], 1)]
                lengths = [cache.get_seq_length(i) for i in range(len(cache))]
                try:
                    logits = self.read(steps, cache, context_length)
                except ValueError:
                    # No key is orthogonal to so many queries at once: as the pipeline does, then.
                    self._remove_answer_from_cache(cache, lengths)
                    steps = [question_ids, *answer[:, :-1].split(1, 1)]
                    logits = self.read(steps, cache, context_length)
                logits = logits[-answer.shape[1] :]
                chosen = logits.float().log_softmax(-1).gather(1, answer.T)
                return bool((logits.argmax(-1) == answer[0]).all()), float(chosen.sum())

            def read(self, steps: Sequence[Tensor], cache: Any, position: int) -> Tensor:
                """``[T, V]`` logits of all tokens."""
                found = []
                for tokens in steps:
                    end = position + tokens.shape[1]
                    places = torch.arange(position, end, device=tokens.device)[None]
                    out = self.model(input_ids=tokens, past_key_values=cache, position_ids=places)
                    found.append(out.logits[0])
                    position = end
                return torch.cat(found)

        self._pipeline = Judge(model=self.model, tokenizer=tokenizer, device=device)

    def press(self, name: str, share: float) -> Any:
        """A press that removes this share of the keys."""
        press = PRESSES[name](self.kvpress, share)
        press.forward_hook = _told(press.forward_hook)
        return press

    def ask(
        self, context: Sequence[int], asked: Sequence[tuple[list[int], list[int]]], press: Any
    ) -> list[tuple[bool, float]]:
        """Per question and answer, whether greedy decoding over what ``press`` keeps of the context
        gives exactly the answer, and the answer's log likelihood in nats; None: all."""
        self._pipeline.answers = [answer for _, answer in asked]
        torch.manual_seed(0)  # Compactor's sketch.
        tensors = {
            "context_ids": torch.tensor([context]),
            "questions_ids": [torch.tensor([question]) for question, _ in asked],
        }
        with torch.inference_mode():
            found: list[tuple[bool, float]] = self._pipeline._forward(tensors, press=press)
        return found


def lines(
    asker: Asker, sample: Sample, presses: Sequence[str], ratios: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Result lines of one sample, the full cache's first."""
    given = continuations(sample)
    settings = [(FULL, 1.0), *((name, ratio) for ratio in ratios for name in presses)]
    for name, ratio in settings:
        press = None if name == FULL else asker.press(name, removed(sample.length, ratio))
        found = asker.ask(sample.context, given, press)
        line: dict[str, Any] = {
            "mode": HIDDEN, "source": sample.source, "length": sample.length, "seed": sample.seed,
            "policy": name if name == FULL else f"kvpress {name}", "ratio": ratio, "page": 1,
            "recent": 0, "floor": 0, "min_budget": 0, "page_dtype": "auto",
        }  # fmt: skip
        if sample.questions:
            line["tasks"] = {
                question.task: [int(right), round(likelihood, 3)]
                for question, (right, likelihood) in zip(sample.questions, found, strict=True)
            }
        else:
            line["nats"] = round(-found[0][1] / len(given[0][1]), 5)
        yield line
