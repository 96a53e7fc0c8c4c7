# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler with a pretend model behind it, for tests of the accounting.

The pretend worker keeps real pages, real state tables and the real compressor. The K of a
token is a tag of its whole prefix, so that :meth:`Simulation.check_contents` can tell for every
key of every request whether it is one the request should have. Tags and positions are written in
binary, a digit in each channel, which packed pages of every format give back.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.metrics.stats import PrefixCacheStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvcompress_vllm import ops
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.compression.pending import PendingReports
from kvcompress_vllm.compression.step import start_step
from kvcompress_vllm.integration.engine.kv_cache import KVCompressSpec
from kvcompress_vllm.integration.frontend.requests import (
    check_length,
    check_request,
    send_budget,
)
from kvcompress_vllm.integration.sizing import draft_tokens, observe_slots, state_slots
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.integration.worker import reports
from kvcompress_vllm.integration.worker.longest_request import check_longest_request
from kvcompress_vllm.integration.worker.metadata import observe_unverified
from kvcompress_vllm.ops.reference.rows import State
from kvcompress_vllm.records.budget import Ranges
from kvcompress_vllm.records.kernel_blocks import in_kernel_blocks, split
from kvcompress_vllm.records.plan import Replay, StepPlan
from kvcompress_vllm.reporting.metrics import StepReport
from kvcompress_vllm.scheduling.segments import DECODED, SEGMENT, segments

MODEL = Path(__file__).parents[2] / "models" / "tiny"
L, H, G, D, B = 2, 2, 2, 32, 16


@dataclass
class PretendWorker:
    """What a rank does, without a model: rows, K/V tags, queries and compressions."""

    state: PackedState
    pages: torch.Tensor
    compressor: Compressor
    window: int
    rows: dict[str, list[int]] = field(default_factory=dict)
    pending: list[PendingReports] = field(default_factory=list)
    echoes: dict[str, torch.Tensor] = field(default_factory=dict)
    """By request, where echo scores are stored: those that its keys should have."""
    observed: dict[int, tuple[str, int]] = field(default_factory=dict)
    """By place in the ring, the request and the tag of the token whose query is there."""
    saved: dict[int, list[int]] = field(default_factory=dict)
    """By first block that holds queries, the tags of their tokens."""
    replayed: dict[str, int] = field(default_factory=dict)
    """By request, tokens of the latest repetition of its context."""
    packed: dict[int, torch.Tensor] = field(default_factory=dict)
    """By first packed block, where echo scores are stored: those that its keys had."""
    windows: tuple[int, ...] = ()
    """Of cache groups that are not compressed; in vLLM's order these come first."""
    window_rows: dict[str, list[list[int]]] = field(default_factory=dict)
    """Rows of those groups, by request."""
    window_tags: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """``[N, B]``: what a layer of those groups holds of a token. A block is one group's only."""
    window_wanted: dict[str, torch.Tensor] = field(default_factory=dict)
    """By request: the same of its tokens. Computed from fewer keys than their hash says, they are
    others' than those of a prefix that was not compressed."""
    behind: set[str] = field(default_factory=set)
    """Requests that are packed."""
    kernel_blocks: int = 1
    """Of a block; rows here are of kernel blocks."""
    state_tags: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """``[N]``: of what tokens a block holds the state; -1: it holds pages, or nothing."""

    def run(self, output, tokens: dict[str, list[int]], unscored: dict[str, int]) -> None:
        """
        Args:
            unscored: where what a request found begins that has no echo score.
        """
        plan: StepPlan = output.kv_compress
        prefixes = {item.request_id: item.row_prefix for item in plan.compressions}
        plan = in_kernel_blocks(plan, self.kernel_blocks)
        for heard in plan.heard:
            assert heard.blocks == self.rows[heard.request_id][: len(heard.blocks)]
            segment = SEGMENT if self.state.window >= SEGMENT else DECODED
            assert heard.first // segment == (heard.end - 1) // segment
            self._check_ring(heard, range(heard.first, heard.end), tokens[heard.request_id])
            self._score(heard.request_id, tokens[heard.request_id], heard.first, heard.end)
        for item in plan.compressions:
            if item.observed is None:
                window = range(max(0, item.num_tokens - self.window), item.num_tokens)
                self._check_ring(item, window, tokens[item.request_id])
        for item in plan.saved:
            self._save(item)
        self.pending = start_step(plan, [self.compressor])
        for item in plan.compressions:
            row = self.rows[item.request_id]
            row[: item.covered] = split(prefixes[item.request_id], self.kernel_blocks)
            self._take(item.new_blocks)
            if self.state.echo is not None:
                self.packed[row[0]] = self.echoes[item.request_id][: item.num_tokens].clone()
            self.behind.add(item.request_id)
        for request_id in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.rows.pop(request_id, None)
            self.behind.discard(request_id)
        for new in output.scheduled_new_reqs:
            self._new_rows(new.req_id, new.block_ids)
            self._begin(new.block_ids[-1], output)
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self._new_rows(request_id, blocks)
                self._begin(blocks[-1], output)
            elif blocks is not None:
                *others, ours = blocks
                self.rows[request_id] += split(ours, self.kernel_blocks)
                self._begin(ours, output)
                for row, more in zip(self.window_rows[request_id], others, strict=True):
                    row += more
        observed = defaultdict(list)
        for item in plan.observations:
            observed[item.request_id].append(item)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for request_id, told in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            # With steps in flight the scheduler may count what is rejected by now.
            drafted = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
            computed[request_id] = min(told, len(tokens[request_id]) - drafted - 1)
        for item in plan.loaded:
            self._load(item, tokens[item.request_id])
        fresh = [new.req_id for new in output.scheduled_new_reqs] + list(cached.resumed_req_ids)
        for request_id in fresh if self.state.echo is not None else ():
            # What it found in the prefix cache must be there as if it had computed it.
            self.echoes[request_id] = torch.zeros(1 << 13)
            for begin, end in segments(0, computed[request_id]):
                own = tokens[request_id]
                self.echoes[request_id][begin:end] = echo_of(own, begin, end)
            row = self.rows[request_id]
            if self.state.slot_of(row) >= 0:  # it takes a context
                found = self.packed[row[0]]
                self.echoes[request_id][: len(found)] = found
            # What it found beyond that has no score yet.
            self.echoes[request_id][unscored.get(request_id, 1 << 13) :] = 0
        for request_id in fresh:
            # What it found in the prefix cache must be as if nobody had been compressed.
            # It may be computed in this very step, before the request itself.
            self.window_wanted[request_id] = torch.tensor(prefix_tags(tokens[request_id]))
        spans = {item.request_id: item for item in plan.echoes}
        for request_id, count in output.num_scheduled_tokens.items():
            first = computed[request_id]
            if self.state.echo is not None:
                self._store(request_id, torch.arange(first, first + count), torch.tensor(0.5))
                self.echoes[request_id][first : first + count] = 0
            if request_id in spans:
                _, scored, end, behind = spans[request_id]
                assert first <= scored and end + behind == first + count and behind >= 0
                for begin, stop in segments(scored, end):
                    self._score(request_id, tokens[request_id], begin, stop)
            self._forward(request_id, tokens[request_id], first, count, observed[request_id])
            self._compute_windows(request_id, tokens[request_id], first, count)
        for item in plan.replays:
            assert item.first == computed[item.request_id]
            self._repeat(item, tokens[item.request_id])

    def _repeat(self, item: Replay, tokens: list[int]) -> None:
        """Raise scores of a context, here and of the one who computed it."""
        own = item.blocks[: item.num_context]
        assert self.rows[item.request_id][: len(item.blocks)] == item.blocks
        (owner,) = (
            name
            for name, row in self.rows.items()
            if row[: len(own)] == own and name != item.request_id
        )
        n = len(own) * B
        wanted = self.echoes[owner][:n]
        if item.begins:
            wanted.zero_()
            self.replayed[owner] = 0
        self.replayed[owner] += item.end - item.first
        scores = torch.zeros(n)
        for position in range(item.first, item.end):
            scores[position % n] = max(scores[position % n], (tokens[position] % 997 + 1) / 998)
        wanted.copy_(torch.maximum(wanted, scores))
        self._store(owner, torch.arange(n), wanted)

    def _save(self, item) -> None:
        """Queries of tokens that follow each other are in the slot."""
        place, count = self._place(item), len(item.blocks) * B // item.num_tokens
        found = [self.observed[place + i] for i in range(item.num_tokens)]
        assert {name for name, _ in found} == {item.request_id}, item
        for i in range(0, item.num_tokens, B):
            self.saved[item.blocks[i * count // B]] = [tag for _, tag in found[i : i + B]]

    def _load(self, item, tokens) -> None:
        """Those of other tokens would be; and they are there, bit by bit."""
        place, count = self._place(item), len(item.blocks) * B // item.num_tokens
        tags = prefix_tags(tokens)
        for i in range(item.num_tokens):
            own = tags[item.first + i]
            assert self.saved[item.blocks[i // B * count]][i % B] == own, (item, i)
            self.observed[place + i] = item.request_id, own
            found = self.state.ring.flatten(1, 2)[:, place + i]
            assert found.equal(query_of(own).to(found.dtype)), (item, i)

    def _place(self, item) -> int:
        return item.observe_slot * self.state.window + item.first % self.state.window

    def _check_ring(self, item, positions, tokens) -> None:
        """The queries of these tokens, and of no rejected ones, are in an observation slot."""
        tags, size = prefix_tags(tokens), self.state.window
        for position in positions:
            found = self.observed.get(item.observe_slot * size + position % size)
            assert found == (item.request_id, tags[position]), (item, position, found)

    def _new_rows(self, request_id, blocks) -> None:
        *others, ours = blocks
        self.rows[request_id] = split(ours, self.kernel_blocks)
        self.window_rows[request_id] = [list(row) for row in others]
        self.behind.discard(request_id)

    def _begin(self, blocks, output) -> None:
        """Zero what a step begins to use of our blocks, where states may have been."""
        if len(self.state_tags):
            assert set(blocks) <= set(output.new_block_ids_to_zero), (blocks, output)
            self.pages.view(len(self.state_tags), -1)[blocks] = 0

    def _take(self, kernel_blocks) -> None:
        """Write pages: whatever state was there is gone."""
        if len(self.state_tags):
            self.state_tags[torch.tensor(kernel_blocks) // self.kernel_blocks] = -1

    def _update_states(self, request_id, tokens, first, count) -> None:
        """The state of the tokens before is there; what lay beside it in the block is no more."""
        tags = prefix_tags(tokens)
        for (block,) in self.window_rows[request_id][len(self.windows) :]:
            if first:
                assert self.state_tags[block] == tags[first - 1], (request_id, first, block)
            self.state_tags[block] = tags[first + count - 1]
            self.pages.view(len(self.state_tags), -1)[block] = float("nan")

    def _compute_windows(self, request_id, tokens, first, count) -> None:
        self._update_states(request_id, tokens, first, count)
        if not self.windows:
            return
        self._check_windows(request_id, first)
        tags = torch.tensor(prefix_tags(tokens))
        if request_id in self.behind:
            tags = -tags - 1
        wanted = torch.cat([self.window_wanted[request_id][:first], tags[first : first + count]])
        self.window_wanted[request_id] = wanted
        positions = torch.arange(first, first + count)
        for row in self.window_rows[request_id][: len(self.windows)]:
            self.window_tags[torch.tensor(row)[positions // B], positions % B] = wanted[positions]

    def _check_windows(self, request_id, end) -> None:
        """What the query of token ``end`` sees through its windows is all there."""
        for window, row in zip(self.windows, self.window_rows[request_id], strict=False):
            positions = torch.arange(max(0, end - window + 1), end)
            blocks = torch.tensor(row)[positions // B] if end else positions
            assert (blocks > 0).all(), (request_id, end, row)
            found, wanted = self.window_tags[blocks, positions % B], self.window_wanted[request_id]
            assert found.equal(wanted[positions]), (request_id, end, window)

    def _score(self, request_id, tokens, begin, end) -> None:
        scores = echo_of(tokens, begin, end)
        self._store(request_id, torch.arange(begin, end), scores)
        self.echoes[request_id][begin:end] = scores

    def _store(self, request_id, positions, scores) -> None:
        page = torch.tensor(self.rows[request_id])[positions // B][:, None] * (L * H)
        page = page + torch.arange(L * H)
        self.state.echo[page, (positions % B)[:, None]] = scores.expand(len(positions))[:, None]

    def _forward(self, request_id, tokens, first, count, observations) -> None:
        positions = torch.arange(first, first + count)
        row = torch.tensor(self.rows[request_id])
        tags = torch.tensor(prefix_tags(tokens)[first : first + count])
        slot = torch.arange(L * H)
        target = row[positions // B][:, None] * (L * H) + slot
        value = torch.cat([digits(tags), digits(positions)], -1)[:, None].repeat(1, L * H, 1)
        value[..., :D] *= 1 + 2 * slot[:, None]  # so that heads differ in what they attend to
        self.pages[target, (positions % B)[:, None]] = value.to(self.pages.dtype)
        self._take(row[positions // B].tolist())
        index = torch.full((count,), -1, dtype=torch.int32)
        for observation in observations:
            assert 0 <= observation.first_token - first <= observation.unverified
            if observation.unverified:
                seq_lens = torch.tensor([0, first + count])
                observe_unverified(index, [(observation, 1, 0, count)], seq_lens, self.state.window)
            else:
                positions = observation.positions(count, self.state.window)
                places = observation.places(positions, self.state.window)
                for position, place in zip(positions, places, strict=True):
                    assert index[position - first] == -1
                    index[position - first] = place
        if observations:
            query = torch.zeros(L, count, H * G, D, dtype=self.state.ring.dtype)
            for token, place in enumerate(index.tolist()):
                if place >= 0:
                    tag = int(tags[token])
                    self.observed[place] = request_id, tag
                    query[:, token] = query_of(tag)
            for layer in range(L):
                ops.observe_queries(query[layer], index, self.state.ring[layer].flatten(0, 1))


def digits(numbers: torch.Tensor) -> torch.Tensor:
    """``[n, D]``: binary, lowest digit first."""
    return (numbers[:, None] >> torch.arange(D)) & 1


def numbers(found: torch.Tensor) -> torch.Tensor:
    """``[n]`` of what :func:`digits` gave, up to what quantisation does to it."""
    assert found.isfinite().all()
    return ((found > 0.5).long() << torch.arange(D)).sum(-1)


def query_of(tag: int) -> torch.Tensor:
    """``[L, H * G, D]``; like K, it follows from the tokens up to its own."""
    return torch.randn(L, H * G, D, generator=torch.Generator().manual_seed(tag))


def echo_of(tokens: list[int], begin: int, end: int) -> torch.Tensor:
    """Scores of a segment that tell it from any other, or from the same one of another prefix."""
    tag = prefix_tags(tokens)[end - 1]
    scores = (torch.arange(begin, end) * 7919 + tag * 31 + begin) % 8388593
    return (scores.float() + 1) / 8388594


def prefix_tags(tokens: list[int]) -> list[int]:
    """A number below 2^23 for every prefix; exact in fp32."""
    tags, tag = [], 17
    for token in tokens:
        tag = (tag * 31 + token) % 8388593
        tags.append(tag)
    return tags


def next_token(tokens: list[int]) -> int:
    """What the pretend model says."""
    return (sum(tokens) * 7 + len(tokens)) % 1000 + 3


def ngram(drafts: int) -> dict[str, object]:
    """Speculation without a draft model."""
    return {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3}


class Simulation:
    """A scheduler, a pretend worker and the requests between them."""

    def __init__(
        self,
        num_blocks: int,
        options: dict,
        *,
        max_num_batched_tokens: int = 64,
        max_num_scheduled_tokens: int | None = None,
        max_num_seqs: int = 8,
        max_model_len: int = 512,
        prefix_caching: bool = True,
        log_stats: bool = True,
        asynchronous: bool = False,
        drafts: int = 0,
        acceptance: float = 0.5,
        windows: tuple[int, ...] = (),
        head: str | None = None,
        states: int = 0,
        kernel_blocks: int = 1,
    ) -> None:
        """
        Args:
            states: cache groups of layers with a state in the place of keys.
            kernel_blocks: of a block, each of B tokens.
            drafts: tokens that are speculated of each generation in a step.
            acceptance: share of them that the pretend model says, too.
            head: folder of an EAGLE head that speculates; None: n-grams do.
        """
        page_format = PageFormat.of(options.get("page_dtype", "auto"))
        dtype = torch.float32 if page_format is PageFormat.AUTO else torch.bfloat16
        args = EngineArgs(
            str(MODEL),
            additional_config={"kv_compress": options},
            block_size=B,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_scheduled_tokens=max_num_scheduled_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            enable_prefix_caching=prefix_caching,
            enforce_eager=True,
            dtype=str(dtype).removeprefix("torch."),
            speculative_config=None
            if not drafts
            else ngram(drafts)
            if head is None
            else {
                "method": "eagle",
                "model": head,
                "num_speculative_tokens": drafts,
            },
        )
        self._drafts, self._acceptance, self._random = drafts, acceptance, Random(0)
        self._drafted: dict[str, list[int]] = {}
        """What the worker computes beyond ``_tokens`` in this step."""
        self._scheduled: set[str] = set()
        """Who computes something in this step."""
        self.num_rejected = 0
        self.vllm_config = args.create_engine_config()
        # The CPU platform turns it off; the scheduler does not mind.
        self.vllm_config.scheduler_config.async_scheduling = asynchronous
        self.config = config = resolved_config(self.vllm_config)
        spec = KVCompressSpec(
            block_size=B * kernel_blocks,
            kernel_block_size=B,
            num_kv_heads=H,
            head_size=D,
            dtype=dtype,
            window=config.window,
            queries_per_head=G,
            scale=D**-0.5,
            page_format=page_format,
        )
        register_all_kvcache_specs(self.vllm_config)
        self.vllm_config.cache_config.num_gpu_blocks = num_blocks
        groups = [
            KVCacheGroupSpec(
                [f"{window}a", f"{window}b"],
                SlidingWindowSpec(
                    block_size=B, num_kv_heads=H, head_size=D, dtype=dtype, sliding_window=window
                ),
            )
            for window in windows
        ]
        page = spec.page_size_bytes
        groups += [
            KVCacheGroupSpec(
                [f"state{group}a", f"state{group}b"],
                MambaSpec(
                    block_size=max_model_len, shapes=((page // 8,),), dtypes=(torch.float32,),
                    page_size_padded=page,
                ),
            )
            for group in range(states)
        ]  # fmt: skip
        groups.append(KVCacheGroupSpec(["a", "b"], spec))
        if windows or states:
            self.vllm_config.model_config.hf_text_config.layer_types = [
                "sliding_attention", "full_attention"
            ]  # fmt: skip
            check_longest_request(self.vllm_config, groups, num_blocks * 2 * spec.page_size_bytes)
        cache = KVCacheConfig(num_blocks, [], groups)
        self.scheduler = self.vllm_config.scheduler_config.get_scheduler_cls()(
            vllm_config=self.vllm_config,
            kv_cache_config=cache,
            block_size=B * kernel_blocks if not states else max_model_len * B * kernel_blocks,
            structured_output_manager=StructuredOutputManager(self.vllm_config),
            log_stats=log_stats,
        )
        group = self.scheduler.kv_compress_group
        state = PackedState(
            group,
            num_blocks=num_blocks * kernel_blocks,
            state_slots=state_slots(self.vllm_config, num_blocks),
            window=config.ring(draft_tokens(self.vllm_config)),
            dtype=dtype,
            echo=config.stores_echo,
            observe_slots=observe_slots(self.vllm_config, group, num_blocks),
            accumulated=config.query_stride > 0,
            device=torch.device("cpu"),
        )
        num_pages = num_blocks * kernel_blocks * L * H
        pages = torch.full((num_pages, B, 2 * D), float("nan"), dtype=dtype)
        self.worker = PretendWorker(
            state,
            pages,
            Compressor(config, state, pages),
            config.window,
            windows=windows,
            window_tags=torch.zeros(num_blocks, B, dtype=torch.int64),
            kernel_blocks=kernel_blocks,
            state_tags=torch.full((num_blocks if states else 0,), -1),
        )
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(B, hash_function) if prefix_caching else None
        self.outputs: dict[str, list[int]] = {}
        self.failed: set[str] = set()
        """Answered with an error."""
        self.prefix_cache_stats: PrefixCacheStats | None = None
        self._depth = 2 if asynchronous else 1
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._tokens: dict[str, list[int]] = {}
        """Of every request, as the worker knows them: ahead of the scheduler by what is in flight.
        """
        self.reports: list[StepReport] = []
        self.num_steps = 0
        self.most_running = 0
        self.num_compressions = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def live(self) -> list[str]:
        return list(self.scheduler.requests)

    def add(self, request_id: str, prompt: list[int], max_tokens: int, **extra_args) -> None:
        """Send a request through what the front end does.

        Raises:
            ValueError: it is refused.
        """
        params = self._params(max_tokens, extra_args)
        budget = check_request(self.config, params, resumable=False)
        incoming = SimpleNamespace(sampling_params=params, prompt_token_ids=prompt)
        check_length(self.config, self.vllm_config, incoming, budget)
        send_budget(budget, params)
        self._enqueue(request_id, prompt, params)

    def pass_by(self, request_id: str, prompt: list[int], max_tokens: int, **extra_args) -> None:
        """Send a request past the front end."""
        self._enqueue(request_id, prompt, self._params(max_tokens, extra_args))

    def _params(self, max_tokens: int, extra_args: dict) -> SamplingParams:
        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args or None,
        )
        params.update_from_generation_config({}, 2)
        return params

    def _enqueue(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        request = Request(request_id, prompt, params, None, block_hasher=self._hasher)
        self.outputs[request_id] = []
        self._tokens[request_id] = list(prompt)
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        output = self.scheduler.schedule(False)
        scheduled, cached = output.num_scheduled_tokens, output.scheduled_cached_reqs
        self._scheduled = set(scheduled)
        for rid in [*(new.req_id for new in output.scheduled_new_reqs), *cached.resumed_req_ids]:
            self._tokens[rid] = list(self.scheduler.requests[rid]._all_token_ids)
        self._drafted = dict(output.scheduled_spec_decode_tokens)
        if self._depth > 1:  # of which the scheduler knows the number only
            self._drafted = {r: self._draft(r)[: len(t)] for r, t in self._drafted.items()}
        unscored = {
            tracked.request_id: ranges[0][0]
            for tracked in self.scheduler.kv_compress_planner.requests.values()
            if (ranges := tracked.unscored.before(1 << 13))
        }
        self.worker.run(output, {rid: self._computed(rid) for rid in self._tokens}, unscored)
        self.num_steps += 1
        if output.kv_compress.compressions or output.preempted_req_ids or self.num_steps % 8 == 0:
            self.check_contents()
        self.most_running = max(self.most_running, len(self.scheduler.running))
        self.num_compressions += len(output.kv_compress.compressions)
        self.num_preemptions += len(output.preempted_req_ids or ())
        self.num_cached_tokens += sum(n.num_computed_tokens for n in output.scheduled_new_reqs)
        ids = list(scheduled)
        sampled = []
        for rid in ids:
            tokens = self._tokens[rid]
            done = self.scheduler.requests[rid].num_computed_tokens >= len(tokens)
            sampled.append(self._sample(tokens, self._drafted.get(rid, [])) if done else [])
            tokens += sampled[-1]
        self._drafted = {}
        result = ModelRunnerOutput(ids, {rid: i for i, rid in enumerate(ids)}, sampled)
        self._in_flight.append((output, reports.attach(result, self.worker.pending)))
        if len(self._in_flight) == self._depth or not scheduled:
            self._update(*self._in_flight.popleft())

    def _computed_end(self, request_id: str) -> int:
        """Tokens of a request that decodes with a key by now."""
        uncomputed = request_id not in self._scheduled
        return len(self._computed(request_id)) - uncomputed

    def _computed(self, request_id: str) -> list[int]:
        return self._tokens[request_id] + self._drafted.get(request_id, [])

    def _sample(self, tokens: list[int], drafted: list[int]) -> list[int]:
        """What the pretend model says behind some tokens: of the drafted ones those that it says,
        too, and one more."""
        said: list[int] = []
        for draft in [*drafted, None]:
            said.append(next_token(tokens + said))
            if said[-1] != draft:
                break
        self.num_rejected += len(drafted) + 1 - len(said)
        return said

    def _draft(self, request_id: str) -> list[int]:
        found: list[int] = []
        for _ in range(self._drafts):
            right = next_token(self._tokens[request_id] + found)
            found.append(right if self._random.random() < self._acceptance else right + 1)
        return found

    def _update(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        answers = self.scheduler.update_from_output(output, result)
        if self._drafts and self._depth == 1:
            ids = [rid for rid in result.req_ids if rid in self.scheduler.requests]
            self.scheduler.update_draft_token_ids(DraftTokenIds(ids, list(map(self._draft, ids))))
        for outputs in answers.values():
            if outputs.scheduler_stats is not None:
                self.reports.append(outputs.scheduler_stats.kv_compress)
                self.prefix_cache_stats = outputs.scheduler_stats.prefix_cache_stats
            for item in outputs.outputs:
                self.outputs[item.request_id] += item.new_token_ids
                if item.finish_reason == FinishReason.ERROR:
                    self.failed.add(item.request_id)

    def run(self, most_steps: int = 5000) -> None:
        for _ in range(most_steps):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"{self.live} still live after {most_steps} steps")

    @property
    def state_slots_left(self) -> set[int]:
        """State slots that the worker knows, apart from those of contexts that are held."""
        contexts = self.scheduler.kv_compress_planner.contexts
        return self.worker.state.slots.keys() - {context.slot for context in contexts}

    def _reads_echo(self, request_id: str) -> bool:
        """Whether a request is compressed by echo scores; those of others may be anything, as what
        they find in the prefix cache need not have any."""
        tracked = self.scheduler.kv_compress_planner.requests.get(request_id)
        return tracked is not None and self.config.reads_echo(tracked.budget.policy)

    def _unheard(self, request_id: str) -> Ranges:
        """What a request must keep because nobody heard it."""
        tracked = self.scheduler.kv_compress_planner.requests.get(request_id)
        return () if tracked is None else tracked.unheard

    def check_contents(self) -> None:
        """Every head of every running request holds its own tokens: some of the compressed part,
        in order, and all of the tail."""
        manager = self.scheduler.kv_compress_manager
        for request in self.scheduler.running:
            rid = request.request_id
            n = min(request.num_computed_tokens, self._computed_end(rid))
            if n == 0 or rid not in self.worker.rows:
                continue
            ids = split(
                manager.row(rid, len(manager.req_to_blocks[rid])), self.worker.kernel_blocks
            )
            assert self.worker.rows[rid] == ids, (rid, self.worker.rows[rid], ids)
            row = torch.tensor(ids)
            slot = self.worker.state.slot_of(ids)
            tags = torch.tensor(prefix_tags(self._computed(rid)))
            state = State(*self.worker.state.tables)
            for head in range(L * H):
                of_head = state.head(row, slot, *divmod(head, H))
                f, c = of_head.covered, of_head.packed * of_head.blocks_per_page
                content = of_head.keys(self.worker.pages, n)
                keys, position = len(content), numbers(content[:, D:])
                assert (position.diff() > 0).all(), (rid, head, position)
                assert position[c * B :].equal(torch.arange(f * B, n)), (rid, head, position)
                # Keys of a head are its multiple of the digits; of some billions that are looked
                # at, 4 bits move one by half a digit.
                moved = (content[:, :D] / (1 + 2 * head) - digits(tags[position])).abs()
                assert (moved < 0.75).all(), (rid, head, moved.max())
                kept = set(position.tolist())
                missing = [p for a, b in self._unheard(rid) for p in range(a, b) if p not in kept]
                assert not missing, (rid, head, missing)
                if self._reads_echo(rid):
                    page, within = of_head.place(torch.arange(keys), B)
                    stored = self.worker.state.echo[page, within]
                    wanted = self.worker.echoes[rid][position]
                    # In the tail what has no score yet may hold anything.
                    ours = (torch.arange(keys) < c * B) | (wanted > 0)
                    wrong = position[ours & (stored != wanted)]
                    assert not len(wrong), (rid, head, wrong)
