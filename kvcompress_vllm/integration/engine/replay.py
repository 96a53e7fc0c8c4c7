# SPDX-License-Identifier: Apache-2.0
"""Contexts that are repeated (``exact=kvzip``), as requests of vLLM's own scheduler.

Each part of a repetition (``scheduling/replay.py``) is a request behind the blocks of the context,
which it shares with the one who computed them, and who does nothing meanwhile. vLLM plans, cuts and
preempts it like any prefill; nobody hears of its one token. The blocks of both are kept out of the
prefix cache: those of the context hold scores that others must not find, the others are thrown
away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.integration.compat.releases import sequences_at_a_time, waiting_queues
from kvcompress_vllm.integration.engine.kv_cache import PRIVATE, KVCompressManager
from kvcompress_vllm.integration.frontend.requests import has_embeddings
from kvcompress_vllm.records.budget import KEEP_ALL, RequestBudget
from kvcompress_vllm.records.plan import Replay
from kvcompress_vllm.scheduling import replay
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.request import Tracked


class Repetition:
    """Of the context of one request.

    Args:
        owner: who computed it.
        num_context: its tokens, whole blocks.
        pending: see :func:`replay.parts`.
    """

    def __init__(
        self, owner: Request, num_context: int, pending: Iterator[tuple[list[int], int]]
    ) -> None:
        self.owner, self.num_context, self._pending = owner, num_context, pending
        self.part: Request | None = None
        """The request that is under way."""
        self.counted = 0
        """Its tokens that count end here."""
        self.begins = True
        """Nothing of it was computed yet."""
        self._number = 0

    def next_part(self) -> Request | None:
        """The request of the next part; None: all are done."""
        found = next(self._pending, None)
        if found is None:
            return None
        tokens, count = found
        owner = self.owner
        assert owner.prompt_token_ids is not None  # embeddings are refused
        context = owner.prompt_token_ids[: self.num_context]
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        self.part = Request(
            f"{owner.request_id}-kv-compress-replay-{id(self):x}-{self._number}",
            [*context, *tokens],
            params,
            None,
            client_index=owner.client_index,
            # Preempted before the owner, without whom it is in vain.
            arrival_time=owner.arrival_time + 1e-6,
            priority=owner.priority,
            lora_request=owner.lora_request,
        )
        self.counted, self._number = self.num_context + count, self._number + 1
        return self.part


class Replays:
    """Has contexts repeated before they are packed.

    Args:
        scheduler: that computes the parts.
        planner: says whose context is to be repeated.
        manager: of the blocks.
    """

    def __init__(
        self, scheduler: Scheduler, planner: CompressionPlanner, manager: KVCompressManager
    ) -> None:
        self._scheduler, self._planner, self._manager = scheduler, planner, manager
        self._repetitions: dict[str, Repetition] = {}
        self._parts: dict[str, Repetition] = {}
        self._prompt: list[int] | None = None
        self._budget = resolve(planner.config, KEEP_ALL)

    @property
    def parts(self) -> Collection[str]:
        """Requests that repeat a context, or did until now."""
        return self._parts

    def __contains__(self, request_id: str) -> bool:
        """Whether a request is one of the parts."""
        return request_id in self._parts

    def __len__(self) -> int:
        """Contexts that are being repeated."""
        return len(self._repetitions)

    def prepare(self) -> None:
        """Know the tokens of the prompt that asks for a repetition.

        Raises:
            ValueError: there is no tokenizer to tell them, or they are too many.
        """
        if self._prompt is None:
            from vllm.tokenizers import cached_tokenizer_from_config

            config = self._scheduler.vllm_config.model_config
            if config.skip_tokenizer_init:
                raise ValueError("exact=kvzip needs a tokenizer (--skip-tokenizer-init is given)")
            tokenizer: Any = cached_tokenizer_from_config(config)
            prompt = list(tokenizer.encode(replay.REPEAT, add_special_tokens=False))
            if len(prompt) > replay.MOST_PROMPT:
                raise ValueError(
                    f"exact=kvzip: {replay.REPEAT!r} has {len(prompt)} tokens; there is room for "
                    f"{replay.MOST_PROMPT}"
                )
            self._prompt = prompt

    def check(self, request: Request, budget: RequestBudget) -> None:
        """Refuse a context that cannot be repeated, though its request came past the front end.

        Raises:
            ValueError: saying why.
        """
        self.prepare()
        n = budget.context_tokens or 0
        if not replay.may_repeat(n, self._scheduler.max_model_len):
            raise ValueError(f"exact=kvzip: no room to repeat a context of {n} tokens")
        if has_embeddings(request) or request.mm_features:
            raise ValueError("exact=kvzip: what is repeated must be text")
        if not self._manager.enable_caching or sequences_at_a_time(self._scheduler) < 2:
            raise ValueError("exact=kvzip needs the prefix cache and two sequences at a time")

    def advance(self, computed: Mapping[str, int]) -> dict[str, str]:
        """Go on to the next part wherever one is done; before a step is planned.

        Args:
            computed: computed tokens of every running request.

        Returns:
            Why requests fail, by id.
        """
        failures: dict[str, str] = {}
        waiting = {t.request_id: t for t in self._planner.to_replay(computed)}
        if not waiting and not self._repetitions:
            return failures
        for name in self._repetitions.keys() - waiting.keys():
            self._drop(name)  # its owner is gone, or computes it anew
        for name, tracked in waiting.items():
            repetition = self._repetitions.get(name) or self._begin(tracked)
            part = repetition.part
            if part is not None and not part.is_finished():
                continue
            if part is not None:
                del self._parts[part.request_id]
                if part.status != RequestStatus.FINISHED_LENGTH_CAPPED:
                    failures[name] = f"the repetition of its context ended as {part.status.name}"
                    self._drop(name)
                    continue
            part = repetition.next_part()
            if part is None:
                del self._repetitions[name]
                self._planner.replayed(name)
            else:
                self._parts[part.request_id] = repetition
                self._enqueue(part)
        return failures

    def hold_back(self) -> tuple[bool, list[Request]]:
        """Whether a part waits, and then who waits beside it: all others. Who computed its context
        waits for it, with blocks that whoever comes before it may wait for."""
        queues = waiting_queues(self._scheduler) if self._repetitions else ()
        waiting = [request for queue in queues for request in queue]
        others = [request for request in waiting if request.request_id not in self._parts]
        waits = len(others) < len(waiting)
        return waits, others if waits else []

    def blocks(self, request: Request) -> list[KVCacheBlock]:
        """Those of its context, for a part that starts."""
        repetition = self._parts[request.request_id]
        row = self._manager.req_to_blocks[repetition.owner.request_id]
        return list(row[: repetition.num_context // self._manager.block_size])

    def computes(self, request_id: str, first: int, num_tokens: int) -> list[Replay]:
        """What a step scores of a part that computes ``num_tokens`` tokens from ``first`` on."""
        repetition, size = self._parts[request_id], self._manager.block_size
        end = min(first + num_tokens, repetition.counted)
        if end <= first or num_tokens < 2:
            return []
        begins, repetition.begins = repetition.begins, False
        return [
            Replay(
                request_id,
                first,
                end,
                repetition.num_context // size,
                self._manager.row(request_id, -(-end // size)),
                begins,
            )
        ]

    def own_blocks(self, request: Request) -> int:
        """Blocks that a part takes beside those of its context."""
        repetition, size = self._parts[request.request_id], self._manager.block_size
        return -(-request.num_tokens // size) - repetition.num_context // size

    def chunk(self, request: Request, first: int, num_tokens: int) -> int:
        """See :func:`replay.chunk`."""
        return replay.chunk(num_tokens, request.num_tokens - first)

    def without(self, outputs: Sequence[Any]) -> list[Any]:
        """Outputs that are for somebody."""
        return [output for output in outputs if output.request_id not in self._parts]

    def _begin(self, tracked: Tracked) -> Repetition:
        assert self._prompt is not None  # since the request was checked
        owner, n = self._scheduler.requests[tracked.request_id], tracked.due_at
        assert owner.prompt_token_ids is not None
        parts = replay.parts(
            owner.prompt_token_ids[:n], self._prompt, self._scheduler.max_model_len
        )
        self._repetitions[tracked.request_id] = repetition = Repetition(owner, n, parts)
        return repetition

    def _enqueue(self, part: Request) -> None:
        setattr(part, PRIVATE, True)
        part.kv_compress_budget = self._budget  # type: ignore[attr-defined]
        self._scheduler.add_request(part)

    def _drop(self, owner: str) -> None:
        part = self._repetitions.pop(owner).part
        if part is None:
            return
        if not part.is_finished():
            self._scheduler.finish_requests(part.request_id, RequestStatus.FINISHED_ABORTED)
        self._parts.pop(part.request_id, None)
