# SPDX-License-Identifier: Apache-2.0
"""The scores that the study compares, by name, for a context that was read at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.real import scores
from benchmarks.real.calibration import Table
from benchmarks.real.masks import Shields, count, open_keys
from benchmarks.real.model import Context, Model

TABLES = ("echo", "vnorm", "echo_d512", "echo512", "echo512_vnorm", "echo64", "echo64_vnorm")
REPLAY_CHUNK = 2048
"""KVzip repeats so many tokens at a time."""


class Evidence:
    """What is known of one context (B = 1). Scores are computed once, when they are asked for.

    Args:
        repeat: tokens of the prompt that asks for a repetition.
        tables: see :mod:`benchmarks.real.calibration`.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        tokens: Tensor,
        repeat: Sequence[int],
        shields: Shields,
        tables: Mapping[str, Table] | None = None,
    ) -> None:
        self.model, self.context, self.tokens, self.shields = model, context, tokens, shields
        self._repeat = torch.tensor([repeat], device=model.device, dtype=torch.long)
        self.keys = context.keys[0, model.layers]  # [L, H, P, D]
        self.values = context.values[0, model.layers]
        self.queries = context.queries[0]
        self.length = context.length
        self.tables = tables or {}
        self.open = open_keys(self.length, shields, model.device)
        self._echoes: dict[tuple[object, ...], Tensor] = {}

    def _by_layer(self, score: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([score(i) for i in range(len(self.keys))])

    def echo(
        self,
        segment: int = 256,
        delta: float | None = 256,
        first: int = 0,
        stride: int = 0,
        before: int = 0,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """See :func:`scores.echo`; segment 0: one over the whole context."""
        key = (segment, delta, first, stride, before, reduce)
        if key not in self._echoes:
            self._echoes[key] = self._by_layer(
                lambda i: scores.echo(
                    self.keys[i], self.queries[i], self.model.rotation(i), self.model.scale,
                    segment or self.length, delta, first, stride or None, None, before, reduce,
                )
            )  # fmt: skip
        return self._echoes[key]

    def overlapping(self, segment: int = 256, delta: float | None = 256) -> Tensor:
        """Two grids of segments, the second half a segment later."""
        return torch.maximum(
            self.echo(segment, delta), self.echo(segment, delta, first=segment // 2)
        )

    def window(self, size: int, how: str) -> Tensor:
        """Attention of the last ``size`` tokens: ``max``, ``squares`` or ``mean`` over them and the
        group."""

        def score(i: int) -> Tensor:
            p = scores.probabilities(
                self.keys[i], self.queries[i][..., -size:, :], self.model.scale,
                sliding=self.model.window(i),
            )  # fmt: skip
            if how == "max":
                return p.amax((-2, -3))
            return p.square().sum((-2, -3)) if how == "squares" else p.mean((-2, -3))

        key = ("window", size, how)
        if key not in self._echoes:
            self._echoes[key] = self._by_layer(score)
        return self._echoes[key]

    def pooled(self, score: Tensor, width: int) -> Tensor:
        """Over neighbours that no shield covers."""
        return scores.pooled(score, width, self.open)

    def replay(self, tokens: Tensor) -> Tensor:
        """KVzip over these first tokens of the context, chunk by chunk."""
        best = torch.zeros(*self.keys.shape[:2], tokens.shape[1], device=tokens.device)
        for begin in range(0, tokens.shape[1], REPLAY_CHUNK):
            part = torch.cat([self._repeat, tokens[:, begin : begin + REPLAY_CHUNK]], 1)
            upto = tokens.shape[1]
            keys, values = (x[..., :upto, :] for x in (self.context.keys, self.context.values))
            _, found = self.model.follow(keys, values, None, part[:, None], upto, cache=True)
            assert found is not None
            new, queries = found[0][0, self.model.layers], found[2][0]
            score = self._by_layer(
                lambda i, new=new, queries=queries, upto=upto: scores.replay(  # type: ignore[misc]
                    self.keys[i, :, :upto], queries[i], new[i], self.model.scale
                )
            )
            best = torch.maximum(best, score)
        return best

    @cached_property
    def kvzip(self) -> Tensor:
        """A real repetition."""
        return self.replay(self.tokens)

    @cached_property
    def keydiff(self) -> Tensor:
        """See :func:`scores.keydiff`."""
        return scores.keydiff(self.keys)

    @cached_property
    def relative_values(self) -> Tensor:
        """``[L, H, G, P]``: norm of what a value adds / that of the hidden state of its token."""
        assert self.context.norms is not None
        added = self.model.value_norms(self.values[None])[0]
        return added / self.context.norms[0, :, None, None]

    @cached_property
    def value_size(self) -> Tensor:
        """``[L, H, P]``: norms of values / their mean over the context."""
        norm = self.values.float().norm(dim=-1)
        return norm / norm.mean()

    @cached_property
    def value_spread(self) -> Tensor:
        """``[L, H, P]``: distances of values from the mean value of their head / the mean of all:
        what dropping a key changes where the others' mean takes its place."""
        values = self.values.float()
        spread = (values - values.mean(-2, keepdim=True)).norm(dim=-1)
        return spread / spread.mean()

    def foreseen(self, name: str) -> Tensor:
        """One of the scores that have tables, :data:`TABLES`."""
        segment, delta = {"echo512": (512, 512), "echo_d512": (256, 512), "echo64": (64, 256)}.get(
            name.removesuffix("_vnorm"), (256, 256)
        )
        score = self.echo(segment, delta)
        return score * self.value_size if name.endswith("vnorm") else score

    def mapped(self, name: str, scaled: bool = False) -> Tensor:
        """On the common scale of all heads."""
        key = ("mapped", name, scaled)
        if key not in self._echoes:
            table = self.tables[name]
            score = self.foreseen(name)
            self._echoes[key] = table.scaled(score) if scaled else table(score)
        return self._echoes[key]

    @cached_property
    def query_span(self) -> Tensor:
        """See :func:`scores.query_span`; window 64."""
        assert self.context.surprise is not None

        def score(i: int) -> Tensor:
            p = scores.probabilities(self.keys[i], self.queries[i][..., -64:, :], self.model.scale)
            return (p * self.relative_values[i, :, :, None]).amax((-2, -3))

        return scores.query_span(self._by_layer(score), self.context.surprise[0])

    @cached_property
    def later(self) -> Tensor:
        """See :func:`scores.later`."""
        return self._by_layer(
            lambda i: scores.later(self.keys[i], self.queries[i], self.model.scale, 256, 64)
        )

    def diverse(self, pool: int, ratio: float) -> Tensor:
        """The product's ``diverse``: half of the budget is KeyDiff's, pooled over 7."""
        counts = count(self.length, ratio, self.shields)
        wanted = counts.kept * counts.page - self.shields.sinks - counts.recent
        unlike = scores.pooled(self.keydiff + 2, 7).masked_fill(~self.open, -torch.inf)
        chosen = torch.zeros_like(unlike, dtype=torch.bool)
        most = int(self.open.sum())
        best = unlike.topk(min(most, max(0, int(0.5 * wanted))), -1).indices
        chosen.scatter_(-1, best, True)
        return scores.pooled(self.window(8, "squares"), pool) + 1e6 * chosen

    @cached_property
    def expected(self) -> Tensor:
        """See :func:`scores.expected_attention`."""
        return self._by_layer(
            lambda i: scores.expected_attention(
                self.keys[i],
                self.values[i],
                self.queries[i],
                self.model.rotation(i),
                self.model.scale,
            )
        )

    @cached_property
    def tri(self) -> Tensor:
        """See :func:`scores.triattention`; centres of all queries of the context."""
        place = torch.arange(self.length, device=self.keys.device)
        return self._by_layer(
            lambda i: scores.triattention(
                self.keys[i], self.queries[i], self.model.rotation(i), place, self.length,
                self.model.scale,
            )
        )  # fmt: skip

    @cached_property
    def redundancy(self) -> Tensor:
        """See :func:`scores.redundancy`."""
        important = scores.pooled(self.window(8, "mean"), 7)
        return self._by_layer(lambda i: scores.redundancy(self.keys[i], important[i]))

    def chance(self) -> Tensor:
        """Random, but the same for the same length."""
        generator = torch.Generator().manual_seed(self.length)
        shape = self.keys.shape[:-1]
        return torch.rand(shape, generator=generator).to(self.keys.device)


class Policy(NamedTuple):
    """Scores ``[L, H, P]`` of a context at a ratio, and who competes."""

    score: Callable[[Evidence, float], Tensor]
    allocator: str = "global"


def _echo_or_window(pool_echo: int, pool_window: int, weight: float, size: int = 8) -> Policy:
    return Policy(
        lambda e, _: torch.maximum(
            e.pooled(e.echo(), pool_echo), weight * e.pooled(e.window(size, "max"), pool_window)
        )
    )


def _max(*parts: Callable[[Evidence], Tensor]) -> Policy:
    def score(e: Evidence, _: float) -> Tensor:
        result = parts[0](e)
        for part in parts[1:]:
            result = torch.maximum(result, part(e))
        return result

    return Policy(score)


def _product_or(score: Callable[[Evidence], Tensor]) -> Policy:
    """What the product does with the window, and another score in the place of its own."""
    return _max(score, lambda e: 0.5 * e.pooled(e.window(8, "max"), 15))


POLICIES: dict[str, Policy] = {
    "kvzip": Policy(lambda e, _: e.kvzip),
    "kvzip_p7": Policy(lambda e, _: e.pooled(e.kvzip, 7)),
    "kvzip_values": Policy(lambda e, _: e.kvzip * e.relative_values.amax(-2)),
    "echo": Policy(lambda e, _: e.echo()),
    "echo_layer": Policy(lambda e, _: e.echo(), "layer"),
    "echo_uniform": Policy(lambda e, _: e.echo(), "uniform"),
    "echo64": Policy(lambda e, _: e.echo(64, 256)),
    "echo128": Policy(lambda e, _: e.echo(128, 256)),
    "echo128_d128": Policy(lambda e, _: e.echo(128, 128)),
    "echo512": Policy(lambda e, _: e.echo(512, 512)),
    "echo_d512": Policy(lambda e, _: e.echo(256, 512)),
    "echo_d1024": Policy(lambda e, _: e.echo(256, 1024)),
    "echo_end": Policy(lambda e, _: e.echo(256, None)),
    "echo_whole": Policy(lambda e, _: e.echo(0, None)),
    "echo_2deltas": _max(lambda e: e.echo(), lambda e: e.echo(256, 1024)),
    "echo_2deltas_end": _max(lambda e: e.echo(), lambda e: e.echo(256, None)),
    "echo_2segments": _max(lambda e: e.echo(), lambda e: e.echo(512, 512)),
    "echo_overlap": Policy(lambda e, _: e.overlapping()),
    "echo512_overlap": Policy(lambda e, _: e.overlapping(512, 512)),
    "echo_overlap_2deltas": _max(lambda e: e.overlapping(), lambda e: e.overlapping(256, 1024)),
    "echo_p3": Policy(lambda e, _: e.pooled(e.echo(), 3)),
    "echo_p7": Policy(lambda e, _: e.pooled(e.echo(), 7)),
    "echo_vnorm": Policy(lambda e, _: e.echo() * e.values.float().norm(dim=-1)),
    "echo_values": Policy(lambda e, _: e.echo() * e.relative_values.amax(-2)),
    "echo_surprise": Policy(
        lambda e, _: e.echo() * e.context.surprise[0] ** 0.5  # type: ignore[index]
    ),
    "echo_mapped": Policy(lambda e, _: scores.mapped(e.echo(), e.replay(e.tokens[:, :256]))),
    "echo_replay256": Policy(
        lambda e, _: torch.cat([e.replay(e.tokens[:, :256]), e.echo()[..., 256:]], -1)
    ),
    "echo_vnorm_head": Policy(
        lambda e, _: e.echo() * e.value_size / e.value_size.mean(-1, keepdim=True)
    ),
    "echo_vnorm_root": Policy(lambda e, _: e.echo() * e.value_size**0.5),
    "echo512_vnorm": Policy(lambda e, _: e.echo(512, 512) * e.value_size),
    "echo_d512_vnorm": Policy(lambda e, _: e.echo(256, 512) * e.value_size),
    "vnorm_window_w15": _max(
        lambda e: e.echo() * e.value_size, lambda e: e.pooled(e.window(8, "max"), 15)
    ),
    "vnorm_window_w15_half": _max(
        lambda e: e.echo() * e.value_size, lambda e: 0.5 * e.pooled(e.window(8, "max"), 15)
    ),
    "vnorm_window_w15_half_layer": Policy(
        lambda e, _: torch.maximum(e.echo() * e.value_size, 0.5 * e.pooled(e.window(8, "max"), 15)),
        "layer",
    ),
    "vnorm_window_w15_square": _max(
        lambda e: e.echo() * e.value_size, lambda e: e.pooled(e.window(8, "max") ** 2, 15)
    ),
    "echo_window_w15_half": _echo_or_window(1, 15, 0.5),
    "echo_window_w15_quarter": _echo_or_window(1, 15, 0.25),
    "echo_window_w15_square": _max(
        lambda e: e.echo(), lambda e: e.pooled(e.window(8, "max") ** 2, 15)
    ),
    "echo_window_w31_square": _max(
        lambda e: e.echo(), lambda e: e.pooled(e.window(8, "max") ** 2, 31)
    ),
    "echo512_window_w15": _max(
        lambda e: e.echo(512, 512), lambda e: e.pooled(e.window(8, "max"), 15)
    ),
    "echo512_window_w15_square": _max(
        lambda e: e.echo(512, 512), lambda e: e.pooled(e.window(8, "max") ** 2, 15)
    ),
    "table512_window_w15": _max(
        lambda e: e.mapped("echo512"), lambda e: e.pooled(e.window(8, "max"), 15)
    ),
    "table512_window_w15_square": _max(
        lambda e: e.mapped("echo512"), lambda e: e.pooled(e.window(8, "max") ** 2, 15)
    ),
    "table512_vnorm": Policy(lambda e, _: e.mapped("echo512_vnorm")),
    "echo_d384": Policy(lambda e, _: e.echo(256, 384)),
    "echo_d512_window_w15": _max(
        lambda e: e.echo(256, 512), lambda e: e.pooled(e.window(8, "max"), 15)
    ),
    "echo_d512_window_w15_square": _max(
        lambda e: e.echo(256, 512), lambda e: e.pooled(e.window(8, "max") ** 2, 15)
    ),
    "table_d512": Policy(lambda e, _: e.mapped("echo_d512")),
    "table_d512_window_w15": _max(
        lambda e: e.mapped("echo_d512"), lambda e: e.pooled(e.window(8, "max"), 15)
    ),
    "table_d512_window_w15_square": _max(
        lambda e: e.mapped("echo_d512"), lambda e: e.pooled(e.window(8, "max") ** 2, 15)
    ),
    "vnorm512_window_w15_half": _max(
        lambda e: e.echo(512, 512) * e.value_size, lambda e: 0.5 * e.pooled(e.window(8, "max"), 15)
    ),
    "agree_quarter": _product_or(lambda e: scores.agreed(e.echo() * e.value_size, 0.25)),
    "agree_half": _product_or(lambda e: scores.agreed(e.echo() * e.value_size, 0.5)),
    "agree512_quarter": _product_or(lambda e: scores.agreed(e.echo(512, 512) * e.value_size, 0.25)),
    "agree512_half": _product_or(lambda e: scores.agreed(e.echo(512, 512) * e.value_size, 0.5)),
    "beside256": _product_or(lambda e: e.echo(before=256) * e.value_size),
    "beside512": _product_or(lambda e: e.echo(before=512) * e.value_size),
    "spread": _product_or(lambda e: e.echo() * e.value_spread),
    "odds_spread": _product_or(lambda e: scores.odds(e.echo()) * e.value_spread),
    "group_mean": _product_or(lambda e: e.echo(reduce=scores.group_mean) * e.value_size),
    "second_mean": _product_or(lambda e: e.echo(reduce=scores.second_mean) * e.value_size),
    "carried_quarter": _product_or(lambda e: scores.carried(e.echo() * e.value_size, 0.25)),
    "carried_half": _product_or(lambda e: scores.carried(e.echo() * e.value_size, 0.5)),
    "level_quarter": _product_or(lambda e: scores.levelled(e.echo() * e.value_size, 0.25)),
    "level_half": _product_or(lambda e: scores.levelled(e.echo() * e.value_size, 0.5)),
    "level_inverse": _product_or(lambda e: scores.levelled(e.echo() * e.value_size, -0.25)),
    "table": Policy(lambda e, _: e.mapped("echo")),
    "table_scale": Policy(lambda e, _: e.mapped("echo", scaled=True)),
    "table_vnorm": Policy(lambda e, _: e.mapped("vnorm")),
    "table_vnorm_scale": Policy(lambda e, _: e.mapped("vnorm", scaled=True)),
    "table512": Policy(lambda e, _: e.mapped("echo512")),
    "table64": Policy(lambda e, _: e.mapped("echo64")),
    "table_window": _max(lambda e: e.mapped("echo"), lambda e: e.window(8, "max")),
    "table_window_w7": _max(lambda e: e.mapped("echo"), lambda e: e.pooled(e.window(8, "max"), 7)),
    "table_window_w15": _max(
        lambda e: e.mapped("echo"), lambda e: e.pooled(e.window(8, "max"), 15)
    ),
    "table_window_w15_half": _max(
        lambda e: e.mapped("echo"), lambda e: 0.5 * e.pooled(e.window(8, "max"), 15)
    ),
    "table_window_w15_square": _max(
        lambda e: e.mapped("echo"), lambda e: e.pooled(e.window(8, "max") ** 2, 15)
    ),
    "table_window_w31_square": _max(
        lambda e: e.mapped("echo"), lambda e: e.pooled(e.window(8, "max") ** 2, 31)
    ),
    "table_vnorm_window_w15": _max(
        lambda e: e.mapped("vnorm"), lambda e: e.pooled(e.window(8, "max"), 15)
    ),
    "later": Policy(lambda e, _: e.later),
    "echo_later": _max(lambda e: e.echo(), lambda e: e.later),
    "echo_window": _echo_or_window(1, 1, 1),
    "echo_window_half": _echo_or_window(1, 1, 0.5),
    "echo_window_double": _echo_or_window(1, 1, 2),
    "echo_window_w7": _echo_or_window(1, 7, 1),
    "echo_window_w15": _echo_or_window(1, 15, 1),
    "echo_window_w31": _echo_or_window(1, 31, 1),
    "echo_window_w7_half": _echo_or_window(1, 7, 0.5),
    "echo_window_p3_w7": _echo_or_window(3, 7, 1),
    "echo_window32": _echo_or_window(1, 1, 1, 32),
    "echo_window32_w7": _echo_or_window(1, 7, 1, 32),
    "echo_overlap_window": _max(lambda e: e.overlapping(), lambda e: e.window(8, "max")),
    "echo512_window": _max(lambda e: e.echo(512, 512), lambda e: e.window(8, "max")),
    "window": Policy(lambda e, _: e.window(8, "max")),
    "window_p7": Policy(lambda e, _: e.pooled(e.window(8, "max"), 7)),
    "window_p15": Policy(lambda e, _: e.pooled(e.window(8, "max"), 15)),
    "kv_compress_p1": Policy(lambda e, _: e.window(8, "squares")),
    "kv_compress_p7": Policy(lambda e, _: scores.pooled(e.window(8, "squares"), 7)),
    "kv_compress_p15": Policy(lambda e, _: scores.pooled(e.window(8, "squares"), 15)),
    "kv_compress_p31": Policy(lambda e, _: scores.pooled(e.window(8, "squares"), 31)),
    "kv_compress_p127": Policy(lambda e, _: scores.pooled(e.window(8, "squares"), 127)),
    "diverse_p15": Policy(lambda e, r: e.diverse(15, r)),
    "diverse_p127": Policy(lambda e, r: e.diverse(127, r)),
    "snapkv": Policy(lambda e, _: scores.pooled(e.window(32, "mean"), 7), "uniform"),
    "adakv": Policy(lambda e, _: scores.pooled(e.window(32, "mean"), 7), "layer"),
    "keydiff": Policy(lambda e, _: e.keydiff, "uniform"),
    "expected_attention": Policy(lambda e, _: e.expected, "layer"),
    "query_span": Policy(lambda e, _: e.query_span),
    "triattention": Policy(lambda e, _: e.tri, "uniform"),
    "triattention_global": Policy(lambda e, _: e.tri),
    "r_kv": Policy(lambda e, _: e.redundancy, "uniform"),
    "streaming": Policy(
        lambda e, _: torch.arange(e.length, device=e.keys.device).float().expand(e.keys.shape[:-1])
    ),
    "random": Policy(lambda e, _: e.chance()),
}
FEW = [
    "kvzip",
    "echo",
    "echo_end",
    "echo_overlap",
    "echo_window",
    "echo_window_w7",
    "kv_compress_p15",
    "kv_compress_p127",
    "diverse_p127",
    "snapkv",
    "keydiff",
    "expected_attention",
    "streaming",
    "random",
]
"""What a processor without a GPU has patience for."""
