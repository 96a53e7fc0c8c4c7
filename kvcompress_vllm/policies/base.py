# SPDX-License-Identifier: Apache-2.0
"""What a policy is, and what it may look at. Letters as in ``cache/layout.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d


@dataclass(frozen=True)
class Evidence:
    """What is known of one request's candidate keys when it is compressed.

    All its heads have n columns, the whole blocks of its tokens; column j is the candidate key of
    position j. The tokens after them (fewer than a block) are the tail, which is kept anyway. A
    head that was packed before has fewer candidates, in token order, in the last of its columns;
    ``absent`` marks the others, whose statistics are zero and whose scores nobody reads.
    """

    layers: int
    """L."""
    heads: int
    """H, KV heads of a layer on this rank."""
    group: int
    """G, query heads per KV head."""
    num_keys: int
    """n, candidate keys of each head."""
    num_kept: int
    """Candidate keys that a head keeps on average, C * B."""
    seq_len: int
    """Tokens whose K/V is in the cache: n and the tail."""
    num_queries: int
    """Observed queries: the last ones of the request, or of all its queries those looked at."""
    num_sinks: int
    """First candidates, kept whatever their score."""
    num_recent: int
    """Last candidates, kept whatever their score."""
    scale: float
    """Factor on the logits."""
    device: torch.device
    statistics: Mapping[int, Tensor] = field(default_factory=dict)
    """``[L * H, n]`` fp32 by channel of the statistics ops, those that the policy names."""
    counts: Tensor | None = None
    """``[L * H, n]`` fp32, how many observed queries saw each candidate, where that is counted."""
    density: float = 1.0
    """Candidates per token that they were chosen from: less than 1 once a head was packed."""
    absent: Tensor | None = None
    """``[L * H, n]`` bool, columns without a key; None: every column has one."""
    replayed: bool = False
    """The echo scores are those of a real repetition of these keys, not foreseen."""
    keys: Callable[[int], Tensor] | None = None
    """Gathers ``[H, seq_len, D]``, the keys of one layer after RoPE, in the dtype of the cache;
    zeros where a head has none."""
    values: Callable[[int], Tensor] | None = None
    """Gathers ``[H, seq_len, D]``, the values of one layer."""
    queries: Callable[[int], Tensor] | None = None
    """Gathers ``[H, G, num_queries, D]``, the observed queries of one layer after RoPE."""

    @property
    def num_window(self) -> int:
        """Last candidates whose own queries are observed: not every observed query sees them."""
        return min(self.num_keys, max(0, self.num_queries - (self.seq_len - self.num_keys)))

    @property
    def num_open(self) -> int:
        """Candidates that no shield protects."""
        return max(0, self.num_keys - self.num_sinks - self.num_recent)

    @property
    def open_kept(self) -> int:
        """Candidates without shield that a head keeps on average; negative under a tight budget."""
        return self.num_kept - self.num_sinks - self.num_recent

    def first_columns(self) -> Tensor:
        """``[L * H, 1]`` or ``[1, 1]`` int64: the first column of each head that has a key."""
        if self.absent is None:
            return torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        return self.absent.sum(-1, keepdim=True)

    def shielded(self) -> Tensor:
        """``[L * H, n]`` or ``[1, n]`` bool: columns that scores do not decide about, absent ones
        included."""
        column = torch.arange(self.num_keys, device=self.device)
        sinks = column < self.first_columns() + self.num_sinks
        return sinks | (column >= self.num_keys - self.num_recent)

    def num_observations(self) -> Tensor:
        """``[n]`` or ``[L * H, n]`` fp32: how many of the observed queries see each candidate, at
        least 1."""
        if self.counts is not None:
            return self.counts.clamp(min=1)
        later = self.seq_len - torch.arange(self.num_keys, device=self.device)
        return later.clamp(1, max(1, self.num_queries)).float()


@dataclass(frozen=True)
class Defaults:
    """What a policy prefers where the user leaves ``auto``; None: the general default."""

    allocator: str | None = None
    window: int | None = None
    pool: int | None = None
    recent: int | None = None
    query_stride: int | None = None


@dataclass(frozen=True)
class Policy(ABC):
    """Scores the candidate keys of a request. One file per policy, one dataclass field per option.

    Instances hold options only, never anything of a request. ``policy_options`` may set the fields
    that are made with :func:`kvcompress_vllm.config.rules.option`.
    """

    pool: int = 1
    """Neighbouring tokens over which scores are pooled, odd; 1: none."""
    pooling: str = "max"
    """How :meth:`pooled` pools: ``max``, or ``average`` with zeros beyond the ends."""

    channels: ClassVar[tuple[int, ...]] = ()
    """Channels of ``ops.attention_statistics`` and ``ops.key_statistics`` that it reads; the others
    are not computed."""
    needs_keys: ClassVar[bool] = False
    """Whether it reads keys, values or queries themselves, beyond what channels tell: slower; a
    layer of them is copied."""
    observes_all: ClassVar[bool] = False
    """Judges by the queries of the whole prompt, every ``query_stride``-th of them, whose
    statistics are summed up chunk by chunk. At most three channels of the attention; those of the
    keys are taken once, at the compression."""
    history: ClassVar[int | None] = None
    """With ``observes_all``: only queries of so many tokens before the compression; None: all."""
    keeps_window: ClassVar[bool] = False
    """The observed window is kept whole: ``recent`` is raised to ``window``, and its keys do not
    take part in pooling, since not every observed query sees them."""
    additive: ClassVar[bool] = True
    """Scores do not depend on how much is kept, so that a sum of them is a mass, and a budget can
    be a share of it."""
    own_shares: ClassVar[tuple[str, ...]] = ()
    """Names of the shares of its paper (``policies/shares``), unless others are chosen; their
    options are its own."""
    defaults: ClassVar[Defaults] = Defaults()

    @abstractmethod
    def score(self, evidence: Evidence) -> Tensor:
        """``[L * H, n]`` fp32, finite; higher means keep. Shielded keys may have any score."""

    def worth(self, evidence: Evidence) -> Tensor | None:
        """``[L * H, n]`` fp32: what each key counts for in the loss curve, where that is not its
        score; None: its score."""
        return None

    def layer_shares(self, evidence: Evidence) -> Tensor | None:
        """``[L]`` weights >= 0 by which layers share the budget above the shields; None: equally.

        Used by the allocators ``layer`` and ``uniform``; ``global`` needs no shares.
        """
        return None

    def head_shares(self, evidence: Evidence, scores: Tensor) -> Tensor | None:
        """``[L, H]`` weights >= 0 by which the heads of each layer share its budget.

        Used by allocator ``layer``; None: its heads compete page by page.

        Args:
            scores: what :meth:`score` returned; see :meth:`Evidence.shielded`.
        """
        return None

    def pooled(self, evidence: Evidence, scores: Tensor) -> Tensor:
        """Spread scores ``[L * H, n]`` over neighbours, so that a token survives with its context.

        Where keys were dropped before, neighbours are further apart, and the width shrinks with
        their density. With ``keeps_window`` scores must be >= 0: the keys of the window count as 0.
        """
        width = 2 * int(self.pool * evidence.density / 2) + 1
        if evidence.absent is not None:
            nothing = 0.0 if self.keeps_window or self.pooling == "average" else float("-inf")
            scores = scores.masked_fill(evidence.absent, nothing)
        if self.keeps_window and evidence.num_window:
            scores = scores.clone()
            scores[:, evidence.num_keys - evidence.num_window :] = 0
        if width == 1:
            return scores
        pool = avg_pool1d if self.pooling == "average" else max_pool1d
        return pool(scores, width, stride=1, padding=width // 2)

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The fields that ``policy_options`` may set, by name; without those of its shares."""
        return {option.name: option for option in fields(cls) if "accepts" in option.metadata}
