# SPDX-License-Identifier: Apache-2.0
"""The papers' formulas, slowly and literally, from attention probabilities in fp64.

Nothing here knows of statistics, pages, blocks of vLLM or our ops. A prompt is :class:`Attention`;
each function of :data:`SCORES` gives ``[L, H, n]`` scores of its n candidate keys, and
:func:`kept_keys` what survives.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(eq=False)
class Attention:
    """A prompt of S tokens after prefill, all in fp64.

    Attributes:
        keys, values: ``[L, H, S, D]``, keys after RoPE.
        queries: ``[L, H, G, S, D]`` after RoPE.
        probabilities: ``[L, H, G, S, S]``, row q is the softmax of query q over keys 0 to q.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    probabilities: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]


@dataclass
class Setting:
    """How to compress; lengths in tokens, ``kept`` and ``block`` as the engine has them."""

    window: int
    pool: int
    recent: int
    sinks: int
    block: int
    kept: int
    """Blocks kept."""
    floor: int
    """Pages that each head keeps."""

    def candidates(self, length: int) -> int:
        return length // self.block * self.block

    def shielded(self, length: int) -> list[bool]:
        n = self.candidates(length)
        return [j < self.sinks or j >= length - self.recent for j in range(n)]

    def open_budget(self, length: int) -> int:
        """Keys without shield that a head keeps on average."""
        return self.kept * self.block - sum(self.shielded(length))


def causal(queries: Tensor, keys: Tensor, values: Tensor) -> Attention:
    """Attention of random queries, keys and values."""
    logits = queries @ keys[:, :, None].mT / math.sqrt(keys.shape[-1])
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return Attention(keys, values, queries, logits.masked_fill(future, -math.inf).softmax(-1))


def _heads(a: Attention, score: Callable[[int, int], list[float]]) -> Tensor:
    layers, heads = a.keys.shape[:2]
    rows = [[score(layer, head) for head in range(heads)] for layer in range(layers)]
    return torch.tensor(rows, dtype=torch.float64)


def _window(a: Attention, s: Setting) -> range:
    return range(max(0, a.length - s.window), a.length)


def _max_pool(scores: list[float], width: int) -> list[float]:
    reach = width // 2
    return [max(scores[max(0, j - reach) : j + reach + 1]) for j in range(len(scores))]


def _average_pool(scores: list[float], width: int) -> list[float]:
    reach = width // 2
    return [
        sum(scores[i] for i in range(j - reach, j + reach + 1) if 0 <= i < len(scores)) / width
        for j in range(len(scores))
    ]


def _before_window(scores: list[float], a: Attention, s: Setting, pool: Callable) -> list[float]:
    """Pool the keys before the window alone; those of the window are kept, whatever they score."""
    n, end = s.candidates(a.length), min(s.candidates(a.length), a.length - s.window)
    return pool(scores[:end], s.pool) + [0.0] * (n - end)


def kv_compress(a: Attention, s: Setting, norm: str = "L2", aggregation: str = "sum") -> Tensor:
    """Equations 8 to 11."""
    n = s.candidates(a.length)

    def score(layer: int, head: int) -> list[float]:
        p = (a.probabilities[layer, head] ** (2 if norm == "L2" else 1)).sum(0).tolist()
        metric = []
        for j in range(n):
            seen = [q for q in _window(a, s) if q >= j]
            total = sum(p[q][j] for q in seen)
            metric.append(total / len(seen) if aggregation == "average" else total)
        return _max_pool(metric, s.pool)

    return _heads(a, score)


def mean_attention(a: Attention, s: Setting) -> Tensor:
    """MAS over the queries of the window that see the key."""

    def score(layer: int, head: int) -> list[float]:
        mean = a.probabilities[layer, head].mean(0).tolist()
        means = []
        for j in range(s.candidates(a.length)):
            paid = [mean[q][j] for q in _window(a, s) if q >= j]
            means.append(sum(paid) / len(paid))
        return _max_pool(means, s.pool)

    return _heads(a, score)


def roco(a: Attention, s: Setting, recent_ratio: float = 0.1) -> Tensor:
    """Mean attention; the keys of highest standard deviation are out of the eviction scope."""
    safe = int(recent_ratio * s.kept * s.block)
    means = mean_attention(a, s)

    def score(layer: int, head: int) -> list[float]:
        mean = a.probabilities[layer, head].mean(0).tolist()
        deviation = []
        for j in range(s.candidates(a.length)):
            deviation.append(statistics.pstdev([mean[q][j] for q in _window(a, s) if q >= j]))
        shielded = s.shielded(a.length)
        open_keys = [j for j in range(len(deviation)) if not shielded[j]]
        unsettled = sorted(open_keys, key=lambda j: -deviation[j])[:safe]
        return [float(means[layer, head, j]) + (j in unsettled) for j in range(len(deviation))]

    return _heads(a, score)


def _cake_rows(a: Attention, s: Setting, layer: int) -> Tensor:
    """``[H, G, W, S - W]``; no more than the candidates."""
    end = min(s.candidates(a.length), a.length - s.window)
    return a.probabilities[layer, :, :, -s.window :, :end]


def cake(a: Attention, s: Setting, gamma: float = 200.0) -> Tensor:
    """The indicator I."""

    def score(layer: int, head: int) -> list[float]:
        rows = _cake_rows(a, s, layer)[head]
        indicator = (rows.mean(1) + gamma * rows.var(1, unbiased=True)).mean(0)
        return _before_window(indicator.tolist(), a, s, _average_pool)

    return _heads(a, score)


def cake_layers(a: Attention, s: Setting, tau1: float = 1.0, tau2: float = 1.0) -> list[float]:
    """The preference P of every layer."""
    preferences = []
    for layer in range(a.keys.shape[0]):
        rows = _cake_rows(a, s, layer)
        entropy = -sum(float(p * math.log(p)) for p in rows.flatten().tolist() if p > 0)
        shift = float(rows.var(2, unbiased=True).sum())
        preferences.append(entropy ** (1 / tau1) * shift ** (1 / tau2))
    return preferences


def scissorhands(a: Attention, s: Setting) -> Tensor:
    """Fewest low queries first; ties by mean attention, which is below 1."""

    def score(layer: int, head: int) -> list[float]:
        mean = a.probabilities[layer, head].mean(0).tolist()
        queries = _window(a, s)
        scores = []
        for j in range(s.candidates(a.length)):
            low = sum(mean[q][j] < 1 / (q + 1) for q in queries if q >= j)
            paid = sum(mean[q][j] for q in queries)
            scores.append(len(queries) - low + paid / len(queries))
        return _max_pool(scores, s.pool)

    return _heads(a, score)


def scissorhands_layers(a: Attention, s: Setting, later: float = 2.0) -> list[float]:
    layers = a.keys.shape[0]
    return [1 + (later - 1) * layer / (layers - 1) for layer in range(layers)]


def snapkv(a: Attention, s: Setting, pooling: str = "max") -> Tensor:
    """Attention of the window to the keys before it, mean over the group, pooled."""

    def score(layer: int, head: int) -> list[float]:
        rows = a.probabilities[layer, head][:, -s.window :].mean((0, 1)).tolist()
        return _before_window(rows, a, s, _average_pool if pooling == "average" else _max_pool)

    return _heads(a, score)


def pyramidkv_layers(a: Attention, s: Setting, beta: float = 20.0) -> list[float]:
    """Tokens beyond the window per layer, as in the paper's code."""
    average, room = s.open_budget(a.length), s.shielded(a.length).count(False)
    smallest = average / beta
    largest = 2 * average - smallest
    if largest >= room:
        largest = room
        smallest = 2 * average - largest
    layers = a.keys.shape[0]
    step = (largest - smallest) / (layers - 1)
    return [largest - layer * step for layer in range(layers)]


def adakv_heads(a: Attention, s: Setting, alpha: float = 0.2) -> list[list[float]]:
    """Tokens beyond the window per head."""
    scores, shielded = snapkv(a, s), s.shielded(a.length)
    heads, average = a.keys.shape[1], s.open_budget(a.length)
    budgets = []
    for layer in scores:
        ranked = [
            (-float(layer[head, j]), head, j)
            for head in range(heads)
            for j in range(layer.shape[1])
            if not shielded[j]
        ]
        top = sorted(ranked)[: heads * average]
        counts = [sum(head == h for _, head, _ in top) for h in range(heads)]
        budgets.append([(1 - alpha) * count + alpha * average for count in counts])
    return budgets


def h2o(a: Attention, s: Setting) -> Tensor:
    """Accumulated attention."""

    def score(layer: int, head: int) -> list[float]:
        rows = a.probabilities[layer, head][:, -s.window :].sum((0, 1))
        return _max_pool(rows[: s.candidates(a.length)].tolist(), s.pool)

    return _heads(a, score)


def tova(a: Attention, s: Setting) -> Tensor:
    """The last query, mean over all heads of the layer."""

    def score(layer: int, head: int) -> list[float]:
        rows = a.probabilities[layer, :, :, -1].mean((0, 1))
        return _max_pool(rows[: s.candidates(a.length)].tolist(), s.pool)

    return _heads(a, score)


def _unlike(a: Attention, s: Setting, layer: int, head: int) -> list[float]:
    keys = a.keys[layer, head]
    anchor = sum(key / key.norm() for key in keys) / len(keys)
    unlike = [-float(key @ anchor / (key.norm() * anchor.norm())) for key in keys]
    return unlike[: s.candidates(a.length)]


def keydiff(a: Attention, s: Setting) -> Tensor:
    return _heads(a, lambda layer, head: _max_pool(_unlike(a, s, layer, head), s.pool))


@cache
def repeated(a: Attention, sinks: int, segment: int = 256) -> Tensor:
    """``[L, H, S]``: the highest probability that each key gets if the prompt is read once more,
    segment by segment: a repeated token sees the first tokens, the segment as it was, and of its
    repetition itself and what comes before."""
    result = torch.zeros(a.keys.shape[:3], dtype=torch.float64)
    for layer, head in itertools.product(*map(range, a.keys.shape[:2])):
        for begin in range(0, a.length, segment):
            end = min(begin + segment, a.length)
            if end - begin < 2:
                continue
            keys = a.keys[layer, head]
            first, own = keys[: min(sinks, end)], keys[begin:end]
            for i in range(begin, end):
                for query in a.queries[layer, head, :, i]:
                    # Keys of the repetition are as far from it as they were from the first reading.
                    old, new = (
                        rotate(query) @ torch.cat([own, first]).T,
                        query @ keys[begin : i + 1].T,
                    )
                    p = torch.cat([old, new]).div(math.sqrt(keys.shape[-1])).softmax(-1)
                    best = result[layer, head, begin:end]
                    torch.maximum(best, p[: end - begin], out=best)
    return result


def angles(size: int, distance: int = 512, base: float = 10_000.0) -> Tensor:
    """``[size / 2]``: by how much each pair of dimensions (i, i + size / 2) turns."""
    return distance / base ** (2 * torch.arange(size // 2, dtype=torch.float64) / size)


def rotate(query: Tensor) -> Tensor:
    half = len(query) // 2
    by = torch.polar(torch.ones(half, dtype=torch.float64), angles(2 * half))
    turned = torch.complex(query[:half], query[half:]) * by
    return torch.cat([turned.real, turned.imag])


def echo(
    a: Attention,
    s: Setting,
    value_norms: bool = True,
    norm: str = "L1",
    weight: float = 0.5,
    stored: Tensor | None = None,
) -> Tensor:
    """The repetition, times the value's length over the mean, or, pooled, the last queries;
    ``stored``: of the repetition already."""
    known = repeated(a, s.sinks) if stored is None else stored
    layers, heads = a.keys.shape[:2]
    n, shielded = s.candidates(a.length), s.shielded(a.length)

    def length(layer: int, head: int, j: int) -> float:
        return math.sqrt(sum(x * x for x in a.values[layer, head, j].tolist()))

    open_lengths = [
        length(layer, head, j)
        for layer in range(layers)
        for head in range(heads)
        for j in range(n)
        if not shielded[j]
    ]
    mean = sum(open_lengths) / len(open_lengths)

    def score(layer: int, head: int) -> list[float]:
        p = a.probabilities[layer, head].tolist()
        paid = [max(of[q][j] for of in p for q in _window(a, s) if q >= j) for j in range(n)]
        asked = _max_pool([x * x if norm == "L2" else x for x in paid], s.pool)
        echoes = known[layer, head].tolist()
        if value_norms:
            echoes = [echoes[j] * length(layer, head, j) / mean for j in range(n)]
        return [max(echoes[j], weight * asked[j]) for j in range(n)]

    return _heads(a, score)


def diverse(a: Attention, s: Setting, share: float = 0.5, key_pool: int = 7) -> Tensor:
    """Attention, after the first ``share`` of the open budget by unlikeness."""
    attention, shielded = kv_compress(a, s), s.shielded(a.length)
    count = int(share * (s.kept * s.block - sum(shielded)))

    def score(layer: int, head: int) -> list[float]:
        unlike = _max_pool(_unlike(a, s, layer, head), key_pool)
        open_keys = [j for j in range(len(unlike)) if not shielded[j]]
        chosen = sorted(open_keys, key=lambda j: -unlike[j])[: max(0, count)]
        return [float(attention[layer, head, j]) + 100 * (j in chosen) for j in range(len(unlike))]

    return _heads(a, score)


def knorm(a: Attention, s: Setting) -> Tensor:
    def score(layer: int, head: int) -> list[float]:
        norms = a.keys[layer, head, : s.candidates(a.length)].norm(dim=-1)
        return _max_pool((-norms).tolist(), s.pool)

    return _heads(a, score)


def expected_attention(a: Attention, s: Setting, epsilon: float = 0.02) -> Tensor:
    """Queries of the window stand for the future ones."""
    size = a.keys.shape[-1]

    def score(layer: int, head: int) -> list[float]:
        keys, expected = a.keys[layer, head, s.sinks :], 0
        for queries in a.queries[layer, head, :, -s.window :]:
            mean, covariance = queries.mean(0), queries.T.cov(correction=0)
            z = torch.stack([
                (mean @ k / size**0.5 + k @ covariance @ k / (2 * size)).exp() for k in keys
            ])  # fmt: skip
            expected = expected + z / z.sum() / a.queries.shape[2]
        padded = torch.cat([torch.zeros(s.sinks, dtype=torch.float64), expected])
        result = (padded + epsilon) * a.values[layer, head].norm(dim=-1)
        return _max_pool(result[: s.candidates(a.length)].tolist(), s.pool)

    return _heads(a, score)


def streaming(a: Attention, s: Setting) -> Tensor:
    return _heads(a, lambda layer, head: [float(j) for j in range(s.candidates(a.length))])


def random(a: Attention, s: Setting, seed: int = 0) -> Tensor:
    """MurmurHash3's finaliser, in Python's own integers."""

    def mix(x: int) -> int:
        x &= 0xFFFFFFFF
        x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ x >> 16

    def score(layer: int, head: int) -> list[float]:
        slot = layer * a.keys.shape[1] + head
        start = mix(mix(seed + 0x9E3779B9 * (a.length + 1)) + 0x85EBCA77 * (slot + 1))
        count = s.candidates(a.length)
        return [(mix(start + 0x27D4EB2F * j) >> 8) / 2**24 for j in range(count)]

    return _heads(a, score)


def divide(weights: list[float], total: int, low: int, high: int, base: float) -> list[int]:
    """Integers of sum ``total``: ``base + level * weight`` in bounds, by largest remainder."""

    def parts(level: float) -> list[float]:
        return [min(max(base + level * w, low), high) for w in weights]

    least, most = 0.0, 1e15
    for _ in range(500):
        middle = (least + most) / 2
        least, most = (middle, most) if sum(parts(middle)) < total else (least, middle)
    exact = [round(part, 7) for part in parts(most)]
    whole = [math.floor(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    assert sum(whole) == total
    return whole


def kept_keys(
    a: Attention,
    s: Setting,
    scores: Tensor,
    allocator: str,
    layer_weights: list[float] | None = None,
    head_weights: list[list[float]] | None = None,
) -> list[list[int]]:
    """What each (layer, head) keeps, in (layer, head) order."""
    layers, heads, n = scores.shape
    full, shielded = n // s.block, s.shielded(a.length)
    base = sum(shielded) / s.block
    order = [
        sorted(range(n), key=lambda j: (shielded[j], float(scores[layer, head, j]), j))
        for layer in range(layers)
        for head in range(heads)
    ]
    lost = [0] * (layers * heads)

    def compete(members: range, freed: int) -> None:
        """The cheapest pages of some heads go; a page costs the best of the keys it takes along."""
        pages = [
            (float(scores.flatten(0, 1)[i, order[i][(e + 1) * s.block - 1]]), i, e)
            for i in members
            for e in range(full - s.floor)
        ]
        for _, i, _ in sorted(pages)[:freed]:
            lost[i] += 1

    freed = (full - s.kept) * layers * heads
    if allocator == "global":
        compete(range(layers * heads), freed)
    elif allocator == "layer":
        shares = [s.kept * heads] * layers
        if layer_weights:
            shares = divide(layer_weights, s.kept * heads * layers, s.floor * heads, full * heads,
                            base * heads)  # fmt: skip
        for layer, share in enumerate(shares):
            if head_weights:
                budgets = divide(head_weights[layer], share, s.floor, full, base)
                lost[layer * heads : (layer + 1) * heads] = [full - b for b in budgets]
            else:
                compete(range(layer * heads, (layer + 1) * heads), full * heads - share)
    else:
        shares = [s.kept] * layers
        if layer_weights:
            shares = divide(layer_weights, s.kept * layers, s.floor, full, base)
        lost = [full - share for share in shares for _ in range(heads)]
    assert sum(lost) == freed
    return [sorted(keys[gone * s.block :]) for keys, gone in zip(order, lost, strict=True)]
