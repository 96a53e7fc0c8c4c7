# SPDX-License-Identifier: Apache-2.0
"""Memory that compressions take while they run; set aside beside the KV cache."""

from __future__ import annotations

from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.cache.state import ACCUMULATED
from kvcompress_vllm.compression import loss
from kvcompress_vllm.compression.batch import MOST_TOKENS
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.policies.base import Policy
from kvcompress_vllm.records.group import CacheGroup


def usable_policies(config: KVCompressConfig) -> list[Policy]:
    """The configured policy, and those that requests may choose instead."""
    found = []
    for name in config.allowed_policies():
        try:
            found.append(config.with_policy(name).create_policy())
        except ValueError:
            continue  # nobody can choose it: the front end refuses with the same error
    return found


def scratch_bytes(
    policy: Policy, num_tokens: int, group: CacheGroup, accumulated: bool = False
) -> int:
    """Memory that a compression takes while it runs.

    Args:
        num_tokens: tokens of the longest request.
    """
    # Per candidate key: its statistics, then its score and the policy's temporaries; or the
    # statistics once more, while those of two ops are put together.
    count = len(policy.channels)
    per_key = 4 * (count + max(5, count))
    if accumulated:
        per_key += 3 * 4 * ACCUMULATED  # the statistics so far, their sums, and an intermediate
    keys = max(num_tokens, MOST_TOKENS) * group.pages_per_block
    # One layer of keys or values, as copied, in fp32, and an intermediate of it.
    # Of codes both, as numbers, and two intermediates of these.
    copied = 3 if group.page_format is PageFormat.AUTO else 3 + 2 * 3
    copies = copied * num_tokens * group.heads * group.head_size * 4 if policy.needs_keys else 0
    return keys * per_key + loss.scratch_bytes(keys) + copies
