# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: the first tokens (attention sinks) and the most recent ones.

https://arxiv.org/abs/2309.17453 (Xiao et al., ICLR 2024). Sinks are the shield ``sinks`` that all
policies share; the score is the position. It observes nothing and serves as a control.

Paper and code: keys keep the positions they had in the prompt instead of being renumbered inside
the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class Streaming(Policy):
    """Later keys first. Neither ``window`` nor ``pool`` matters."""

    defaults = Defaults("uniform", window=1, pool=1)

    def score(self, evidence: Evidence) -> Tensor:
        positions = torch.arange(evidence.num_keys, dtype=torch.float32, device=evidence.device)
        return positions.expand(evidence.layers * evidence.heads, -1)
