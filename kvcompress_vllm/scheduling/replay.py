# SPDX-License-Identifier: Apache-2.0
"""A real repetition of a context (``exact=kvzip``): what is repeated when. No vLLM types.

KVzip (https://arxiv.org/abs/2505.23416, Kim et al., 2025) has the model repeat its context and
keeps what the repetition attends to. Here a context of n tokens that requests share is repeated
once, before it is packed, in parts: each is a prefill of its own that goes on behind the context,
of a prompt that asks for a repetition and of so many of its tokens. Their K/V are thrown away;
what is left is, by key of the context, the highest probability that any of their queries paid to
it. That is what policies then judge by who read echo scores.

The one who computes the context does nothing meanwhile; parts are scheduled like any prefill, one
after the other. A part that is preempted begins anew, which changes nothing: a maximum counts what
it sees twice but once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

REPEAT = "\n\nRepeat the previous context exactly.\n\n"
"""Before every part."""
PART = 2048
"""Tokens of a part, as in the paper."""
LEAST_PART = 256
"""Tokens of a part at least, where the longest request leaves room for no more."""
MOST_PROMPT = 64
"""Tokens that :data:`REPEAT` may take."""
ROOM = MOST_PROMPT + LEAST_PART + 2
"""Positions that there must be behind a context that is repeated: one does not count, and vLLM
keeps one for what it samples."""


def may_repeat(context: int, max_tokens: int) -> bool:
    """Whether there is room for that behind so many tokens.

    Args:
        max_tokens: longest possible request.
    """
    return context + ROOM <= max_tokens


def parts(
    context: Sequence[int], repeat: Sequence[int], max_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """What is computed behind a context, in turn, and how many tokens of each count.

    Each ends with a token that does not count: it may come alone, in a step that scores nothing.

    Args:
        context: its n tokens.
        repeat: tokens of the prompt.
        max_tokens: longest possible request.
    """
    size = min(PART, max_tokens - len(context) - len(repeat) - 2)
    for begin in range(0, len(context), size):
        tokens = [*repeat, *context[begin : begin + size]]
        yield [*tokens, context[0]], len(tokens)


FEWEST = 2
"""Tokens of a repetition that a step computes at least, but for its last: one alone may be scored
by nobody."""


def chunk(num_tokens: int, left: int) -> int:
    """How many of ``num_tokens`` tokens of a part the next step computes: never one alone of which
    more are left, for a step of single tokens may score nothing.

    Args:
        left: tokens of the part that are not computed.
    """
    return 0 if num_tokens < min(FEWEST, left) else num_tokens
