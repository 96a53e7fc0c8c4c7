# SPDX-License-Identifier: Apache-2.0
"""Kept keys against the scores of kvpress, where it is installed.

https://pypi.org/project/kvpress 0.5.5 wants an older transformers than vLLM 0.26 brings, so it is
not among the test dependencies. Its hooks fail with the newer one; its scores can be called. To
run this file:

    pip install --no-deps --target DIR kvpress datasets pyarrow pandas dill multiprocess xxhash \\
        pytz tzdata python-dateutil cachetools fire termcolor
    PYTHONPATH=DIR:. python -m pytest tests/policies/test_kvpress.py

Left out: its Ada-KV protects the top keys of each head instead of blending budgets, and its
Expected Attention takes queries before RoPE.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcompress_vllm.config.options import KVCompressConfig
from tests.policies import literal, prompts
from tests.policies.test_parity import assert_same_choice

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed")
pytest.importorskip("transformers")

LENGTH = 400
AVERAGE = {"policy_options": {"pooling": "average"}, "window": 32, "pool": 5}


def scores(press: Any, a: literal.Attention) -> torch.Tensor:
    """``[L, H, S]``, layer by layer as kvpress computes them."""
    layers, heads, group = a.probabilities.shape[:3]
    module = SimpleNamespace(
        config=SimpleNamespace(num_attention_heads=heads * group, num_key_value_heads=heads)
    )
    return torch.cat([
        press.score(
            module, torch.empty(1, a.length, 1), a.keys[layer][None], a.values[layer][None],
            a.probabilities[layer].flatten(0, 1)[None], {},
        )
        for layer in range(layers)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("press", "options"),
    [
        (kvpress.SnapKVPress(0.5, window_size=32, kernel_size=5), {"policy": "snapkv", **AVERAGE}),
        (kvpress.TOVAPress(0.5), {"policy": "tova", "pool": 1}),
        (kvpress.KeyDiffPress(0.5), {"policy": "keydiff", "pool": 1}),
        (kvpress.KnormPress(0.5), {"policy": "knorm"}),
        # All queries: a window as long as the prompt.
        (
            kvpress.ObservedAttentionPress(0.5),
            {"policy": "mean_attention", "window": 512, "pool": 1},
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)
@pytest.mark.parametrize("task", ["single", "kv40"])
def test_same_keys(press: Any, options: dict[str, Any], task: str) -> None:
    a = prompts.real_prompt(task, LENGTH)
    config = KVCompressConfig.from_dict({**options, "ratio": 4})
    s = prompts.setting(config, a.length)
    theirs = scores(press, a)[..., : s.candidates(a.length)]
    (kept,) = prompts.compress(config, [a])
    wanted = literal.kept_keys(a, s, theirs, "uniform")
    assert_same_choice(kept, wanted, theirs.flatten(0, 1))


def test_same_pyramid() -> None:
    """Layer budgets of kvpress, in tokens with the window; ours in blocks, rounded."""
    length, ratio, window = 4000, 4, 32
    config = prompts.config("pyramidkv", ratio=ratio, window=window, sinks=0)
    a = SimpleNamespace(length=length, keys=torch.empty(12, 1, 0, 0))
    s = prompts.setting(config, length)
    press = kvpress.PyramidKVPress(1 - s.open_budget(length) / length, window_size=window)
    theirs = [
        press.get_layer_budget(
            SimpleNamespace(config=SimpleNamespace(num_hidden_layers=12), layer_idx=layer), length
        )
        for layer in range(12)
    ]
    ours = literal.pyramidkv_layers(a, s)
    assert max(abs(x - y) for x, y in zip(ours, theirs, strict=True)) <= 0.5
