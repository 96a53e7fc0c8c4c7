# SPDX-License-Identifier: Apache-2.0
"""A dry run of a policy on made-up evidence, before an engine depends on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvcompress_vllm import policies
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.policies import judge
from kvcompress_vllm.policies.base import Evidence, Policy

L, H, G, D = 2, 2, 2, 8

LENGTHS = ((256, 64, False), (256, 128, True), (64, 16, False))
"""Candidate keys, kept ones, and whether heads were packed before; the last has only shields."""


def check(name: str, config: KVCompressConfig) -> None:
    """Try a policy as it would be used.

    Args:
        name: of the policy.
        config: with that policy; its options, window and allocator are used.

    Raises:
        ValueError: naming the policy, what is wrong, and what to do.
    """
    policy = config.create_policy()
    for num_keys, num_kept, packed in LENGTHS:
        made_up = evidence(policy, config, num_keys, num_kept, packed)
        try:
            with torch.inference_mode(), _one_thread():
                scores, _, wrong = judge.scores(policy, made_up, made_up.shielded())
                if bool(wrong):
                    raise judge.PolicyError("score or worth returned numbers that are not finite")
                judge.shares(policy, made_up, scores, config.allocator)
        except judge.PolicyError as error:
            raise ValueError(
                f"kv_compress: policy={name!r} failed a trial with {num_keys} made-up keys: "
                f"{error}; correct it (docs/extend.md) or name another policy"
            ) from error


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Start no threads of OpenMP: the engine may be forked from this process, and would wait for
    ever for threads that a fork leaves behind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def allowed(config: KVCompressConfig) -> tuple[KVCompressConfig, dict[str, str]]:
    """The configuration with ``allow_policies`` as what requests may really choose.

    Policies of ours are not tried again; our tests did. Those of other packages are, the configured
    one and all that requests may choose.

    Returns:
        The configuration; where it allowed all, those that are left out, and why.

    Raises:
        ValueError: the configured policy, or one that ``allow_policies`` names, fails.
    """
    if config.policy in policies.others():
        check(config.policy, config)
    if config.allow_policies is not True:
        for name in set(config.allowed_policies()) & set(policies.others()) - {config.policy}:
            check(name, config.with_policy(name))
        return config, {}
    failed: dict[str, str] = {}
    for name in policies.others():
        try:
            check(name, config.with_policy(name))
        except ValueError as error:
            failed[name] = str(error)
    if not failed:
        return config, {}
    left = tuple(name for name in policies.names() if name not in failed)
    return replace(config, allow_policies=left), failed


def evidence(
    policy: Policy, config: KVCompressConfig, num_keys: int, num_kept: int, packed: bool
) -> Evidence:
    """Of two layers of two heads, with statistics of random attention. On the CPU."""
    generator = torch.Generator().manual_seed(num_keys)
    tail = 3

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32)

    def of_layer(*shape: int) -> Callable[[int], Tensor]:
        return lambda layer: random(*shape) - 0.5

    absent = None
    if packed:
        absent = torch.arange(num_keys) < torch.tensor([0, 16, 32, 48])[:, None]
    statistics = {channel: random(L * H, num_keys) for channel in sorted(policy.channels)}
    if absent is not None:
        for values in statistics.values():
            values.masked_fill_(absent, 0)
    counts = None
    if policy.observes_all and config.query_stride:
        counts = torch.full((L * H, num_keys), 40.0, dtype=torch.float32)
    return Evidence(
        layers=L,
        heads=H,
        group=G,
        num_keys=num_keys,
        num_kept=num_kept,
        seq_len=num_keys + tail,
        num_queries=40 if counts is not None else min(config.window, num_keys),
        num_sinks=config.sinks if num_kept > 16 else 8,
        num_recent=min(config.recent, num_kept // 2),
        scale=D**-0.5,
        device=torch.device("cpu"),
        statistics=statistics,
        counts=counts,
        density=0.5 if packed else 1.0,
        absent=absent,
        keys=of_layer(H, num_keys + tail, D),
        values=of_layer(H, num_keys + tail, D),
        queries=of_layer(H, G, min(config.window, num_keys), D),
    )
