# SPDX-License-Identifier: Apache-2.0
"""What keys are worth, each by its published formula; independent of the product's policies.

Leading dimensions ``*`` (layers, or contexts and layers), then:

    keys, values    [*, H, P, D]       after RoPE
    queries         [*, H, G, Q, D]    the last Q tokens, after RoPE
    scores          [*, H, P]          fp32; higher means keep
    present         [*, H, P]          bool, keys that are there; None: all
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Rotate = Callable[..., Tensor]
"""``rotate(x, distance)``: x as if it stood later."""
SINKS = 4


def probabilities(
    keys: Tensor,
    queries: Tensor,
    scale: float,
    present: Tensor | None = None,
    sliding: int | None = None,
) -> Tensor:
    """``[*, H, G, Q, P]``: attention of the last Q tokens, which see ``sliding`` tokens each, or
    all."""
    q, p = queries.shape[-2], keys.shape[-2]
    logits = ((queries * scale) @ keys.unsqueeze(-3).mT).float()
    hidden = torch.ones(q, p, dtype=torch.bool, device=keys.device).triu(p - q + 1)
    if sliding is not None:
        hidden |= torch.ones_like(hidden).tril(p - q - sliding)
    logits.masked_fill_(hidden, -torch.inf)
    if present is not None:
        logits.masked_fill_(~present[..., None, None, :], -torch.inf)
    return logits.softmax(-1)


def pooled(scores: Tensor, width: int, where: Tensor | None = None) -> Tensor:
    """Maximum over ``width`` neighbours; keys outside ``where`` give nothing to others."""
    if width == 1:
        return scores
    inner = scores if where is None else scores.masked_fill(~where, 0)
    flat = inner.reshape(-1, 1, inner.shape[-1])
    return F.max_pool1d(flat, width, 1, width // 2).view_as(scores)


def echo(
    keys: Tensor,
    queries: Tensor,
    rotate: Rotate,
    scale: float,
    segment: int,
    delta: float | None,
    first: int = 0,
    stride: int | None = None,
    sinks: Tensor | None = None,
    before: int = 0,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What a repetition of each segment would attend to, foreseen from its first reading.

    RoPE composes: the query of a repeated token is that of its first reading, rotated. Per segment
    of ``segment`` tokens the highest probability that a rotated query of it gives each of its keys,
    beside the first keys of the sequence and its own repetition up to it.

    Args:
        queries: of all the P tokens.
        delta: distance of the repetition; None: to the end of the P tokens.
        first: where the first segment begins.
        stride: between segments; they overlap if it is less than ``segment``.
        sinks: ``[*, H, S, D]``; None: the first :data:`SINKS` of ``keys``.
        before: so many keys in front of a segment are beside it, too (``first`` 0).
        reduce: ``[*, H, G, S, m, m]`` probabilities by query and key to ``[*, H, S, m]``; None: the
            highest.
    """
    length = keys.shape[-2]
    sinks = keys[..., :SINKS, :] if sinks is None else sinks
    stride = stride or segment
    result = torch.zeros(keys.shape[:-1], device=keys.device)
    begins = list(range(first, length, stride))
    if first:
        begins.insert(0, 0)
    # Segments of the same length together.
    spans: dict[int, list[int]] = {}
    for begin in begins:
        end = min(length, begin + (first if begin < first else segment))
        spans.setdefault(end - begin, []).append(begin)
    for size, places in spans.items():
        index = torch.tensor(places, device=keys.device)[:, None] + torch.arange(
            size, device=keys.device
        )
        k = keys[..., index, :]  # [*, H, S, m, D]
        q1 = queries[..., index, :]  # [*, H, G, S, m, D]
        ahead = torch.full((len(places),), delta or 0.0, device=keys.device)
        if delta is None:
            ahead = length - torch.tensor(places, device=keys.device)
        q2 = rotate(q1, ahead[:, None].expand(-1, size))
        beside = sinks[..., None, :, :]
        lse = ((q2 * scale) @ beside.unsqueeze(-4).mT).float().logsumexp(-1, keepdim=True)
        if before:
            place = index[:, :1] - torch.arange(before, 0, -1, device=keys.device)  # [S, before]
            logits = (q2 * scale) @ keys[..., place.clamp(min=0), :].unsqueeze(-4).mT
            # The first keys are there already.
            logits = logits.float().masked_fill((place < SINKS)[:, None], -torch.inf)
            lse = torch.logaddexp(lse, logits.logsumexp(-1, keepdim=True))
        probability = _repetition(q1, q2, k, lse, scale)
        # [*, H, S, m]
        score = probability.amax((-2, -4)) if reduce is None else reduce(probability)
        flat = index.flatten().expand(*score.shape[:-2], -1)
        result.scatter_reduce_(-1, flat, score.flatten(-2), "amax")
    return result


def _repetition(q1: Tensor, q2: Tensor, k: Tensor, beside: Tensor, scale: float) -> Tensor:
    size = k.shape[-2]
    across = k.unsqueeze(-4).mT  # [*, H, 1, S, D, m]
    old = ((q2 * scale) @ across).float()
    lse = torch.logaddexp(old.logsumexp(-1, keepdim=True), beside)
    new = ((q1 * scale) @ across).float()
    future = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
    new.masked_fill_(future, -torch.inf)
    lse = torch.logaddexp(lse, new.logsumexp(-1, keepdim=True))
    return old.sub_(lse).exp_()


def group_mean(probability: Tensor) -> Tensor:
    """Of the highest that each query head pays, the mean over the group; for :func:`echo`."""
    return probability.amax(-2).mean(-3)


def second_mean(probability: Tensor) -> Tensor:
    """Mean of the two highest over queries and group; for :func:`echo`."""
    return probability.movedim(-4, -3).flatten(-3, -2).topk(2, -2).values.mean(-2)


def agreed(score: Tensor, power: float) -> Tensor:
    """``[L, H, P]``, times what all heads of all layers find of a token / of the average token,
    to this power: heads that do not see what a token is for follow those that do."""
    token = score.mean((0, 1))
    return score * (token / token.mean()) ** power


def carried(score: Tensor, factor: float) -> Tensor:
    """At least ``factor`` times the score of the token before, and ``factor ** 2`` of that before
    it, and so on: an answer is more than its first token."""
    fall = torch.arange(score.shape[-1], device=score.device) * math.log(factor)
    return ((score.clamp(min=1e-30).log() - fall).cummax(-1).values + fall).exp()


def odds(score: Tensor) -> Tensor:
    """Probabilities p as p / (1 - p), what dropping a key changes relative to what is left."""
    return score / (1 - score).clamp(min=1 / 64)


def levelled(score: Tensor, power: float, size: float = 0.9) -> Tensor:
    """Each head's scores over their own quantile ``size``, to this power."""
    level = score.quantile(size, dim=-1, keepdim=True).clamp(min=1e-9)
    return score / level**power


def replay(
    keys: Tensor, queries: Tensor, new_keys: Tensor, scale: float, rows: int = 256
) -> Tensor:
    """KVzip (arXiv 2505.23416): the highest probability that a real repetition gives each key.

    Args:
        queries: ``[*, H, G, T, D]`` of the repetition, which follows the P tokens.
        new_keys: ``[*, H, T, D]`` of it.
        rows: queries at a time.
    """
    best = torch.zeros(keys.shape[:-1], device=keys.device)
    total = queries.shape[-2]
    place = torch.arange(total, device=keys.device)
    for begin in range(0, total, rows):
        q = queries[..., begin : begin + rows, :] * scale
        old = (q @ keys.unsqueeze(-3).mT).float()
        new = (q @ new_keys.unsqueeze(-3).mT).float()
        new.masked_fill_(place[begin : begin + rows, None] < place, -torch.inf)
        lse = torch.logaddexp(old.logsumexp(-1, keepdim=True), new.logsumexp(-1, keepdim=True))
        best = torch.maximum(best, old.sub_(lse).exp_().amax((-2, -3)))
    return best


def later(keys: Tensor, queries: Tensor, scale: float, segment: int, nearest: int) -> Tensor:
    """The highest probability that a real later query gives each key, ``nearest`` tokens or more
    after it and up to ``2 * segment``; the denominator is over all that it sees.

    Args:
        queries: of all the P tokens.
    """
    length = keys.shape[-2]
    best = torch.zeros(keys.shape[:-1], device=keys.device)
    place = torch.arange(length, device=keys.device)
    for begin in range(0, length, segment):
        end = min(length, begin + segment)
        p = probabilities(keys[..., :end, :], queries[..., begin:end, :], scale)
        gap = place[begin:end, None] - place[:end]
        p = p.masked_fill(gap < nearest, 0).amax((-2, -3))
        best[..., :end] = torch.maximum(best[..., :end], p)
    return best


def keydiff(keys: Tensor, present: Tensor | None = None) -> Tensor:
    """KeyDiff (arXiv 2504.15364): how little a key is like the mean of normalised keys."""
    unit = F.normalize(keys.float(), dim=-1)
    anchor = unit if present is None else unit * present[..., None]
    anchor = F.normalize(anchor.sum(-2, keepdim=True), dim=-1)
    return -(unit * anchor).sum(-1)


def expected_attention(
    keys: Tensor, values: Tensor, queries: Tensor, rotate: Rotate, scale: float,
    epsilon: float = 0.02, future: int = 512,
) -> Tensor:  # fmt: skip
    """Expected Attention (arXiv 2510.00636) as published: mean and covariance of all queries before
    RoPE, rotated on the average to the next ``future`` positions; times the norm of values.

    Args:
        queries: of all the P tokens.
    """
    length, size = keys.shape[-2:]
    place = torch.arange(length, device=keys.device)
    plain = rotate(queries, -place)[..., SINKS:, :].float()
    mean = plain.mean(-2)
    centred = plain - mean[..., None, :]
    covariance = centred.mT @ centred / centred.shape[-2]
    unit = torch.eye(size, device=keys.device).expand(future, size, size)
    ahead = torch.arange(length, length + future, device=keys.device)
    turned = rotate(unit, ahead[:, None].expand(-1, size)).mean(0)  # row i: e_i turned
    mean = mean @ turned
    covariance = turned.T @ covariance @ turned
    k = keys.float()
    first = torch.einsum("...hgd,...hpd->...hgp", mean, k) * scale
    second = torch.einsum("...hpi,...hgij,...hpj->...hgp", k, covariance, k) * scale**2 / 2
    share = (first + second).softmax(-1).mean(-2)
    return (share + epsilon) * values.float().norm(dim=-1)


def triattention(
    keys: Tensor, queries: Tensor, rotate: Rotate, place: Tensor, now: int, scale: float,
    present: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """TriAttention, its query centres averaged over the ``queries`` given instead of calibrated.

    Per frequency f, ``q`` before RoPE: the mean over distances 1, 2, 4 ... 2^16 of what the centre
    of queries would pay, and what the spread of their moduli adds, z-scored per query head.

    Args:
        queries: at positions ``place`` ``[Q]``.
        now: position of the next token.
    """
    plain = rotate(queries, -place).float()
    centre = plain.mean(-2)  # [*, H, G, D]

    def modulus(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return (left.square() + right.square()).sqrt()

    distances = now + 2.0 ** torch.arange(17, device=keys.device)
    turned = rotate(centre[..., None, :].expand(*centre.shape[:-1], 17, -1), distances).mean(-2)
    k = keys.float()
    first = torch.einsum("...hgd,...hpd->...hgp", turned, k)
    spread = modulus(plain).mean(-2) - modulus(centre)
    score = (first + torch.einsum("...hgf,...hpf->...hgp", spread, modulus(k))) * scale
    if present is not None:
        there = present[..., None, :]
        total = there.sum(-1, keepdim=True)
        mean = (score * there).sum(-1, keepdim=True) / total
        deviation = ((score - mean).square() * there).sum(-1, keepdim=True) / total
        return ((score - mean) / deviation.sqrt()).amax(-2)
    return ((score - score.mean(-1, keepdim=True)) / score.std(-1, keepdim=True)).amax(-2)


def redundancy(
    keys: Tensor, importance: Tensor, share: float = 0.1, threshold: float = 0.5,
    present: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """R-KV (arXiv 2505.24133): ``share * importance - (1 - share) * redundancy``, the latter a
    softmax over keys of their mean cosine with the others, the latest near-duplicate exempt."""
    unit = F.normalize(keys.float(), dim=-1)
    if present is not None:
        unit = unit * present[..., None]
    alike = unit @ unit.mT
    alike.diagonal(dim1=-2, dim2=-1).zero_()
    place = torch.arange(alike.shape[-1], device=keys.device)
    latest = torch.where(alike > threshold, place, -1).amax(-1, keepdim=True)
    alike.scatter_(-1, latest.clamp(min=0), 0.0)
    mean = alike.mean(-2)
    if present is not None:
        mean = mean.masked_fill(~present, -torch.inf)
    return share * importance - (1 - share) * mean.softmax(-1)


def query_span(
    weighted: Tensor, surprise: Tensor, decay: float = 0.95, power: float = 0.5
) -> Tensor:
    """QuerySpan: what is attended to spreads to the following tokens as far as they surprise.

    Args:
        weighted: ``[*, H, P]`` of the window, probabilities times what a value adds, relative.
        surprise: ``[P]``, 1 - probability of each token given those before.
    """
    # The highest of all earlier ones, decayed by distance: a running maximum of logarithms.
    fall = torch.arange(weighted.shape[-1], device=weighted.device) * math.log(decay)
    spread = ((weighted.log() - fall).cummax(-1).values + fall).exp()
    return pooled(torch.maximum(weighted, spread * surprise**power), 3)


def mapped(scores: Tensor, exact: Tensor) -> Tensor:
    """``scores`` of each head on the scale of the first keys' ``exact`` ones, by quantiles."""
    size = exact.shape[-1]
    source = scores[..., :size].sort(-1).values.contiguous()
    target = exact.sort(-1).values
    rank = torch.searchsorted(source, scores.contiguous()).clamp(max=size - 1)
    result = target.gather(-1, rank)
    result[..., :size] = exact
    return result
