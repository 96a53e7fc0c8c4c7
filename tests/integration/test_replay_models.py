# SPDX-License-Identifier: Apache-2.0
"""A real repetition in models with soft caps and learnt sinks, each in an engine of its own."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from kvcompress_vllm.scheduling import replay
from tests.integration.engines import engine
from tests.integration.simulation import MODEL
from tests.integration.test_models import KINDS, saved
from tests.integration.test_replay import OPTIONS, check_kept
from tests.integration.test_sharing_engine import answer, tokens


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_soft_caps_and_learnt_sinks_count_in_a_repetition(kind, tmp_path, monkeypatch) -> None:
    """Scores are the probabilities that ``transformers`` computes for the same tokens."""
    n, part = 160, 96
    monkeypatch.setattr(replay, "PART", part)
    name, changes = KINDS[kind]
    full = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2, "vocab_size": 4096}
    if kind == "gpt_oss":
        full["sliding_window"] = 4096  # no request outgrows it
    monkeypatch.setitem(KINDS, kind, (name, {**changes, **full}))
    model = saved(kind, tmp_path)
    context = tokens(1, n)
    repeat = AutoTokenizer.from_pretrained(MODEL).encode(replay.REPEAT, add_special_tokens=False)
    best = torch.zeros(2, 2, n)
    for begin in range(0, n, part):
        ids = torch.tensor([[*context, *repeat, *context[begin : begin + part]]])
        with torch.inference_mode():
            found = model(ids, output_attentions=True).attentions
        for layer, weights in enumerate(found):
            paid = weights[0, :, n:, :n].unflatten(0, (2, -1))
            best[layer] = torch.maximum(best[layer], paid.amax((1, 2)))
    with engine(
        OPTIONS,
        model=str(tmp_path),
        tokenizer=str(MODEL),
        max_model_len=512,
        max_num_seqs=4,
        enable_prefix_caching=True,
    ) as llm:
        llm.collective_rpc("kv_compress_record")
        answer(llm, [context + tokens(2, 30)], 2,
               kv_compress_context_tokens=n, kv_compress_exact="kvzip")  # fmt: skip
        ((kept,),) = (
            found.values() for found in llm.collective_rpc("kv_compress_record", args=(0,))
        )
        check_kept(llm, best.flatten(0, 1), kept)
