# SPDX-License-Identifier: Apache-2.0
"""Questions that are read after their context was compressed."""

from __future__ import annotations

import re
from typing import Any

from vllm import SamplingParams


def answered(
    llm: Any, pairs: list[tuple[str, str]], protect: bool = False, around: int = 24, **extra: Any
) -> int:
    """How many of the ``single`` tasks are answered rightly, the question hidden.

    Args:
        pairs: (prompt, answer).
        protect: the ``around`` tokens before and after the needle are protected.
        extra: further things to ask of compression.
    """
    tokenizer = llm.get_tokenizer()
    prompts, params = [], []
    for prompt, answer in pairs:
        question = prompt.rindex("\n") + 1
        context, rest = (
            tokenizer.encode(prompt[:question]),
            tokenizer.encode(prompt[question:], add_special_tokens=False),
        )
        asked = {"kv_compress_context_tokens": len(context), **extra}
        if protect:
            match = re.search(rf"\b{re.escape(answer)}\b", prompt[:question])
            assert match is not None
            needle = len(tokenizer.encode(prompt[: match.start()]))
            asked["kv_compress_protect"] = f"{max(0, needle - around)}:{needle + around}"
        prompts.append({"prompt_token_ids": context + rest})
        tokens = len(tokenizer.encode(answer)) + 2
        params.append(SamplingParams(temperature=0, max_tokens=tokens, extra_args=asked))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    texts = [tokenizer.decode(o.outputs[0].token_ids, skip_special_tokens=True) for o in outputs]
    return sum(
        text.strip().startswith(answer) for text, (_, answer) in zip(texts, pairs, strict=True)
    )
