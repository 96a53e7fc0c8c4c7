# SPDX-License-Identifier: Apache-2.0
"""What kind of attention a model has, from its configuration alone: nothing is built or loaded.

Each function answers a :class:`~kvcompress_vllm.integration.start.refusals.Refusal`: False, or a
text that goes on after the model's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from kvcompress_vllm.integration.compat.releases import vllm_places_layers

logger = init_logger("vllm.kv_compress")

COMPRESSED = "full_attention"
"""Of :func:`counted`: layers that attend to everything."""
_FULL = (COMPRESSED, "attention")
"""Kinds of layers that attend to everything, as configurations spell them."""
_ALIBI = ("bloom", "mpt", "step1")
_BOTH = ("hybrid",)
"""Kinds of layers that have a state as well (Falcon-H1)."""
_WITHOUT_CACHE = ("mlp", "moe")
"""Kinds of layers that keep nothing (Nemotron-H)."""
_LOCAL = ("sliding", "chunked")
"""In the names of kinds of layers that see the latest tokens only."""


def has_states(config: VllmConfig) -> bool:
    """Whether some layers keep a state in the place of keys: Mamba, linear attention,
    convolutions."""
    kinds = _layer_kinds(config)
    # Some are built from a hybrid's code without being one, such as Granite 4 dense.
    return config.model_config.is_hybrid and not (kinds and all(kind in _FULL for kind in kinds))


def states(config: VllmConfig) -> bool | str:
    """Layers with a state in the place of keys, where they cannot stand beside those that are
    compressed."""
    if config.model_config.is_attention_free:
        return "has no attention"
    if not has_states(config):
        return False
    kinds = _layer_kinds(config)
    own = (*_FULL, *_WITHOUT_CACHE)
    others = [index for index, kind in enumerate(kinds) if kind not in own]
    text = f"has {_listed(others, kinds)}" if kinds else "has such layers"
    if any(word in kind for kind in kinds for word in _LOCAL):
        return f"{text}, and windows beside states cannot be laid out"
    groups = _full_groups(kinds) if kinds else 1
    if groups > 1:
        return (
            f"{text} beside {len(full_layers(config))} with full attention, of which vLLM makes "
            f"{groups} KV cache groups; one group can be compressed"
        )
    problems = {
        "with prefix caching states are cached, too, block by block; give "
        "--no-enable-prefix-caching": config.cache_config.enable_prefix_caching,
        "states of drafted tokens are not rewound; leave out --speculative-config": (
            config.speculative_config is not None
        ),
        "this vLLM has them on model runner V1; leave out VLLM_USE_V2_MODEL_RUNNER": (
            config.use_v2_model_runner and not vllm_places_layers()
        ),
        "every stage would need a layout of its own; leave out --pipeline-parallel-size": (
            config.parallel_config.pipeline_parallel_size > 1
        ),
    }
    found = next((problem for problem, applies in problems.items() if applies), None)
    return False if found is None else f"{text}; {found}"


def local(config: VllmConfig) -> bool | str:
    """Layers that attend to the latest tokens only, with a window or in chunks, where they cannot
    be left to vLLM beside others with full attention."""
    model, kinds = config.model_config, _layer_kinds(config)
    if has_states(config):
        return False
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


def has_others(config: VllmConfig) -> bool:
    """Whether layers with a window, chunks or states stand beside those that are compressed."""
    return has_states(config) or any(kind not in _FULL for kind in _layer_kinds(config))


def counted(config: VllmConfig) -> dict[str, int]:
    """Layers of each kind that have a cache; those that are compressed are one kind, and those
    that also keep a state count as two."""
    text: Any = config.model_config.hf_text_config
    kinds = _layer_kinds(config)
    if getattr(text, "sliding_window", None) is None:  # vLLM builds them without one
        kinds = [COMPRESSED if "sliding" in kind else kind for kind in kinds]
    found = _counts(kinds)
    if not kinds:
        found[COMPRESSED] = config.model_config.get_total_num_hidden_layers()
        if config.model_config.is_hybrid:
            found["state"] = found[COMPRESSED]
    return found


def group_size(counts: Mapping[str, int]) -> int:
    """How many layers vLLM puts into a group: as many as the fewest that are alike, or as the most,
    if these are less than half as many again."""
    fewest, most = min(counts.values()), max(counts.values())
    return most if most < 1.5 * fewest else fewest


def _counts(kinds: Sequence[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for kind in kinds:
        if kind in (*_FULL, *_BOTH):
            found[COMPRESSED] += 1
        if kind not in (*_FULL, *_WITHOUT_CACHE):
            found["state" if kind in _BOTH else kind] += 1
    return found


def _full_groups(kinds: Sequence[str]) -> int:
    """How many groups vLLM makes of the layers with full attention."""
    counts = _counts(kinds)
    return -(-counts[COMPRESSED] // group_size(counts))


def keep_windows_everywhere(config: VllmConfig) -> None:
    """Have vLLM cache what layers with a window hold at every block. Newer releases do so where a
    prompt ends alone, which is behind a compression, where nothing is cached."""
    cache: Any = config.cache_config
    if getattr(cache, "prefix_cache_retention_interval", None) == 0 and has_others(config):
        cache.prefix_cache_retention_interval = None


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


def latent(config: VllmConfig) -> bool | str:
    """Multi-head latent attention: no keys of heads, but a latent of each token (decision 032)."""
    model = config.model_config
    if not model.use_mla:
        return False
    text: Any = model.hf_text_config
    size = getattr(text, "kv_lora_rank", 0) + getattr(text, "qk_rope_head_dim", 0)
    heads = getattr(text, "num_attention_heads", 0)
    return (
        f"keeps one latent of {size} numbers per token and layer for all {heads} heads, so that no "
        "head can keep less than another, and ours are kernels over keys and values of heads"
    )


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
    return [index for index, kind in enumerate(kinds) if kind in (*_FULL, *_BOTH)]


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
