# SPDX-License-Identifier: Apache-2.0
"""A context that is generated, and compressed on the way as the engine compresses generations.

Whenever what is held exceeds the budget by :data:`INTERVAL` pages per head, the keys compete again:
those that are left and the new ones. What a score knows of old keys is stored when they come, or is
what the latest queries pay to them. The tokens are given, so all policies read the same text, each
over its own keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.real import scores
from benchmarks.real.calibration import Table
from benchmarks.real.formats import AUTO, FORMATS, Format
from benchmarks.real.masks import Shields, count, keep, open_keys
from benchmarks.real.model import Model

INTERVAL = 8
"""Pages per head above the budget at which the engine compresses."""


@dataclass
class View:
    """What a policy sees when it is asked; B contexts. Lengths: n tokens so far."""

    model: Model
    keys: Tensor  # [B, L, H, n, D]
    values: Tensor
    queries: Tensor  # [B, L, H, G, n, D]
    present: Tensor  # [B, L, H, n]
    begin: int
    """Tokens at the compression before."""
    ratio: float
    shields: Shields
    tables: Mapping[str, Table] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)
    """Per policy, kept from round to round; ``[B, L, H, whole length]``."""

    @property
    def length(self) -> int:
        """n."""
        return self.keys.shape[-2]

    @property
    def open(self) -> Tensor:
        """``[n]``: candidates that no shield covers."""
        return open_keys(self.length, self.shields, self.keys.device)

    def echo(self, segment: int, delta: float) -> Tensor:
        """Segments score their keys once, when they are complete; the last at the compression."""
        stored = self.stored.setdefault(
            "echo", torch.zeros(*self.keys.shape[:-1], device=self.keys.device)
        )
        if stored.shape[-1] < self.length:
            stored = torch.nn.functional.pad(stored, (0, self.length - stored.shape[-1]))
        first = self.begin // segment * segment
        stored[..., first:] = torch.stack(
            [
                scores.echo(
                    self.keys[:, i, :, first:], self.queries[:, i, :, :, first:],
                    self.model.rotate, self.model.scale, segment, delta,
                    sinks=self.keys[:, i, :, : scores.SINKS],
                )
                for i in range(self.keys.shape[1])
            ],
            1,
        )  # fmt: skip
        self.stored["echo"] = stored
        return stored

    def valued(self, score: Tensor) -> Tensor:
        """Times the norms of values / their mean over what was read."""
        norm = self.values.float().norm(dim=-1)
        return score * norm / norm.mean((1, 2, 3), keepdim=True)

    def window(self, size: int, how: str) -> Tensor:
        """What the last ``size`` tokens pay to the keys that are there."""
        p = scores.probabilities(
            self.keys, self.queries[..., -size:, :], self.model.scale, self.present
        )
        if how == "max":
            return p.amax((-2, -3))
        return p.square().sum((-2, -3)) if how == "squares" else p.mean((-2, -3))

    def highest(self, name: str, score: Tensor) -> Tensor:
        """The highest that a key ever had."""
        before = self.stored.get(name)
        if before is not None:
            score[..., : before.shape[-1]] = torch.maximum(score[..., : before.shape[-1]], before)
        self.stored[name] = score
        return score

    def pooled(self, score: Tensor, width: int) -> Tensor:
        """By positions: among few survivors, few neighbours."""
        return scores.pooled(score.masked_fill(~self.present, 0), width)

    def diverse(self, pool: int) -> Tensor:
        """As ``diverse`` of a prompt."""
        counts = count(self.length, self.ratio, self.shields)
        wanted = counts.kept * counts.page - self.shields.sinks - counts.recent
        unlike = self.pooled(scores.keydiff(self.keys, self.present) + 2, 7)
        unlike = unlike.masked_fill(~(self.open & self.present), -torch.inf)
        chosen = torch.zeros_like(unlike, dtype=torch.bool)
        chosen.scatter_(-1, unlike.topk(max(1, int(0.5 * wanted)), -1).indices, True)
        return self.pooled(self.window(8, "squares"), pool) + 1e6 * chosen

    def tri(self) -> Tensor:
        """TriAttention with centres over all queries so far."""
        place = torch.arange(self.length, device=self.keys.device)
        return scores.triattention(
            self.keys, self.queries, self.model.rotate, place, self.length, self.model.scale,
            self.present,
        )  # fmt: skip

    def redundancy(self) -> Tensor:
        """R-KV."""
        important = self.pooled(self.window(8, "mean"), 7)
        layers = range(self.keys.shape[1])
        return torch.stack(
            [
                scores.redundancy(self.keys[:, i], important[:, i], present=self.present[:, i])
                for i in layers
            ],
            1,
        )

    def chance(self) -> Tensor:
        """Random."""
        generator = torch.Generator().manual_seed(self.length)
        return torch.rand(self.keys.shape[:-1], generator=generator).to(self.keys.device)

    def order(self) -> Tensor:
        """The latest."""
        place = torch.arange(self.length, device=self.keys.device).float()
        return place.expand(self.keys.shape[:-1])


class Policy(NamedTuple):
    """Scores ``[B, L, H, n]``, and who competes."""

    score: Callable[[View], Tensor]
    allocator: str = "global"


def _echo_or(segment: int, delta: float, other: Callable[[View], Tensor]) -> Policy:
    return Policy(lambda v: torch.maximum(v.echo(segment, delta), other(v)))


POLICIES: dict[str, Policy] = {
    "echo16": Policy(lambda v: v.echo(16, 256)),
    "echo64": Policy(lambda v: v.echo(64, 256)),
    "echo64_d64": Policy(lambda v: v.echo(64, 64)),
    "echo64_vnorm": Policy(lambda v: v.valued(v.echo(64, 256))),
    "echo64_vnorm_window": Policy(
        lambda v: torch.maximum(v.valued(v.echo(64, 256)), v.window(8, "max"))
    ),
    "echo64_vnorm_window_half": Policy(
        lambda v: torch.maximum(v.valued(v.echo(64, 256)), 0.5 * v.window(8, "max"))
    ),
    "echo64_vnorm_window_w15_half": Policy(
        lambda v: torch.maximum(v.valued(v.echo(64, 256)), 0.5 * v.pooled(v.window(8, "max"), 15))
    ),
    "echo16_vnorm": Policy(lambda v: v.valued(v.echo(16, 256))),
    # What the engine does with generations (decision 021), and the same unpooled.
    "echo16_vnorm_window_w15_half": Policy(
        lambda v: torch.maximum(v.valued(v.echo(16, 256)), 0.5 * v.pooled(v.window(8, "max"), 15))
    ),
    "echo16_vnorm_window_half": Policy(
        lambda v: torch.maximum(v.valued(v.echo(16, 256)), 0.5 * v.window(8, "max"))
    ),
    "table64": Policy(lambda v: v.tables["echo64"](v.echo(64, 256))),
    "table64_vnorm": Policy(lambda v: v.tables["echo64_vnorm"](v.valued(v.echo(64, 256)))),
    "table256": Policy(lambda v: v.tables["echo"](v.echo(256, 256))),
    "table64_window": Policy(
        lambda v: torch.maximum(v.tables["echo64"](v.echo(64, 256)), v.window(8, "max"))
    ),
    "table64_window_w15": Policy(
        lambda v: torch.maximum(
            v.tables["echo64"](v.echo(64, 256)), v.pooled(v.window(8, "max"), 15)
        )
    ),
    "table64_window_w15_square": Policy(
        lambda v: torch.maximum(
            v.tables["echo64"](v.echo(64, 256)), v.pooled(v.window(8, "max") ** 2, 15)
        )
    ),
    "echo64_window_w15": _echo_or(64, 256, lambda v: v.pooled(v.window(8, "max"), 15)),
    "echo64_window_w15_square": _echo_or(64, 256, lambda v: v.pooled(v.window(8, "max") ** 2, 15)),
    "echo64_layer": Policy(lambda v: v.echo(64, 256), "layer"),
    "echo128": Policy(lambda v: v.echo(128, 256)),
    "echo256": Policy(lambda v: v.echo(256, 256)),
    "echo16_window": _echo_or(16, 256, lambda v: v.window(8, "max")),
    "echo64_window": _echo_or(64, 256, lambda v: v.window(8, "max")),
    "echo64_window64": _echo_or(64, 256, lambda v: v.window(64, "max")),
    "echo64_highest": _echo_or(64, 256, lambda v: v.highest("window", v.window(8, "max"))),
    "echo64_highest64": _echo_or(64, 256, lambda v: v.highest("window", v.window(64, "max"))),
    "window": Policy(lambda v: v.window(8, "max")),
    "window_highest": Policy(lambda v: v.highest("window", v.window(8, "max"))),
    "window64_highest": Policy(lambda v: v.highest("window", v.window(64, "max"))),
    "kv_compress_p15": Policy(lambda v: v.pooled(v.window(8, "squares"), 15)),
    "kv_compress_p127": Policy(lambda v: v.pooled(v.window(8, "squares"), 127)),
    "diverse_p15": Policy(lambda v: v.diverse(15)),
    "diverse_p127": Policy(lambda v: v.diverse(127)),
    "snapkv": Policy(lambda v: v.pooled(v.window(32, "mean"), 7), "uniform"),
    "keydiff": Policy(lambda v: scores.keydiff(v.keys, v.present), "uniform"),
    "triattention": Policy(lambda v: v.tri(), "uniform"),
    "r_kv": Policy(lambda v: v.redundancy(), "uniform"),
    "streaming": Policy(lambda v: v.order()),
    "random": Policy(lambda v: v.chance()),
}
FEW = [
    "echo16",
    "echo64",
    "echo64_window",
    "echo64_highest64",
    "diverse_p127",
    "keydiff",
    "streaming",
]


def schedule(length: int, ratio: float, shields: Shields, packing: int = 1) -> Iterator[int]:
    """Tokens at which a generation of ``length`` tokens is compressed.

    Args:
        packing: packed keys in the bytes of one that is not.
    """
    held, page = 0, shields.page
    for tokens in range(page, length + 1, page):
        held += packing
        kept = count(tokens, ratio, shields).kept
        if held - kept >= INTERVAL * 16 * packing / page:
            held = kept
            yield tokens


@torch.inference_mode()
def generate(
    model: Model,
    tokens: Tensor,
    policies: Sequence[str],
    ratio: float,
    shields: Shields,
    tables: Mapping[str, Table],
    form: Format = FORMATS[AUTO],
) -> tuple[Tensor, Tensor, Tensor]:
    """Read ``tokens`` ``[B, P]`` as if they were generated.

    Args:
        form: of the packed pages. What was packed before stays as it was then.

    Returns:
        Keys and values ``[N * B, all layers, H, P, D]``, and which of them are there
        ``[N * B, L, H, P]``: for each of N policies all contexts.
    """
    contexts, length = tokens.shape
    rows = contexts * len(policies)
    ends = [*schedule(length, ratio, shields, form.packing), length]
    start = model.prefill(tokens[:, : ends[0]])

    def room(like: Tensor, *shape: int) -> Tensor:
        whole = like.new_zeros(rows, *like.shape[1:-2], length, *shape)
        whole[..., : ends[0], :] = like.repeat(len(policies), *[1] * (like.dim() - 1))
        return whole

    keys = room(start.keys, start.keys.shape[-1])
    values = room(start.values, start.keys.shape[-1])
    queries = room(start.queries, start.keys.shape[-1])
    present = torch.ones(
        rows, len(model.layers), model.heads, length, dtype=torch.bool, device=model.device
    )
    stored: dict[str, dict[str, Tensor]] = {name: {} for name in policies}
    begin = 0
    for end in ends:
        if end > ends[0]:
            part = tokens[:, begin:end].repeat(len(policies), 1)
            seen = present[:, None, ..., :begin]
            _, found = model.follow(
                keys[..., :begin, :], values[..., :begin, :], seen, part[:, None], begin, cache=True
            )
            assert found is not None
            keys[..., begin:end, :], values[..., begin:end, :], queries[..., begin:end, :] = found
        if end == length and end not in ends[:-1]:
            break
        for i, name in enumerate(policies):
            mine = slice(i * contexts, (i + 1) * contexts)
            view = View(
                model,
                keys[mine][:, model.layers, :, :end],
                values[mine][:, model.layers, :, :end],
                queries[mine][..., :end, :],
                present[mine][..., :end],
                begin,
                ratio,
                shields,
                tables,
                stored[name],
            )
            policy = POLICIES[name]
            present[mine, ..., :end] = keep(
                policy.score(view), ratio, shields, policy.allocator, view.present
            )
            packed = count(end, ratio, shields).candidates
            there = present[mine, ..., :packed]
            before = count(begin, ratio, shields).candidates if begin else 0
            for whole, quantise in ((keys, form.keys), (values, form.values)):
                some = whole[mine][:, model.layers, :, :packed].float()
                new = quantise(some, there)[..., before:, :].to(whole.dtype)
                whole[mine][:, model.layers, :, before:packed] = new
        begin = end
        if end == length:
            break
    return keys, values, present
