# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that a GGUF file describes: GPT-2's byte-level BPE, or SentencePiece's BPE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as kinds_of_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""GGUF's ``tokenizer.ggml.token_type``."""
_SPACE = "\u2581"


def tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer with its special tokens and chat template.

    Args:
        fields: what the file says of itself, by GGUF's keys.
    """
    from transformers import PreTrainedTokenizerFast

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    inner = {"gpt2": byte_level, "llama": sentencepiece}[fields["tokenizer.ggml.model"]](fields)
    inner.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    special = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None:
            special[f"{ours}_token"] = tokens[index]
    if fields.get("tokenizer.ggml.add_bos_token"):
        bos = special["bos_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, fields["tokenizer.ggml.bos_token_id"])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def byte_level(fields: dict[str, Any]) -> Tokenizer:
    """GPT-2's; ``smollm`` reads digits one by one."""
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    result = Tokenizer(kinds_of_models.BPE(vocab=vocabulary, merges=merges))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if fields.get("tokenizer.ggml.pre") == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    result.pre_tokenizer = pre_tokenizers.Sequence(steps)
    result.decoder = decoders.ByteLevel()
    return result


def sentencepiece(fields: dict[str, Any]) -> Tokenizer:
    """SentencePiece's, with byte fallback. GGUF has no merges of it; they are any two tokens whose
    concatenation is a token, those of the highest score first."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = fields["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind not in (NORMAL, USER_DEFINED):
            continue
        # Those that a user defined go first, whatever GGUF writes as their score.
        rank = 0.0 if kind == USER_DEFINED else -scores[index]
        for cut in range(1, len(token)):
            if token[:cut] in ids and token[cut:] in ids:
                ranked.append((rank, index, ids[token[:cut]], cut))
    ranked.sort()
    merges = [(tokens[left], tokens[index][cut:]) for _, index, left, cut in ranked]
    result = Tokenizer(
        kinds_of_models.BPE(
            vocab=ids,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        )
    )
    result.normalizer = normalizers.Replace(" ", _SPACE)
    result.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    result.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return result
