# SPDX-License-Identifier: Apache-2.0
"""vLLM's executors on Ray, which look at the nodes before they start workers there.

A worker on a node without this package would say no more than that a module is missing.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
from vllm.v1.executor.ray_utils import initialize_ray_cluster

from kvcompress_vllm.integration.compat.releases import those_taken
from kvcompress_vllm.ray import check_nodes


class KVCompressRayExecutorV2(RayExecutorV2):
    """vLLM's default on Ray: message queues between the engine and actors."""

    def _init_executor(self) -> None:
        check(self, require_gpu_on_driver=False)
        super()._init_executor()


def looking_at_nodes(found: type[Executor]) -> type[Executor]:
    """Our subclass of an executor on Ray; itself where there is none."""
    if found is RayExecutorV2:
        found = KVCompressRayExecutorV2
    elif found.__name__ == "RayDistributedExecutor":  # which vLLM means to remove
        from kvcompress_vllm.integration.start.ray_graphs import KVCompressRayExecutor

        found = KVCompressRayExecutor
    return found


def check(executor: Executor, **arguments: Any) -> None:
    """Refuse the nodes of an executor's placement group that lack this package.

    Args:
        arguments: of vLLM's call that makes the group; its own then finds it. 0.33 no longer knows
            ``require_gpu_on_driver``, because it never requires one.
    """
    from ray.util import placement_group_table

    arguments = those_taken(initialize_ray_cluster, arguments)
    initialize_ray_cluster(executor.parallel_config, **arguments)
    table = placement_group_table(executor.parallel_config.placement_group)
    check_nodes(table["bundles_to_node_id"].values())
