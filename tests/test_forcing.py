# SPDX-License-Identifier: Apache-2.0
"""Tokens that an engine is made to generate, on both of vLLM's runners, without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality  # noqa: E402

from benchmarks.quality.forcing import KEY, ForcedTokens, attach  # noqa: E402


def params(*tokens: int) -> SamplingParams:
    return SamplingParams(extra_args={KEY: list(tokens)} if tokens else None)


def update(**changes: Any) -> BatchUpdate:
    return BatchUpdate(**{"batch_size": 3, "removed": [], "added": [], "moved": []} | changes)


def test_runner_v1_has_one_choice_until_the_tokens_are_generated() -> None:
    processors: list[Any] = []
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(logitsprocs=SimpleNamespace(non_argmax_invariant=processors))
    )
    attach(runner)
    (processor,) = processors
    assert isinstance(processor, ForcedTokens) and not processor.is_argmax_invariant()
    long, short, free = [], [7], []  # outputs so far; one came back after a preemption
    processor.update_state(update(added=[(0, params(5, 0, 6), [1], long),
                                         (1, params(7, 2), [1], short),
                                         (2, params(), [1], free)]))  # fmt: skip
    logits = torch.zeros(3, 8)
    logits[:, 3] = 1
    logits[0, 5] = float("-inf")  # as an end of text before min_tokens

    def step() -> list[int]:
        return processor.apply(logits.clone()).argmax(dim=1).tolist()

    assert step() == [5, 2, 3]
    for output in (long, short, free):
        output.append(-1)  # not read yet: asynchronous scheduling
    assert step() == [0, 3, 3]
    long.append(-1)
    processor.update_state(update(moved=[(0, 2, MoveDirectionality.SWAP)]))
    assert step() == [3, 3, 6]
    processor.update_state(update(removed=[2]))
    assert step() == [3, 3, 3]


class Sampler:
    """What is wrapped of runner V2's."""

    def __init__(self) -> None:
        self.added: list[tuple[int, int]] = []

    def add_request(self, row: int, prompt_len: int, params: Any) -> None:
        self.added.append((row, prompt_len))

    def sample(
        self, logits: Any, rows: Any, rows_np: Any, positions: Any, flag: int, *, more: int
    ) -> tuple[Any, Any]:
        assert (flag, more) == (1, 2)
        return logits.argmax(dim=1), logits


def test_runner_v2_samples_the_tokens_at_their_positions() -> None:
    sampler = Sampler()
    attach(SimpleNamespace(sampler=sampler, req_states=None, max_num_reqs=4, max_model_len=20,
                           device="cpu"))  # fmt: skip
    sampler.add_request(2, 10, params(5, 0, 6))
    sampler.add_request(0, 4, params())
    assert sampler.added == [(2, 10), (0, 4)]
    logits = torch.zeros(2, 8)
    logits[:, 3] = 1

    def step(rows: list[int], positions: list[int]) -> list[int]:
        sampled, processed = sampler.sample(
            logits, torch.tensor(rows, dtype=torch.int32), None, torch.tensor(positions), 1, more=2
        )
        assert processed is logits
        return sampled.tolist()

    # The position of the token that was read; its row's place in the batch may change.
    assert step([2, 0], [9, 3]) == [5, 3]
    assert step([0, 2], [4, 10]) == [3, 0]
    assert step([2, 0], [11, 5]) == [6, 3]
    assert step([2, 0], [12, 19]) == [3, 3]
    sampler.add_request(2, 4, params(1))  # another request in the same row
    assert step([2, 0], [9, 3]) == [3, 3] and step([2, 0], [3, 3]) == [1, 3]
