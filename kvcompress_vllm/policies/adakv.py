# SPDX-License-Identifier: Apache-2.0
"""Ada-KV: SnapKV's scores; the heads of a layer share its budget by where its top keys are.

https://arxiv.org/abs/2407.11550 (Feng et al., NeurIPS 2025). All layers get the same. In a layer,
head h gets c_h, its number of keys among the layer's ``H * b`` highest scores (b: budget of a head
beyond the window), blended with the equal share as a safeguard: ``(1 - alpha) c_h + alpha b``.
This is allocator ``layer``; with ``uniform`` it is SnapKV.

Paper and code: alpha = 0.2 is the code's default; scores and pooling as in its SnapKV variant, with
the group averaged before pooling. kvpress' variant of the safeguard protects the top ``alpha b``
of each head and lets the rest compete instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompress_vllm.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV with head budgets that follow the scores, at least ``alpha`` of the average each."""

    own_shares = ("adakv",)
    defaults = replace(SnapKV.defaults, allocator="layer")
