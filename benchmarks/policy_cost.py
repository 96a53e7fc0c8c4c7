# SPDX-License-Identifier: Apache-2.0
"""What each policy costs per compression: the statistics ops, and scores with allocation.

    python -m benchmarks.policy_cost                       # on the GPU, shape of Llama-3.1-8B
    python -m benchmarks.policy_cost --device cpu --layers 4 --tokens 2000

One prompt of random bf16 keys. Milliseconds are medians; those per 1,000 tokens are for all layers
of the shape. The first rows are the ops alone, by channels at window 8.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kvcompress_vllm import ops, policies
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression import allocation, gather, loss
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.policies import Evidence, judge
from kvcompress_vllm.records import budget
from kvcompress_vllm.records.group import CacheGroup

HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE, RATIO = 8, 4, 128, 16, 4


class Prompt:
    """A prompt in shuffled blocks."""

    def __init__(self, layers: int, tokens: int, device: torch.device) -> None:
        self.layers, self.tokens, self.device = layers, tokens, device
        self.blocks, count = tokens // BLOCK_SIZE, -(-tokens // BLOCK_SIZE)
        shape = ((count + 1) * layers * HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        self.pages = torch.empty(shape, device=device, dtype=torch.bfloat16).normal_()
        self.row = (torch.randperm(count) + 1).int().to(device)
        tables = torch.zeros(2, layers, HEADS, dtype=torch.int32, device=device)
        tables = (tables, tables, tables[:, 0, 0].contiguous(), None, 0)
        self.state = (self.ints(-1), *tables)

    def ints(self, value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int32, device=self.device)

    def ring(self, window: int) -> Tensor:
        shape = (self.layers, 1, window, HEADS * GROUP, HEAD_SIZE)
        return torch.empty(shape, device=self.device, dtype=torch.bfloat16).normal_().mul_(2)

    def statistics(self, ring: Tensor, channels: int) -> Tensor:
        """``[channels, pages, B]``, by the op that knows them or by both."""
        window = min(ring.shape[2], self.tokens)
        pages = (self.pages, self.row[None], self.ints(self.tokens), *self.state)
        candidates = (
            self.ints(self.blocks), self.ints(0).long(), self.blocks * self.layers * HEADS
        )  # fmt: skip
        parts = []
        if of_attention := channels & ops.ATTENTION_CHANNELS:
            parts.append(ops.attention_statistics(
                ring, *pages, self.ints(0), self.ints(window), *candidates, of_attention, 1,
                HEAD_SIZE**-0.5,
            ))  # fmt: skip
        if of_keys := channels & ops.KEY_CHANNELS:
            parts.append(ops.key_statistics(*pages, *candidates, of_keys))
        if channels & ops.STORED_CHANNELS:
            parts.append(torch.rand(1, candidates[-1], BLOCK_SIZE, device=self.device))
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.empty(0)

    def evidence(self, config: KVCompressConfig, ring: Tensor, channels: Tensor) -> Evidence:
        policy = config.create_policy()
        window = min(ring.shape[2], self.tokens)
        group = CacheGroup(self.layers, HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE, 2, HEAD_SIZE**-0.5)
        state = PackedState(
            group, num_blocks=1, state_slots=1, observe_slots=1, window=ring.shape[2],
            dtype=ring.dtype, device=self.device,
        )  # fmt: skip
        state.ring.copy_(ring)
        keys, values, queries = gather.readers(
            self.pages, self.row, self.tokens, state, 0, window, None
        )
        kept = resolve(config).packed_blocks(self.tokens, BLOCK_SIZE)
        return Evidence(
            layers=self.layers, heads=HEADS, group=GROUP, num_keys=self.blocks * BLOCK_SIZE,
            num_kept=kept * BLOCK_SIZE, seq_len=self.tokens, num_queries=window,
            num_sinks=config.sinks,
            num_recent=budget.num_recent(config.recent, self.tokens, self.blocks, BLOCK_SIZE),
            scale=HEAD_SIZE**-0.5, device=self.device, keys=keys, values=values, queries=queries,
            statistics={
                channel: part.view(self.layers * HEADS, -1)
                for channel, part in zip(sorted(policy.channels), channels, strict=True)
            },
        )  # fmt: skip


def milliseconds(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median, from an idle device until it is idle again."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[2:])


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--policies", default=",".join(policies.BUILT_IN))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    prompt = Prompt(arguments.layers, arguments.tokens, device)
    per_thousand = arguments.tokens / 1000

    def timed(step: Callable[[], object]) -> float:
        return milliseconds(step, device, arguments.repeats)

    ring = prompt.ring(8)
    print(f"{'channels at window 8':<50} {'ms':>8}")
    every = range(ops.ECHO)  # what is stored is not measured
    for channels in (*([c] for c in every), range(4), every[: ops.NORM], every[ops.NORM :]):
        mask = ops.channel_mask(channels)
        took = timed(lambda mask=mask: prompt.statistics(ring, mask))
        print(f"{' '.join(ops.CHANNELS[c] for c in channels):<50.50} {took:8.3f}", flush=True)

    print(
        f"\n{'policy':<20} {'window':>6} {'op, ms':>9} {'score, ms':>9} {'curve, ms':>9} "
        f"{'ms per 1,000':>12}"
    )
    for name in arguments.policies.split(","):
        config = KVCompressConfig.from_dict({"policy": name, "ratio": RATIO})
        policy, ring = config.create_policy(), prompt.ring(config.window)
        mask, floor = ops.channel_mask(policy.channels), resolve(config).floor_pages(BLOCK_SIZE)
        evidence = prompt.evidence(config, ring, prompt.statistics(ring, mask))
        kept = evidence.num_kept // BLOCK_SIZE

        def choose(
            config=config, policy=policy, evidence=evidence, floor=floor, kept=kept
        ) -> Tensor:
            scores = policy.score(evidence)
            shares = judge.shares(policy, evidence, scores, config.allocator)
            return allocation.freed_pages(
                [kept], config.allocator, shares, evidence, BLOCK_SIZE, floor, prompt.blocks
            )

        def curve(config=config, policy=policy, evidence=evidence, floor=floor, kept=kept) -> None:
            """The loss curve beside that: shares are asked for once for both."""
            points = loss.curve_points(prompt.blocks, floor, kept)
            scores = policy.score(evidence)
            shares = judge.shares(policy, evidence, scores, config.allocator)
            freed = allocation.freed_pages(
                points, config.allocator, shares, evidence, BLOCK_SIZE, floor, prompt.blocks
            )
            costs, masses = loss.page_masses(
                scores, evidence.shielded(), BLOCK_SIZE, policy.worth(evidence)
            )
            loss.loss_at(costs, masses, prompt.blocks, floor, freed)

        op = timed(lambda ring=ring, mask=mask: prompt.statistics(ring, mask)) if mask else 0.0
        score = timed(choose)
        lost = timed(curve) - score
        total = (op + score + lost) / per_thousand
        print(
            f"{name:<20} {config.window:>6} {op:9.3f} {score:9.3f} {lost:9.3f} {total:12.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
