# SPDX-License-Identifier: Apache-2.0
"""PyramidKV: SnapKV's scores; early layers keep more than late ones.

https://arxiv.org/abs/2406.02069 (Cai et al., 2024). With b the average budget of a layer beyond the
window, the last layer gets ``b / beta`` and the first ``2 b - b / beta``; layers between them lie
on the line. Where the first layer has fewer keys than that, it keeps them all and the last gets ``2
b`` less that number, so the total stays. Heads of a layer are equal (allocator ``uniform``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompress_vllm.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with layer budgets falling linearly."""

    own_shares = ("pyramidkv",)
    # Late layers have room for few passages.
    defaults = replace(SnapKV.defaults, pool=31)
