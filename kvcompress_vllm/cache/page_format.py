# SPDX-License-Identifier: Apache-2.0
"""How packed pages hold keys (the twin of ``csrc/page_format.h``). Letters as in ``layout.py``.

Nothing else in the Python package knows how many bytes a key takes. A page has the bytes of B keys
in the cache's own 16-bit dtype, ``[B, 2 * D]``. Only packed pages have another format: tails and
vLLM's own blocks stay as they are.

======  =====  =======================  ==================================  ====================
format  T      number x is              scales of a (request, layer, head)  of a head size D
======  =====  =======================  ==================================  ====================
auto    B      itself                   none                                any
fp8     2 * B  e4m3(code) * scale       [1, 2]: of K, of V                  a multiple of 16
int4    4 * B  of H z, z = (code - 8)   [2, 2 * D]: scale, then zero, of    a multiple of 32
               * scale + zero; code     every channel of K, then of V,
               in [0, 16)               after the rotation
======  =====  =======================  ==================================  ====================

H rotates blocks of P channels of K and of V, the largest power of two that divides D: an unscaled
Hadamard matrix, H H = P I, so that a few large channels or keys spread over all (QuaRot, arXiv
2404.00456; :func:`to_stored`).

The bytes of a packed page are ``[T, 2 * D]`` codes, K and V of one key side by side; of two 4-bit
codes in a byte, the first is the lower half. Within K and within V the channels stand in the order
that the tensor cores take them in (:func:`order`), so that a lane of a warp reads what it needs at
once.

Scales are bfloat16, rounded so that the codes reach what they should: rounding a scale up costs
less than 1 % of a step. When a request is compressed again they stay, unless new keys lie beyond
the codes. The scale of ``fp8`` then doubles as often as needed, which moves no code that stays
normal. A channel of ``int4`` reaches for as much of what lies beyond as pays for moving what was
kept (:func:`.fitting.widen`).
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16
FP8_MAX = 448.0
"""Largest e4m3 number."""
INT4_LOW, INT4_HIGH = -8.0, 7.0
"""Codes of int4 as steps from the zero."""


class PageFormat(enum.IntEnum):
    """Format of packed pages; the number is the ops' ``page_format``."""

    AUTO = 0
    FP8 = 1
    INT4 = 2

    @classmethod
    def of(cls, name: str) -> PageFormat:
        """From ``auto``, ``fp8`` or ``int4``.

        Raises:
            ValueError: it is none of them.
        """
        known = {each.label: each for each in cls}
        if name not in known:
            raise ValueError(f"page_dtype must be one of {', '.join(known)}, not {name!r}")
        return known[name]

    @property
    def label(self) -> str:
        """``auto``, ``fp8`` or ``int4``."""
        return self.name.lower()

    @property
    def blocks_per_page(self) -> int:
        """T / B: blocks of tokens whose keys a packed page holds. F is a multiple of it."""
        return (1, 2, 4)[self]

    def keys_per_page(self, block_size: int) -> int:
        """T, keys that a packed page holds."""
        return self.blocks_per_page * block_size

    def key_bytes(self, head_size: int) -> int:
        """Bytes of K and V of one packed key, where the cache has 16 bits per number."""
        return 4 * head_size // self.blocks_per_page

    def scales_shape(self, head_size: int) -> tuple[int, int]:
        """``(A, S)``, what the state holds per (slot, layer, head)."""
        return ((0, 0), (1, 2), (2, 2 * head_size))[self]

    def scales_bytes(self, head_size: int) -> int:
        """The same in bytes."""
        rows, columns = self.scales_shape(head_size)
        return rows * columns * SCALE_DTYPE.itemsize

    def new_scales(
        self, slots: int, layers: int, heads: int, head_size: int, device: torch.device
    ) -> Tensor | None:
        """``[U, L, H, A, S]`` zeros, the state table ``page_scales``; None: there is none."""
        if self is PageFormat.AUTO:
            return None
        shape = (slots, layers, heads, *self.scales_shape(head_size))
        return torch.zeros(shape, dtype=SCALE_DTYPE, device=device)

    def problem(self, head_size: int, dtype: torch.dtype) -> str | None:
        """Why a cache cannot have this format, as one line; None: it can.

        Args:
            head_size: D.
            dtype: of the cache.
        """
        multiple = (1, 16, 32)[self]
        if head_size % multiple:
            needed = f"a head size that {multiple} divides"
            return f"page_dtype={self.label} needs {needed}, not {head_size}"
        if self is not PageFormat.AUTO and dtype not in (torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            return f"page_dtype={self.label} needs a cache of float16 or bfloat16, not {name}"
        return None


def order(head_size: int, page_format: int) -> Tensor:
    """``[2 * D]`` int64: which channel (K, then V) is at each place of a packed key.

    With the matrix instruction m16n8k16, lane c of four takes channels ``8 i + 2 c`` and ``8 i + 2
    c + 1`` of a key, for all i, as pairs whose halves lie 16 bits apart in a word; lane r of eight
    takes channels ``8 i + r`` of a value.
    """
    if page_format == PageFormat.AUTO:
        return torch.arange(2 * head_size)
    half = (0, 2, 4)[page_format]  # pairs of codes in 4 bytes
    channel = torch.arange(head_size).view(head_size // 8 // half, half, 4, 2)  # words, pairs, c, b
    keys = channel.permute(2, 0, 3, 1).flatten()
    values = torch.arange(head_size).view(head_size // 8, 8).T.flatten()
    return torch.cat([keys, values + head_size])


def packed_codes(pages: Tensor, page_format: PageFormat) -> Tensor:
    """``[P, T, bytes of a key]`` uint8: all pages, as if each were packed. Shares their memory.

    Args:
        pages: ``[P, B, 2 * D]`` of 16 bits.
    """
    _, block_size, channels = pages.shape
    keys, key_bytes = page_format.keys_per_page(block_size), page_format.key_bytes(channels // 2)
    return pages.view(torch.uint8).view(-1, keys, key_bytes)


def to_stored(values: Tensor, page_format: int) -> Tensor:
    """What codes stand for, of K/V ``[..., 2 * D]`` fp32: of int4, their rotation over P."""
    if page_format != PageFormat.INT4:
        return values
    return _hadamard(values / _rotated_together(values))


def from_stored(values: Tensor, page_format: int) -> Tensor:
    """The inverse of :func:`to_stored`: ``H H / P`` is the identity."""
    return _hadamard(values) if page_format == PageFormat.INT4 else values


def _rotated_together(values: Tensor) -> int:
    """P, of ``[..., 2 * D]``: how many neighbouring channels a block of the rotation has."""
    head_size = values.shape[-1] // 2
    return head_size & -head_size


def _hadamard(values: Tensor) -> Tensor:
    """``[..., 2 * D]``: blocks of P channels times a Hadamard matrix.

    Sums and differences of channels 1, 2, 4, ... apart, in this order, which every kernel keeps::

        a b c d  ->  a+b a-b c+d c-d  ->  (a+b)+(c+d) (a-b)+(c-d) (a+b)-(c+d) (a-b)-(c-d)
    """
    distance = 1
    while distance < _rotated_together(values):
        first, second = values.unflatten(-1, (-1, 2, distance)).unbind(-2)
        values = torch.stack([first + second, first - second], -2).flatten(-3)
        distance *= 2
    return values


def quantise(values: Tensor, scales: Tensor, page_format: int) -> Tensor:
    """Codes of numbers.

    Args:
        values: ``[n, 2 * D]`` fp32, K then V, as :func:`to_stored` has them.
        scales: ``[A, S]``, of their head.

    Returns:
        ``[n, bytes of a key]`` uint8, as they lie in a page.
    """
    scale, zero = _per_channel(scales, values.shape[-1], page_format)
    steps = ((values - zero) * inverse(scale))[:, order(values.shape[-1] // 2, page_format)]
    if page_format == PageFormat.FP8:
        return steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = (steps.round().clamp(INT4_LOW, INT4_HIGH) + 8).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def dequantise(codes: Tensor, scales: Tensor, page_format: int) -> Tensor:
    """K/V that codes stand for.

    Args:
        codes: ``[..., n, bytes of a key]`` uint8, as they lie in a page.
        scales: ``[..., A, S]``, of their head.

    Returns:
        ``[..., n, 2 * D]`` fp32.
    """
    return from_stored(decode(codes, scales, page_format), page_format)


def decode(codes: Tensor, scales: Tensor, page_format: int) -> Tensor:
    """The same as :func:`to_stored` has it, so that it can be quantised again without a turn."""
    if page_format == PageFormat.FP8:
        steps = codes.view(torch.float8_e4m3fn).float()
    else:
        steps = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).float() - 8
    values = torch.empty_like(steps)
    values[..., order(steps.shape[-1] // 2, page_format)] = steps
    scale, zero = _per_channel(scales, steps.shape[-1], page_format)
    # Without a zero, so that -0.0 keeps its sign and its code.
    return values * scale if page_format == PageFormat.FP8 else values * scale + zero


def _per_channel(scales: Tensor, channels: int, page_format: int) -> tuple[Tensor, Tensor]:
    """``[..., 1, 2 * D]`` fp32 each: scale and zero of every channel."""
    if page_format == PageFormat.FP8:
        scale = scales.float().repeat_interleave(channels // 2, dim=-1)
        return scale, torch.zeros_like(scale)
    scale, zero = scales.float().split(1, dim=-2)
    return scale, zero


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where it is too small for one: of numbers that the zero alone stands for."""
    return torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, 0)
