# SPDX-License-Identifier: Apache-2.0
"""Compression on a Ray cluster: what Ray's own configurations are given, and whether nodes are fit.

Needs ``pip install kvcompress_vllm[ray]`` on every node. ``examples/`` shows batch jobs (Ray Data)
and serving (Ray Serve); ``docs/parallel.md`` tells what was run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from kvcompress_vllm.config.options import KVCompressConfig

_SCHEDULER = "kvcompress_vllm.integration.engine.scheduler.make_scheduler"


def engine_kwargs(**options: Any) -> dict[str, Any]:
    """``engine_kwargs`` of Ray's ``vLLMEngineProcessorConfig`` and ``LLMConfig``.

    Beside the options they name our scheduler: a node that has vLLM without this package would
    take the options for somebody else's and not compress; now it fails to start.

    Args:
        options: as of ``--kv-compress``: ``ratio=8``.

    Raises:
        ValueError: bad options.
    """
    KVCompressConfig.from_dict(options)
    return {"additional_config": {"kv_compress": options}, "scheduler_cls": _SCHEDULER}


class Node(NamedTuple):
    """What a node says of itself."""

    name: str
    """Address, and what it calls itself."""
    version: str | None
    """Of this package; None: it is not installed."""
    problem: str | None
    """Why it cannot be imported there."""


def check_nodes(node_ids: Iterable[str] | None = None, timeout: float = 120) -> None:
    """Refuse nodes that lack this package, or have another version of it.

    Args:
        node_ids: Ray's; None: of all nodes that are alive.
        timeout: seconds that the nodes may take to answer.

    Raises:
        RuntimeError: naming the nodes and what to do.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    addresses = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    wanted = list(dict.fromkeys(addresses if node_ids is None else node_ids))

    def look() -> tuple[str, str | None, str | None]:
        # Sent as code, since the node may not have this module.
        import socket
        from importlib import metadata

        name, version, problem = socket.gethostname(), None, None
        try:
            import kvcompress_vllm  # noqa: F401

            version = metadata.version("kvcompress_vllm")
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return name, version, problem

    asked = [
        ray.remote(look)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote()
        for node in wanted
    ]
    try:
        answers = ray.get(asked, timeout=timeout)
    except ray.exceptions.GetTimeoutError as error:
        raise RuntimeError(
            f"kv_compress: not all of the nodes {', '.join(map(str, addresses.values()))} told "
            f"within {timeout:.0f} s whether kvcompress_vllm is installed there"
        ) from error
    nodes = [
        Node(f"{addresses.get(node)} ({name}, {node[:8]})", version, problem)
        for node, (name, version, problem) in zip(wanted, answers, strict=True)
    ]
    _refuse(nodes, look()[1])


def _refuse(nodes: Iterable[Node], version: str | None) -> None:
    """Raise for nodes that differ from this one."""
    wrong = [
        f"{node.name} has " + (f"{node.version}" if node.version else f"none ({node.problem})")
        for node in nodes
        if node.version is None or node.version != version
    ]
    if wrong:
        raise RuntimeError(
            f"kv_compress: every Ray node needs kvcompress_vllm {version}; node "
            f"{', node '.join(wrong)}. Install the same version of kvcompress_vllm[ray] there, or "
            "in the runtime_env of the job"
        )
