# SPDX-License-Identifier: Apache-2.0
"""One engine for the whole grid: between two calls its workers take another policy.

vLLM adds :class:`QualityWorker` to the engine's worker (``worker_extension_cls``). The scheduler
learns of each request's budget, which names the policy, from the front end (``measure.configure``).
What else it must know, such as which queries are observed, is the same for all, and so are the
shields and the floor: those that the engine was started with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kvcompress_vllm import policies
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.config.options import KVCompressConfig

ENGINE_OPTIONS = ("sinks", "recent", "min_tokens_per_head", "query_stride", "page_format")
"""Options that only an engine of its own can change, as the scheduler depends on them."""


class QualityWorker:
    """Methods for ``collective_rpc``; ``self`` is a ``KVCompressWorkerMixin``."""

    def quality_configure(self: Any, options: Mapping[str, Any]) -> None:
        """Compress like an engine started with ``options`` from now on.

        Raises:
            ValueError: they need an engine of their own.
        """
        config, started = KVCompressConfig.from_dict(options), self.kv_compress_config
        for name in ENGINE_OPTIONS:
            if getattr(config, name) != getattr(started, name):
                raise ValueError(f"{name}={getattr(config, name)!r} needs an engine of its own")
        if config.window > started.window:
            raise ValueError(f"window={config.window} is more than the engine's {started.window}")
        if config.query_stride and _history(config.policy) != _history(started.policy):
            raise ValueError(f"policy={config.policy!r} needs an engine of its own")
        if config.reads_echo() and not started.stores_echo:
            raise ValueError(f"policy={config.policy!r} needs an engine that stores echo scores")
        old = self.kv_compressor
        rank = old.rank
        self.kv_compressor = Compressor(config, rank.state, rank.pages, old._agree)

    def quality_force(self: Any) -> None:
        """Have requests generate the tokens that they name; see ``forcing.py``."""
        from benchmarks.quality import forcing  # imports vLLM

        forcing.attach(self.model_runner)

    def quality_record(self: Any) -> None:
        """Record from now on what is kept."""
        self.kv_compressor.record = {}

    def quality_recorded(self: Any) -> dict[str, list[list[list[int]]]]:
        """End the record; by request id, the kept keys of every layer and head of this rank."""
        return _by_layer(self, lambda keys: keys.tolist())

    def quality_recorded_pages(self: Any) -> dict[str, list[list[int]]]:
        """End the record; by request id, how many pages every layer and head of this rank keeps."""
        size = self.kv_compressor.pages.shape[1]
        return _by_layer(self, lambda keys: len(keys) // size)


def _history(policy: str) -> tuple[bool, int | None]:
    """Whether it judges by all queries, and by how many."""
    found = policies.find(policy)
    return found.observes_all, found.history


def _by_layer(worker: Any, of: Callable[[Tensor], Any]) -> dict[str, list[list[Any]]]:
    compressor = worker.kv_compressor
    record, compressor.record = compressor.record, None
    heads = compressor.state.num_pages.shape[2]
    return {
        name: [list(map(of, every[i : i + heads])) for i in range(0, len(every), heads)]
        for name, every in record.items()
    }
