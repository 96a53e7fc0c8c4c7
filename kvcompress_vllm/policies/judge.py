# SPDX-License-Identifier: Apache-2.0
"""Asks a policy, and trusts nothing that it answers.

A policy may come from another package. Whatever it raises or returns becomes a
:class:`PolicyError`, so that its fault is that of one request and not of all.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kvcompress_vllm.config.rules import shown
from kvcompress_vllm.policies.base import Evidence, Policy

T = TypeVar("T")


class PolicyError(Exception):
    """A policy raised, or returned what it must not; says which method and what."""


class Scores(NamedTuple):
    """What a policy says of a request's keys, checked but for what only the device knows."""

    scores: Tensor
    """``[L * H, n]`` fp32."""
    worth: Tensor | None
    """``[L * H, n]`` fp32; None: the scores."""
    wrong: Tensor
    """``[]`` bool on the device: a number that counts is not finite. Then neither of the above is
    the policy's: later keys come first, as in :func:`latest_first`."""


class Shares(NamedTuple):
    """How layers share the budget, ``[L]``, and the heads of each, ``[L, H]``; None: see
    :class:`Policy`."""

    layers: Tensor | None = None
    heads: Tensor | None = None


def scores(policy: Policy, evidence: Evidence, shielded: Tensor) -> Scores:
    """The policy's scores, and what it says that keys are worth.

    Args:
        shielded: of the evidence; the policy does not get hold of it.

    Raises:
        PolicyError: it raised, or returned no ``[L * H, n]`` tensor of fp32 on the device.
    """
    shape = (evidence.layers * evidence.heads, evidence.num_keys)
    found = _asked("score", lambda: policy.score(evidence))
    _check("score", found, shape, evidence, exact=True)
    worth = _asked("worth", lambda: policy.worth(evidence))
    if worth is not None:
        _check("worth", worth, shape, evidence, exact=True)
    finite = found.isfinite().logical_or_(shielded).all()
    if worth is not None:
        finite &= worth.isfinite().logical_or_(shielded).all()
    found = torch.where(finite, found, latest_first(evidence))
    if worth is not None:
        worth = torch.where(finite, worth, latest_first(evidence))
    return Scores(found, worth, ~finite)


def shares(policy: Policy, evidence: Evidence, scores: Tensor, allocator: str) -> Shares:
    """The shares that an allocator uses.

    Args:
        scores: of :func:`scores`, +inf where a range is protected.

    Raises:
        PolicyError: the policy raised, or returned no ``[L]`` or ``[L, H]`` tensor on the device.
    """
    layers = heads = None
    if allocator != "global":
        layers = _asked("layer_shares", lambda: policy.layer_shares(evidence))
        if layers is not None:
            _check("layer_shares", layers, (evidence.layers,), evidence)
        elif evidence.absent is not None and type(policy).layer_shares is not Policy.layer_shares:
            # It may have had some before: then layers differ in what they can give back.
            layers = torch.ones(evidence.layers, dtype=torch.float32, device=evidence.device)
    if allocator == "layer":
        heads = _asked("head_shares", lambda: policy.head_shares(evidence, scores))
        if heads is not None:
            _check("head_shares", heads, (evidence.layers, evidence.heads), evidence)
    return Shares(layers, heads)


def no_scores(evidence: Evidence) -> Scores:
    """In place of the scores of a policy that failed: all heads keep their latest keys."""
    scores = latest_first(evidence).expand(evidence.layers * evidence.heads, -1)
    return Scores(scores, None, torch.ones((), dtype=torch.bool, device=evidence.device))


def latest_first(evidence: Evidence) -> Tensor:
    """``[1, n]`` fp32: scores for a request whose policy has none. Finite, and the same on all."""
    return torch.arange(evidence.num_keys, dtype=torch.float32, device=evidence.device)[None]


def _asked(method: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except BaseException as error:  # sys.exit included: the engine is not a policy's to end
        if isinstance(error, KeyboardInterrupt) or _is_from_a_signal(error):
            raise
        raise PolicyError(f"{method} raised {type(error).__name__}: {error}") from error


def _is_from_a_signal(error: BaseException) -> bool:
    """Whether a signal handler raised it, which may happen in the middle of anything: vLLM ends its
    workers so."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    handlers = (signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT))
    raised_in = None if trace is None else trace.tb_frame.f_code
    return any(getattr(handler, "__code__", None) is raised_in for handler in handlers)


def _check(
    method: str, found: Tensor, shape: tuple[int, ...], evidence: Evidence, exact: bool = False
) -> None:
    wanted = f"a tensor of shape {shape}" + (" and dtype torch.float32" if exact else "")
    if not isinstance(found, Tensor):
        raise PolicyError(f"{method} returned {shown(found)}, not {wanted}")
    if tuple(found.shape) != shape or (
        found.dtype != torch.float32 if exact else found.is_complex()
    ):
        raise PolicyError(
            f"{method} returned shape {tuple(found.shape)} and dtype {found.dtype}, not {wanted}"
        )
    if found.device != evidence.device:
        raise PolicyError(f"{method} returned a tensor on {found.device}, not {evidence.device}")
