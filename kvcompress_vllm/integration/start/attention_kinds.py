# SPDX-License-Identifier: Apache-2.0
"""What kind of attention a model has, from its configuration alone: nothing is built or loaded.

Each function answers a :class:`~kvcompress_vllm.integration.start.refusals.Refusal`: False, or a
text that goes on after the model's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

logger = init_logger("vllm.kv_compress")

_FULL = ("full_attention", "attention")
"""Kinds of layers that attend to everything, as configurations spell them."""
_ALIBI = ("bloom", "mpt", "step1")
_LOCAL = ("sliding", "chunked")
"""In the names of kinds of layers that see the latest tokens only."""


def layers_without_attention(config: VllmConfig) -> bool | str:
    """Mamba, linear attention and other layers with a state in the place of keys."""
    model = config.model_config
    if model.is_attention_free:
        return "has no attention"
    if not model.is_hybrid:
        return False
    kinds = _layer_kinds(config)
    others = [index for index, kind in enumerate(kinds) if kind not in _FULL]
    if kinds and not others:
        return False  # built from a hybrid's code, such as Granite 4 dense
    return f"has {_listed(others, kinds)}" if kinds else "is one"


def local(config: VllmConfig) -> bool | str:
    """Layers that attend to the latest tokens only, with a window or in chunks, where they cannot
    be left to vLLM beside others with full attention."""
    model, kinds = config.model_config, _layer_kinds(config)
    window = config.cache_config.sliding_window or model.get_sliding_window()
    others = [index for index, kind in enumerate(kinds) if kind not in _FULL]
    if window is None and all("sliding" in kinds[index] for index in others):
        return False  # vLLM builds them without one
    in_all = len(others) == len(kinds)
    if not others or (in_all and all("sliding" in kind for kind in kinds)):
        return (
            f"has a window of {window} tokens in every layer, and max_model_len is "
            f"{model.max_model_len}; --max-model-len {window} or --disable-sliding-window, which "
            "caps it, serves it with full attention"
        )
    text = f"has {_listed(others, kinds)}"
    if window is not None:
        text += f" with a window of {window} tokens"
    if in_all or not all(any(word in kinds[index] for word in _LOCAL) for index in others):
        return text
    groups = _full_groups(kinds)
    if groups > 1:
        return (
            f"{text} beside {len(kinds) - len(others)} with full attention, of which vLLM makes "
            f"{groups} KV cache groups; one group can be compressed"
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        return (
            f"{text}, and vLLM's hybrid KV cache manager is off, without which they keep all "
            "tokens; leave out --disable-hybrid-kv-cache-manager"
        )
    return False


def has_local(config: VllmConfig) -> bool:
    """Whether layers with a window or chunks stand beside those that are compressed."""
    return any(kind not in _FULL for kind in _layer_kinds(config))


def _full_groups(kinds: Sequence[str]) -> int:
    """How many groups vLLM makes of the layers with full attention: each has as many layers as the
    fewest that are alike, or as the most, if these are less than half as many again."""
    counts = Counter("full" if kind in _FULL else kind for kind in kinds).values()
    fewest, most = min(counts), max(counts)
    size = most if most < 1.5 * fewest else fewest
    return -(-sum(kind in _FULL for kind in kinds) // size)


def drop_idle_window(config: VllmConfig) -> None:
    """Have vLLM build full attention where no request can outgrow the window of all layers.

    Only where every layer has it: where some do, vLLM may tell by it which layers rotate keys.
    """
    model, cache = config.model_config, config.cache_config
    window = model.get_sliding_window()
    if window is None or window < model.max_model_len or len(set(_layer_kinds(config))) > 1:
        return
    logger.info(
        "kv_compress: no request outgrows the sliding window of %d tokens at max_model_len %d: "
        "layers are built with full attention",
        window,
        model.max_model_len,
    )
    model.hf_text_config.sliding_window = None
    cache.sliding_window = None


def alibi(config: VllmConfig) -> bool | str:
    """Scores that fall with the distance."""
    text = config.model_config.hf_text_config
    wanted = text.model_type in _ALIBI or getattr(text, "alibi", False)
    return "has it in every layer" if wanted else False


def sink_keys(config: VllmConfig) -> bool | str:
    """Learnt keys and values before the prompt (openPangu). Learnt logits, which belong to no key
    (gpt-oss), are no such thing: the kernels know them."""
    count = getattr(config.model_config.hf_text_config, "param_sink_number", None)
    return f"has {count} (param_sink_number)" if count else False


def not_causal(config: VllmConfig) -> bool | str:
    """Prefixes, or images, whose tokens see each other in both directions."""
    model = config.model_config
    if model.is_mm_prefix_lm:
        return "lets the tokens of an image see each other"
    return "reads its prompt so" if model.hf_text_config.model_type == "hrm_text" else False


def full_layers(config: VllmConfig) -> list[int]:
    """Indexes of the layers that attend to everything, which are those that are compressed."""
    kinds = _layer_kinds(config)
    if not kinds:
        return list(range(config.model_config.get_total_num_hidden_layers()))
    return [index for index, kind in enumerate(kinds) if kind in _FULL]


def _layer_kinds(config: VllmConfig) -> Sequence[str]:
    """One word per layer, empty where the configuration does not tell."""
    text: Any = config.model_config.hf_text_config
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(text, name, None)
        if kinds:
            return [str(kind) for kind in kinds]
    return ()


def _listed(indices: Sequence[int], kinds: Sequence[str]) -> str:
    """``2 of 4 layers (0-1) of sliding_attention``."""
    starts = [b for a, b in pairwise([-2, *indices]) if b != a + 1]
    ends = [a for a, b in pairwise([*indices, len(kinds) + 1]) if b != a + 1]
    ranges = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    shown = ", ".join(ranges[:6]) + (", ..." if len(ranges) > 6 else "")
    names = ", ".join(dict.fromkeys(kinds[index] for index in indices))
    return f"{len(indices)} of {len(kinds)} layers ({shown}) of {names}"
