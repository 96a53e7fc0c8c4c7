# SPDX-License-Identifier: Apache-2.0
"""Echo: what the prompt would pay to each key if it were read again.

Ours, after KVzip (https://arxiv.org/abs/2505.23416, Kim et al., 2025), which has the model repeat
its context and keeps the keys that the repetition attends to. The query of a repeated token is, up
to what the model makes of the repetition, the query of its first reading, rotated by the distance
between the two; so the attention of the repetition is known from the prefill alone, for about a
hundredth of its cost (``ops.echo_scores``, written when the keys are computed and stored beside
them). It needs no question, and tells a key that any part of the prompt needs from one that none
does. A key that is attended to changes an answer by as much as its value is long: echo scores count
times the norm of the value, over the mean norm of the keys that are up for choice
(``value_norms``).

Where the end of the prompt asks for something, that counts as well: the score of a key is the
higher of its echo and of the highest probability that one of the last ``window`` queries pays to
it, max-pooled and times ``weight``: at one half, what is asked for still comes first, and what the
last queries pay to everything does not (``norm`` L2 squares it instead). Echo itself is not pooled:
on real models that costs answers (docs/quality.md).

Of a context that was repeated in fact (``exact=kvzip``) the scores are KVzip's, as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import choice, flag, number, option
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class Echo(Policy):
    """The repetition's attention, or that of the last queries pooled over ``pool`` keys."""

    value_norms: bool = option(
        True, "echo scores times the norms of values, over their mean", *flag()
    )
    norm: str = option(
        "L1", "squared (L2) or plain (L1) probabilities of the last queries", *choice("L2", "L1")
    )
    weight: float = option(0.5, "factor on what the last queries pay; 0: echo alone", *number(0, 1))

    defaults = Defaults("global", window=8, pool=15, recent=16)

    def __post_init__(self) -> None:
        window = (ops.MAXIMUM,) if self.weight else ()
        norms = (ops.VALUE_NORM,) if self.value_norms else ()
        object.__setattr__(self, "channels", (*window, *norms, ops.ECHO))

    def score(self, evidence: Evidence) -> Tensor:
        scores = evidence.statistics[ops.ECHO]
        if evidence.replayed:
            return scores
        if self.value_norms:
            scores = scores * _relative(evidence, evidence.statistics[ops.VALUE_NORM])
        if not self.weight:
            return scores
        window = evidence.statistics[ops.MAXIMUM]
        if self.norm == "L2":
            window = window.square()
        return torch.maximum(scores, self.pooled(evidence, window) * self.weight)


def _relative(evidence: Evidence, norms: Tensor) -> Tensor:
    """Norms ``[L * H, n]`` over their mean over all heads' keys without shield."""
    shielded = evidence.shielded().expand_as(norms)
    mean = norms.masked_fill(shielded, 0).sum() / (~shielded).sum().clamp(min=1)
    # Without any length, all norms are zero.
    return norms / mean.clamp(min=torch.finfo(norms.dtype).tiny)
