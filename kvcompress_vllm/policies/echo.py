# SPDX-License-Identifier: Apache-2.0
"""Echo: what the prompt would pay to each key if it were read again.

Ours, after KVzip (https://arxiv.org/abs/2505.23416, Kim et al., 2025), which has the model repeat
its context and keeps the keys that the repetition attends to. The query of a repeated token is, up
to what the model makes of the repetition, the query of its first reading, rotated by the distance
between the two; so the attention of the repetition is known from the prefill alone, for about a
hundredth of its cost (``ops.echo_scores``, written when the keys are computed and stored beside
them). It needs no question, and tells a key that any part of the prompt needs from one that none
does.

Where the end of the prompt asks for something, that counts as well: the score of a key is the
higher of its echo and of the highest probability that one of the last ``window`` queries pays to
it, times ``weight``, max-pooled. Both are probabilities. Echo itself is not pooled: on real models
that costs answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class Echo(Policy):
    """The repetition's attention, or that of the last queries pooled over ``pool`` keys."""

    weight: float = option(
        1.0,
        "factor on the probabilities of the last queries; 0: echo alone",
        *number(0, 1),
    )

    defaults = Defaults("global", window=8, pool=15, recent=16)

    def __post_init__(self) -> None:
        window = (ops.MAXIMUM,) if self.weight else ()
        object.__setattr__(self, "channels", (*window, ops.ECHO))

    def score(self, evidence: Evidence) -> Tensor:
        echo = evidence.statistics[ops.ECHO]
        if not self.weight:
            return echo
        window = self.pooled(evidence, evidence.statistics[ops.MAXIMUM])
        return torch.maximum(echo, window * self.weight)
