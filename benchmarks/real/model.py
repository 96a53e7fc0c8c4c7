# SPDX-License-Identifier: Apache-2.0
"""Llama and Gemma 3 in plain PyTorch, with every key, value and query at hand, on any device.

B contexts, K ways to mask each of them, M continuations of each. Layers whose window slides are
not compressed, and masks and scores leave them out, unless all are to be compressed alike.

    L layers that can be compressed    H KV heads    G query heads per KV head    D head size
    P tokens of the context            T tokens that follow
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Context:
    """Tokens whose keys are there. Keys and queries are those after RoPE."""

    keys: Tensor  # [B, all layers, H, P, D]
    values: Tensor
    queries: Tensor  # [B, L, H, G, P, D]
    last: Tensor  # [B, V], logits after the last token
    surprise: Tensor | None = None  # [B, P], 1 - probability of each token; the first: 1
    norms: Tensor | None = None  # [B, L, P], of the hidden state that enters the layer

    @property
    def length(self) -> int:
        """P."""
        return self.keys.shape[3]


class Model:
    """A checkpoint directory of ``transformers``.

    Args:
        directory: with ``config.json`` and ``model.safetensors``.
        dtype: of weights and activations; softmax and norms are fp32.
        every_layer: whether layers whose window slides can be compressed, too.

    Attributes:
        layers: indices of those that can be compressed.

    Raises:
        ValueError: another architecture.
    """

    def __init__(
        self, directory: Path, device: str, dtype: torch.dtype, every_layer: bool = False
    ) -> None:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        kind = config["architectures"][0]
        if kind not in ("LlamaForCausalLM", "Gemma3ForCausalLM"):
            raise ValueError(f"architecture {kind} of {directory} is not accepted")
        self.device, self.dtype = torch.device(device), dtype
        self._weights = {
            name: weight.to(self.device, dtype)
            for name, weight in load_file(directory / "model.safetensors").items()
        }
        self.num_layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_key_value_heads"]
        self.group: int = config["num_attention_heads"] // self.heads
        self.head_dim: int = config["head_dim"]
        self._eps: float = config["rms_norm_eps"]
        self._gemma = kind.startswith("Gemma")
        kinds = config.get("layer_types") or ["full_attention"] * self.num_layers
        self._full = {i for i, name in enumerate(kinds) if name == "full_attention"}
        self.layers = [i for i in range(self.num_layers) if every_layer or i in self._full]
        self._sliding: int = config.get("sliding_window") or 0
        self.scale = (config.get("query_pre_attn_scalar") or self.head_dim) ** -0.5
        exponent = torch.arange(0, self.head_dim, 2, device=self.device) / self.head_dim
        self.frequency = config["rope_theta"] ** -exponent
        self._local = config.get("rope_local_base_freq", 10000.0) ** -exponent
        self._embedding = self._weights["model.embed_tokens.weight"]
        self._output = self._weights.get("lm_head.weight", self._embedding)
        self._size: int = config["hidden_size"]

    def rotate(
        self, x: Tensor, distance: Tensor | float, frequency: Tensor | None = None
    ) -> Tensor:
        """``x`` ``[..., D]`` as if it stood ``distance`` tokens later (``[...]``, or a number)."""
        frequency = self.frequency if frequency is None else frequency
        angle = torch.as_tensor(distance, device=x.device).float()[..., None] * frequency
        sin, cos = (torch.cat([part, part], -1).to(x.dtype) for part in (angle.sin(), angle.cos()))
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def rotation(self, index: int) -> Callable[..., Tensor]:
        """:meth:`rotate` as the ``index``-th of :attr:`layers` does it."""
        return partial(self.rotate, frequency=self._frequency_of(self.layers[index]))

    def window(self, index: int) -> int | None:
        """Tokens that the ``index``-th of :attr:`layers` sees; None: all."""
        return None if self.layers[index] in self._full else self._sliding

    def _frequency_of(self, layer: int) -> Tensor:
        return self.frequency if layer in self._full else self._local

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, details: bool = False) -> Context:
        """Read ``[B, P]`` with full attention.

        Args:
            details: keep ``surprise`` and ``norms``, too.
        """
        x = self._embed(tokens)
        keys, values, queries, norms = [], [], [], []
        length = tokens.shape[1]
        for layer in range(self.num_layers):
            if layer in self.layers:
                norms.append(x.float().norm(dim=-1))
            q, k, v = self._qkv(layer, x, 0)
            mask = None
            if layer not in self._full:
                place = torch.arange(length, device=self.device)
                gap = place[:, None] - place
                mask = (gap >= 0) & (gap < self._sliding)
            attended = F.scaled_dot_product_attention(
                q.flatten(1, 2),
                k.repeat_interleave(self.group, 1),
                v.repeat_interleave(self.group, 1),
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
            )
            x = self._rest(layer, x, attended.transpose(1, 2).flatten(2))
            keys.append(k)
            values.append(v)
            if layer in self.layers:
                queries.append(q)
        surprise = None
        if details:
            surprise = torch.ones(tokens.shape, device=self.device)
            for i, row in enumerate(x):
                p = self._logits(row[:-1]).float().softmax(-1)
                surprise[i, 1:] = 1 - p.gather(1, tokens[i, 1:, None])[:, 0]
        return Context(
            torch.stack(keys, 1),
            torch.stack(values, 1),
            torch.stack(queries, 1),
            self._logits(x[:, -1]),
            surprise,
            torch.stack(norms, 1) if details else None,
        )

    @torch.inference_mode()
    def follow(
        self,
        keys: Tensor,
        values: Tensor,
        kept: Tensor | None,
        tokens: Tensor,
        position: int,
        wanted: Tensor | None = None,
        cache: bool = False,
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
        """Read ``tokens`` ``[B, M, T]`` (or ``[B, K, M, T]``) over the kept keys of a context.

        Args:
            keys: ``[B, all layers, H, P, D]``; ``values`` alike.
            kept: ``[B, K, L, H, P]`` bool; None: all, K = 1.
            position: of the first token.
            wanted: ``[B, M, W]`` places in T whose logits are returned; None: none are.
            cache: return keys, values and queries of the tokens, too (K = M = 1).

        Returns:
            ``[B, K, M, W, V]`` logits; and keys and values ``[B, all layers, H, T, D]``, queries
            ``[B, L, H, G, T, D]``.
        """
        b, past = keys.shape[0], keys.shape[3]
        ways = 1 if kept is None else kept.shape[1]
        if tokens.dim() == 3:
            tokens = tokens[:, None].expand(-1, ways, -1, -1)
        m, t = tokens.shape[2:]
        place = torch.arange(t, device=self.device)
        future = (place[:, None] < place).repeat(self.group, 1)  # [G * T, T]
        slides = far = None
        if len(self._full) < self.num_layers:
            slides = future | (place[:, None] - place >= self._sliding).repeat(self.group, 1)
            gap = place[:, None] + position - torch.arange(past, device=self.device)
            far = (gap >= self._sliding).repeat(m * self.group, 1)  # [M * G * T, P]
        x = self._embed(tokens.flatten(0, 2))
        every: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            q, k, v = self._qkv(layer, x, position)  # [B * K * M, H, (G,) T, D]
            full = layer in self._full
            new = ((q.flatten(2, 3) * self.scale) @ k.mT).float()  # [B * K * M, H, G * T, T]
            new.masked_fill_(future if full or slides is None else slides, -torch.inf)
            ahead = (q * self.scale).reshape(b, ways, m, self.heads, -1, self.head_dim)
            ahead = ahead.permute(0, 3, 1, 2, 4, 5).reshape(b, self.heads, -1, self.head_dim)
            old = (ahead @ keys[:, layer].mT).float().view(b, self.heads, ways, -1, past)
            if not full and far is not None:
                old.masked_fill_(far, -torch.inf)
            if kept is not None and layer in self.layers:
                mask = kept[:, :, self.layers.index(layer)]  # [B, K, H, P]
                old.masked_fill_(~mask.transpose(1, 2)[:, :, :, None], -torch.inf)
            lse_old = old.logsumexp(-1, keepdim=True)  # [B, H, K, M * G * T, 1]
            back = lse_old.view(b, self.heads, ways, m, -1, 1).permute(0, 2, 3, 1, 4, 5)
            lse = torch.logaddexp(back.flatten(0, 2), new.logsumexp(-1, keepdim=True))
            whole = lse.view(b, ways, m, self.heads, -1, 1).permute(0, 3, 1, 2, 4, 5)
            p = old.sub_(whole.reshape_as(lse_old)).exp_().to(self.dtype)
            attended = p.flatten(2, 3) @ values[:, layer]  # [B, H, K * M * G * T, D]
            attended = attended.view(b, self.heads, ways, m, -1, self.head_dim)
            attended = attended.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
            attended = attended + (new - lse).exp().to(self.dtype) @ v
            attended = attended.reshape(-1, self.heads * self.group, t, self.head_dim)
            x = self._rest(layer, x, attended.transpose(1, 2).flatten(2))
            if cache:
                every.append((k, v, q) if layer in self.layers else (k, v))
        logits = None
        if wanted is not None:
            x = x.view(b, ways, m, t, -1)
            index = wanted[:, None, :, :, None].expand(b, ways, -1, -1, x.shape[-1])
            logits = self._logits(x.gather(3, index))
        if not cache:
            return logits, None
        found = (
            torch.stack([part[0] for part in every], 1),
            torch.stack([part[1] for part in every], 1),
            torch.stack([part[2] for part in every if len(part) == 3], 1),
        )
        return logits, found

    def value_norms(self, values: Tensor) -> Tensor:
        """``[B, L, H, G, P]``: norm of what each key's value adds to the hidden state, from
        ``values`` ``[B, L, H, P, D]``."""
        result = []
        for i, layer in enumerate(self.layers):
            weight = self._weights[f"model.layers.{layer}.self_attn.o_proj.weight"]
            weight = weight.unflatten(1, (self.heads, self.group, self.head_dim)).float()
            gram = torch.einsum("chgd,chge->hgde", weight, weight)
            v = values[:, i].float()
            result.append(torch.einsum("bhpd,hgde,bhpe->bhgp", v, gram, v).clamp(min=0).sqrt())
        return torch.stack(result, 1)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self._embedding)
        return x * torch.tensor(self._size**0.5, dtype=self.dtype) if self._gemma else x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weights[f"model.{name}.weight"].float()
        if self._gemma:
            weight = 1 + weight
        return F.rms_norm(x.float(), x.shape[-1:], weight, self._eps).to(self.dtype)

    def _linear(self, x: Tensor, layer: int, name: str) -> Tensor:
        return F.linear(x, self._weights[f"model.layers.{layer}.{name}_proj.weight"])

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self._norm(x, "norm"), self._output)

    def _qkv(self, layer: int, x: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """``[N, H, G, T, D]`` and twice ``[N, H, T, D]``, rotated."""
        h = self._norm(x, f"layers.{layer}.input_layernorm")
        q, k, v = (
            self._linear(h, layer, f"self_attn.{name}")
            .unflatten(-1, (-1, self.head_dim))
            .transpose(1, 2)
            for name in "qkv"
        )
        if self._gemma:
            q = self._norm(q, f"layers.{layer}.self_attn.q_norm")
            k = self._norm(k, f"layers.{layer}.self_attn.k_norm")
        place = torch.arange(position, position + x.shape[1], device=self.device)
        frequency = self._frequency_of(layer)
        q, k = self.rotate(q, place, frequency), self.rotate(k, place, frequency)
        return q.unflatten(1, (self.heads, self.group)), k, v

    def _rest(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection of attention ``[N, T, H * G * D]`` and the MLP."""
        name = f"layers.{layer}"
        out = self._linear(attended, layer, "self_attn.o")
        if self._gemma:
            out = self._norm(out, f"{name}.post_attention_layernorm")
        x = x + out
        before = "pre_feedforward_layernorm" if self._gemma else "post_attention_layernorm"
        h = self._norm(x, f"{name}.{before}")
        gate = self._linear(h, layer, "mlp.gate")
        gate = F.gelu(gate, approximate="tanh") if self._gemma else F.silu(gate)
        out = self._linear(gate * self._linear(h, layer, "mlp.up"), layer, "mlp.down")
        if self._gemma:
            out = self._norm(out, f"{name}.post_feedforward_layernorm")
        return x + out
