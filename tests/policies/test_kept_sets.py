# SPDX-License-Identifier: Apache-2.0
"""Which keys every policy kept when they were recorded: what moves code about must not move these.

    python -m tests.policies.test_kept_sets     records them anew, after a change that is meant to

``kept_sets.json`` holds, by scene and policy, a hexadecimal number per (layer, head), whose bit j
says whether key j is kept. Scenes: the bundled model's prompt with its question, ``visible``, and
without, ``hidden``; random keys that grow and are compressed ``again``.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompress_vllm import policies
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.config.options import KVCompressConfig
from tests.policies import literal, prompts
from tests.policies.test_again import config_of, grow
from tests.test_compressor import SLOTS, Paged

RECORD = Path(__file__).with_name("kept_sets.json")
QUESTION = 40
"""Tokens at the end of the prompt that ``hidden`` leaves out."""

Kept = list[list[int]]


def _visible(policy: str) -> Kept:
    config = KVCompressConfig.from_dict({"policy": policy, "ratio": 4, "query_stride": 0})
    return prompts.compress(config, [prompts.real_prompt("single", 400)])[0]


def _hidden(policy: str) -> Kept:
    whole = prompts.real_prompt("single", 400)
    n = whole.length - QUESTION
    context = literal.Attention(
        whole.keys[:, :, :n],
        whole.values[:, :, :n],
        whole.queries[..., :n, :],
        whole.probabilities[..., :n, :n],
    )
    config = KVCompressConfig.from_dict({"policy": policy, "ratio": 4, "query_stride": 0})
    return prompts.compress(config, [context])[0]


def _again(policy: str) -> Kept:
    torch.manual_seed(7)
    paged = Paged(config_of(policy, "auto"))
    kept: Kept = [[] for _ in range(SLOTS)]
    for num_new, blocks in [(333, 6), (90, 5), (250, 7)]:
        paged.compressor.record = {}
        paged.compress(grow(paged, num_new), blocks)
        kept = [keys.tolist() for keys in paged.compressor.record["r"]]
    return kept


SCENES = {"visible": _visible, "hidden": _hidden, "again": _again}


@cache
def recorded() -> dict[str, dict[str, list[str]]]:
    return json.loads(RECORD.read_text())


@pytest.mark.parametrize("policy", policies.BUILT_IN)
@pytest.mark.parametrize("scene", SCENES)
def test_kept_keys_are_those_on_record(scene: str, policy: str) -> None:
    torch.set_num_threads(1)
    kept, wanted = SCENES[scene](policy), recorded()[scene][policy]
    sets = [sum(1 << j for j in keys) for keys in kept]
    before = [int(bits, 16) for bits in wanted]
    # Another processor may round otherwise, and then break ties otherwise.
    assert [len(keys) for keys in kept] == [bits.bit_count() for bits in before]
    swapped = sum((now & ~then).bit_count() for now, then in zip(sets, before, strict=True))
    assert swapped <= 0.01 * sum(map(len, kept)), f"{swapped} other keys"


@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_pytorchs_default_dtype_does_not_matter(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM leaves the model's dtype as PyTorch's default when a model fails to load."""
    stock = Compressor.run

    def run(self: Compressor, *args: Any, **kwargs: Any) -> Any:
        torch.set_default_dtype(torch.bfloat16)
        try:
            return stock(self, *args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float32)

    wanted = _again(policy)
    monkeypatch.setattr(Compressor, "run", run)
    assert _again(policy) == wanted


def record() -> None:
    torch.set_num_threads(1)
    sets = {
        scene: {
            policy: [f"{sum(1 << j for j in keys):x}" for keys in run(policy)]
            for policy in policies.BUILT_IN
        }
        for scene, run in SCENES.items()
    }
    RECORD.write_text(json.dumps(sets, indent=0) + "\n")


if __name__ == "__main__":
    record()
