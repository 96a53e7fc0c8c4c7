# SPDX-License-Identifier: Apache-2.0
"""What compression after prefill costs in accuracy, measured without vLLM and without our ops.

A second, literal implementation of the algorithm for Llama models: one forward in fp32 PyTorch,
the keys to drop chosen by sorting everything, dropped keys masked per (layer, KV head). It serves
to choose defaults and as an oracle for the engine. It shares no code with kvcompress_vllm.

    python -m benchmarks.masking_study --tasks single,kv40 --samples 20 --ratio 2,4,8
    python -m benchmarks.masking_study --one-at-a-time --window 8,1,4,16 --pool 15,1,7,31 --ratio 4

Every option of a setting takes a comma-separated list; all combinations run, or with
``--one-at-a-time`` those that differ from the first values in one option only (all ratios each).
One JSON line per (task, setting): samples, how many answers were exactly right, and the mean
negative log likelihood of the answer in nats. Greedy decoding gives the answer exactly if each of
its tokens is the most likely one after those before it, so one forward over the answer tells for
many settings at once; :meth:`Llama.generate` really decodes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.retrieval import TaskGen

ROOT = Path(__file__).parents[1]
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Setting:
    """One way to compress. Lengths in tokens."""

    ratio: float = 1.0
    """Whole blocks of the prompt / kept blocks."""
    score: str = "attention"
    """Or the controls: random, streaming (the latest keys)."""
    allocator: str = "global"
    """Who competes for pages: all heads (global), those of a layer (layer), none (uniform)."""
    window: int = 8
    """Last prompt tokens whose attention is the score."""
    pool: int = 127
    """Width of the maximum that is taken of neighbouring scores."""
    pool_over: str = "candidates"
    """Keys whose scores spread to neighbours: all, candidates, or open (without shielded ones)."""
    recent: int = 16
    """Last prompt tokens, always kept."""
    sinks: int = 4
    """First prompt tokens, always kept."""
    min_tokens: int = 16
    """What each head keeps at least, rounded up to pages."""


@dataclass(frozen=True)
class Prompt:
    """A prompt after prefill, keys and queries after RoPE."""

    keys: Tensor  # [L, H, P, D]
    values: Tensor  # [L, H, P, D]
    queries: Tensor  # [L, H, G, P, D]
    first_logits: Tensor  # [V], for the token after the prompt

    @property
    def length(self) -> int:
        """P."""
        return self.keys.shape[2]


class Llama:
    """The forward pass of a ``LlamaForCausalLM`` checkpoint, in fp32."""

    def __init__(self, model_dir: Path) -> None:
        config = json.loads((model_dir / "config.json").read_text())
        self._weights = {
            k: v.float() for k, v in load_file(model_dir / "model.safetensors").items()
        }
        self._layers: int = config["num_hidden_layers"]
        self._heads: int = config["num_key_value_heads"]
        self._group: int = config["num_attention_heads"] // self._heads
        self._head_size: int = config["head_dim"]
        self._eps: float = config["rms_norm_eps"]
        exponent = torch.arange(0, self._head_size, 2) / self._head_size
        self._frequency = config["rope_theta"] ** -exponent
        self._end: int = config["eos_token_id"]
        embedding = self._weights["model.embed_tokens.weight"]
        self._output = self._weights.get("lm_head.weight", embedding)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> Prompt:
        """Run the prompt with full attention."""
        caches = []
        x = self._embed(torch.tensor([tokens]))
        for layer in range(self._layers):
            q, k, v = self._qkv(layer, x, 0)
            attended = F.scaled_dot_product_attention(
                q.flatten(1, 2), k.repeat_interleave(self._group, 1),
                v.repeat_interleave(self._group, 1), is_causal=True,
            )  # fmt: skip
            x = self._rest_of_layer(layer, x, attended.unflatten(1, (self._heads, self._group)))
            caches.append((k[0], v[0], q[0]))
        keys, values, queries = map(torch.stack, zip(*caches, strict=True))
        return Prompt(keys, values, queries, self._logits(x[0, -1]))

    @torch.inference_mode()
    def continue_masked(self, prompt: Prompt, kept: Tensor, tokens: Tensor) -> Tensor:
        """Logits ``[N, T, V]`` after each of ``tokens`` ``[N, T]``, which follow the prompt, when
        row n sees only the prompt's keys in ``kept[n]`` (``[N, L, H, P]`` bool)."""
        n, t = tokens.shape
        future = torch.ones(t, t, dtype=torch.bool).triu(1).repeat_interleave(self._group, 0)
        x = self._embed(tokens)
        for layer in range(self._layers):
            q, k, v = self._qkv(layer, x, prompt.length)  # [N, H, (G,) T, D]
            q = q.transpose(2, 3).flatten(2, 3) * self._head_size**-0.5  # [N, H, T * G, D]
            old = q.transpose(0, 1).flatten(1, 2) @ prompt.keys[layer].mT  # [H, N * T * G, P]
            old = old.unflatten(1, (n, -1)).transpose(0, 1)  # [N, H, T * G, P]
            old.masked_fill_(~kept[:, layer, :, None], -torch.inf)
            new = (q @ k.mT).masked_fill_(future, -torch.inf)
            p = torch.cat([old, new], -1).softmax(-1)
            old = p[..., : prompt.length].transpose(0, 1).flatten(1, 2) @ prompt.values[layer]
            attended = old.unflatten(1, (n, -1)).transpose(0, 1) + p[..., prompt.length :] @ v
            attended = attended.unflatten(2, (t, self._group)).transpose(2, 3)
            x = self._rest_of_layer(layer, x, attended)
        return self._logits(x)

    def generate(self, prompt: Prompt, kept: Tensor, max_tokens: int) -> list[int]:
        """Greedy tokens up to ``</s>`` inclusive; the first one from the uncompressed prefill."""
        tokens = [int(prompt.first_logits.argmax())]
        while len(tokens) < max_tokens and tokens[-1] != self._end:
            logits = self.continue_masked(prompt, kept[None], torch.tensor([tokens]))
            tokens.append(int(logits[0, -1].argmax()))
        return tokens

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self._weights["model.embed_tokens.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._weights[f"model.{name}.weight"], self._eps)

    def _linear(self, x: Tensor, layer: int, name: str) -> Tensor:
        return F.linear(x, self._weights[f"model.layers.{layer}.{name}_proj.weight"])

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self._norm(x, "norm"), self._output)

    def _qkv(self, layer: int, x: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """``[N, H, G, T, D]`` and twice ``[N, H, T, D]``, rotated."""
        h = self._norm(x, f"layers.{layer}.input_layernorm")
        q, k, v = (
            self._linear(h, layer, f"self_attn.{name}").unflatten(-1, (-1, self._head_size))
            for name in "qkv"
        )
        angle = torch.arange(position, position + x.shape[1])[:, None] * self._frequency
        sin, cos = angle.sin().repeat(1, 2), angle.cos().repeat(1, 2)

        def rotate(y: Tensor) -> Tensor:
            left, right = y.chunk(2, -1)
            return y * cos + torch.cat([-right, left], -1) * sin

        q = q.transpose(1, 2).unflatten(1, (self._heads, self._group))
        return rotate(q), rotate(k.transpose(1, 2)), v.transpose(1, 2)

    def _rest_of_layer(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection of attention ``[N, H, G, T, D]`` and the MLP."""
        merged = attended.permute(0, 3, 1, 2, 4).flatten(2)
        x = x + self._linear(merged, layer, "self_attn.o")
        h = self._norm(x, f"layers.{layer}.post_attention_layernorm")
        gated = F.silu(self._linear(h, layer, "mlp.gate")) * self._linear(h, layer, "mlp.up")
        return x + self._linear(gated, layer, "mlp.down")


def attention_scores(prompt: Prompt, window: int) -> Tensor:
    """``[L, H, P]``: sum of squared probabilities over the last queries and the group."""
    queries = prompt.queries[..., -window:, :]
    n = queries.shape[3]
    logits = queries @ prompt.keys[:, :, None].mT * queries.shape[-1] ** -0.5
    hidden = torch.ones(n, prompt.length, dtype=torch.bool).triu(prompt.length - n + 1)
    return logits.masked_fill_(hidden, -torch.inf).softmax(-1).square().sum((2, 3))


def kept_keys(prompt: Prompt, setting: Setting, seed: int = 0) -> Tensor:
    """``[L, H, P]`` bool: the keys that survive. ``seed`` is for random scores."""
    layers, heads, length, _ = prompt.keys.shape
    num_blocks = length // BLOCK_SIZE
    candidates = num_blocks * BLOCK_SIZE
    recent = min(candidates, max(0, setting.recent - (length - candidates)))
    sinks = min(setting.sinks, candidates - recent)
    floor = math.ceil(max(sinks + recent, min(setting.min_tokens, candidates)) / BLOCK_SIZE)
    kept_blocks = max(floor, math.ceil(num_blocks / setting.ratio))

    position = torch.arange(length)
    shielded = (position < sinks) | (position >= candidates - recent)
    if setting.score == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(layers, heads, length, generator=generator)
    elif setting.score == "streaming":
        scores = position.float().expand(layers, heads, length)
    else:
        scores = attention_scores(prompt, setting.window)
        if setting.pool_over != "all":
            scores[..., candidates:] = 0
        if setting.pool_over == "open":
            scores[..., shielded] = 0
        scores = F.max_pool1d(scores, setting.pool, 1, setting.pool // 2)
    scores = scores[..., :candidates].masked_fill(shielded[:candidates], torch.inf)

    ascending, order = scores.flatten(0, 1).sort(stable=True)
    evictable = (num_blocks - floor) * BLOCK_SIZE
    cost = ascending[:, BLOCK_SIZE - 1 : evictable : BLOCK_SIZE]  # [L * H, pages]
    groups = {"global": 1, "layer": layers, "uniform": layers * heads}[setting.allocator]
    cost = cost.reshape(groups, -1)
    freed = (num_blocks - kept_blocks) * layers * heads // groups
    cheapest = torch.zeros_like(cost, dtype=torch.bool)
    cheapest.scatter_(1, cost.sort(stable=True).indices[:, :freed], True)
    num_dropped = cheapest.view(layers * heads, -1).sum(1) * BLOCK_SIZE
    dropped = torch.zeros(layers * heads, length, dtype=torch.bool)
    dropped[:, :candidates].scatter_(1, order, torch.arange(candidates) < num_dropped[:, None])
    return ~dropped.view(layers, heads, length)


def judge(
    llama: Llama, prompt: Prompt, answer: Sequence[int], kept: Sequence[Tensor], rows: int = 512
) -> Iterator[tuple[bool, float]]:
    """Per mask: would greedy decoding give exactly ``answer``, and its negative log likelihood."""
    target = torch.tensor(answer)
    step = max(1, rows // len(answer))
    for begin in range(0, len(kept), step):
        masks = torch.stack(list(kept[begin : begin + step]))
        logits = llama.continue_masked(prompt, masks, target[:-1].expand(len(masks), -1))
        logits = torch.cat([prompt.first_logits.expand(len(masks), 1, -1), logits], 1)
        exact = (logits.argmax(-1) == target).all(1)
        nll = -logits.log_softmax(-1).gather(2, target.expand(len(masks), -1)[..., None])
        yield from zip(exact.tolist(), nll.sum((1, 2)).tolist(), strict=True)


def _settings(arguments: argparse.Namespace) -> list[Setting]:
    choices = {
        f.name: [type(f.default)(part) for part in getattr(arguments, f.name).split(",")]
        for f in fields(Setting)
    }
    ratios = choices.pop("ratio")
    if arguments.one_at_a_time:
        base = Setting(**{name: values[0] for name, values in choices.items()})
        settings = [base]
        settings += [replace(base, **{k: v}) for k, vs in choices.items() for v in vs[1:]]
    else:
        settings = [
            Setting(**dict(zip(choices, values, strict=True)))
            for values in itertools.product(*choices.values())
        ]
    return [replace(setting, ratio=ratio) for ratio in ratios for setting in settings]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny")
    parser.add_argument("--tasks", default="single,multikey,kv40,qa,copy,vt2")
    parser.add_argument("--length", type=int, default=1900)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0, help="tuning seeds: below 100,000")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one-at-a-time", action="store_true")
    for field in fields(Setting):
        parser.add_argument("--" + field.name.replace("_", "-"), default=str(field.default))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = _settings(arguments)
    llama, generator = Llama(arguments.model), TaskGen.load(arguments.model)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    for task in arguments.tasks.split(","):
        exact, nll = [0] * len(settings), [0.0] * len(settings)
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.samples):
            text, answer = generator.task(task, arguments.length, seed)
            prompt = llama.prefill(tokenizer.encode(text).ids)
            target = tokenizer.encode(answer + "</s>", add_special_tokens=False).ids
            kept = [kept_keys(prompt, setting, seed) for setting in settings]
            for i, (right, loss) in enumerate(judge(llama, prompt, target, kept)):
                exact[i] += int(right)
                nll[i] += loss
        for setting, hits, loss in zip(settings, exact, nll, strict=True):
            line = {"task": task, "length": arguments.length, "samples": arguments.samples,
                    "exact": hits, "nll": round(loss / arguments.samples, 4)}  # fmt: skip
            print(json.dumps(line | asdict(setting)), flush=True)


if __name__ == "__main__":
    main()
