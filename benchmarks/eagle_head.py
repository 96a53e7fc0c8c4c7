# SPDX-License-Identifier: Apache-2.0
"""Train a small EAGLE head for a Llama, to see what compression does to what it drafts.

    python -m benchmarks.eagle_head models/smollm2 texts models/smollm2-eagle --minutes 20

The head of EAGLE (arXiv 2401.15077): one decoder layer, without the norm at its input, reads the
model's last hidden state and the embedding of the token that follows, and says the next hidden
state; the model's own output layer turns that into a token. It learns the model's distribution over
the next token (their cross entropy, and a smooth L1 loss between hidden states), from texts of
which every fifth is held out (``benchmarks.speculation --texts`` asks about these). Targets are
computed anew for every batch, so that no memory is needed for them. Good enough to be accepted now
and then; nothing to serve.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.real.samples import SOURCES, Maker

NOISE = 0.1
"""Half the width of the uniform noise on hidden states that EAGLE trains with: what it reads later
are its own."""
HIDDEN_WEIGHT = 0.1
"""Of the smooth L1 loss beside the cross entropy, the reverse of the paper's: small models have
small hidden states."""


class Head(nn.Module):
    """What vLLM loads as ``EagleLlamaForCausalLM``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        layer = LlamaDecoderLayer(config, 0)
        layer.input_layernorm = nn.Identity()
        self.layers = nn.ModuleList([layer])
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """
        Args:
            embedded: of the token behind each position. Shape (sequences, tokens, hidden size).
            hidden: the model's at each position, behind its last norm. The same shape.

        Returns:
            What the model's will be one position later. The same shape.
        """
        states: Tensor = self.fc(torch.cat([embedded, hidden], -1))
        places = torch.arange(states.shape[1], device=states.device)[None]
        out = self.layers[0](
            states, position_embeddings=self.rotary(states, places), position_ids=places
        )
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.eagle_head",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="directory of a Llama")
    parser.add_argument("texts", type=Path, help="as of benchmarks.models text")
    parser.add_argument("directory", type=Path, help="to write")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--sequences", type=int, default=4, help="of a batch")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(args.device)
    model.requires_grad_(False)
    config = model.config
    config._attn_implementation = "sdpa"
    head = Head(config).to(args.device)
    maker = Maker(AutoTokenizer.from_pretrained(args.model), args.texts, held_out=False)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.learning_rate, weight_decay=0.01)
    begin, step, draw = time.monotonic(), 0, random.Random(0)
    while (done := (time.monotonic() - begin) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 50) * (1 - done)
        rows = [
            maker.text(SOURCES[i % len(SOURCES)], args.tokens, 0, draw.randrange(2**32)).context
            for i in range(args.sequences)
        ]
        loss, agreed = losses(model, head, torch.tensor(rows, device=args.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            print(f"{done:.0%}: loss {loss.item():.3f}, first draft right {agreed:.3f}", flush=True)
    save(head, config, args.directory)


def losses(model: nn.Module, head: Head, tokens: Tensor) -> tuple[Tensor, float]:
    """Loss of a batch, and how often the head's likeliest token is the model's.

    Position t of the head: the hidden state of token t, the embedding of token t + 1; what it says
    is compared with the hidden state of token t + 1, of which the model tells token t + 2.

    Args:
        tokens: Shape (sequences, tokens).
    """
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        logits = model.lm_head(hidden[:, 1:])
        embedded = model.model.embed_tokens(tokens[:, 1:]).float()
    before, after = hidden[:, :-1].float(), hidden[:, 1:].float()
    noise = (torch.rand_like(before) * 2 - 1) * NOISE
    said = head(embedded, before + noise)
    drafted = model.lm_head(said.to(hidden.dtype)).float()
    target = logits.float().softmax(-1)
    entropy = -(target * drafted.log_softmax(-1)).sum(-1).mean()
    agreed = (drafted.argmax(-1) == logits.argmax(-1)).float().mean().item()
    return entropy + HIDDEN_WEIGHT * nn.functional.smooth_l1_loss(said, after), agreed


def save(head: Head, config: LlamaConfig, directory: Path) -> None:
    """Write what ``--speculative-config '{"model": directory, "method": "eagle"}'`` takes."""
    directory.mkdir(parents=True, exist_ok=True)
    values = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(values, indent=1))
    weights = {
        name: value.detach().to(torch.bfloat16).cpu().contiguous()
        for name, value in head.state_dict().items()
        if not name.startswith("rotary")
    }
    save_file(weights, directory / "model.safetensors")
    print(f"{directory}: {sum(value.numel() for value in weights.values()):,} parameters")


if __name__ == "__main__":
    main()
