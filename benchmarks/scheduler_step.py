# SPDX-License-Identifier: Apache-2.0
"""What a scheduled step costs the engine's process: vLLM's scheduler against ours, without a model.

    python -m benchmarks.scheduler_step
    python -m benchmarks.scheduler_step --engines "stock;ratio=4,policy=diverse" --requests 64
    python -m benchmarks.scheduler_step --profile "policy=echo"

Every engine decodes as many requests at once; a pretend worker answers each with a token, and with
a report where it was asked for a compression. Measured are ``schedule()`` and
``update_from_output()`` together, in the thread's own time: median, its 95% interval, and the 95th
percentile. The engines take turns of a few steps, so that whatever else the machine does hits all.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import pstats
import random
import statistics
import time
from collections import deque
from typing import Any

from benchmarks.offline import BLOCK_SIZE, SHAPE, STOCK
from kvcompress_vllm.config.spelling import parse_spec
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.plan import StepPlan
from kvcompress_vllm.records.report import Report

LAYERS, HEADS, GROUP, HEAD_SIZE = 32, 8, 4, 128
TURN = 10
"""Steps of an engine before the next one's turn."""


class Reported:
    """Reports of a step, as a worker would attach them."""

    def __init__(self, reports: list[Report]) -> None:
        self._reports = reports

    def collect(self) -> list[Report]:
        """As of ``compression/pending.py``."""
        return self._reports


class Engine:
    """A scheduler with requests, and a pretend worker two steps behind, as under asynchronous
    scheduling.

    Args:
        name: ``stock``, or options of ours.
        requests: how many there are.
        prompt: tokens of the longest prompt; the others are up to 256 tokens shorter, so that
            their compressions fall due on different steps.
        outputs: tokens that each generates at most.
    """

    def __init__(self, name: str, requests: int, prompt: int, outputs: int) -> None:
        import torch
        from vllm import SamplingParams
        from vllm.engine.arg_utils import EngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request
        from vllm.v1.structured_output import StructuredOutputManager

        from kvcompress_vllm.integration.engine.kv_cache import KVCompressSpec

        self.name = name
        self.times: dict[bool, list[float]] = {False: [], True: []}
        """Microseconds, by whether the step carried out compressions."""
        self.compressions = self.preemptions = 0
        self.profile: cProfile.Profile | None = None
        stock, longest = name == STOCK, prompt + outputs
        args = EngineArgs(
            str(SHAPE),
            additional_config={} if stock else {"kv_compress": parse_spec(name)},
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=8192,
            max_num_seqs=requests,
            max_model_len=longest,
            skip_tokenizer_init=True,
            enforce_eager=True,
        )
        config: Any = args.create_engine_config()
        config.scheduler_config.async_scheduling = True  # the CPU platform turns it off
        spec: Any = FullAttentionSpec(
            block_size=BLOCK_SIZE,
            num_kv_heads=HEADS,
            head_size=HEAD_SIZE,
            dtype=torch.bfloat16,
        )
        if not stock:
            spec = KVCompressSpec.of(spec, 8, GROUP, HEAD_SIZE**-0.5)
        register_all_kvcache_specs(config)
        blocks = requests * -(-longest // BLOCK_SIZE) + 1
        config.cache_config.num_gpu_blocks = blocks
        names = [str(layer) for layer in range(LAYERS)]
        make = AsyncScheduler if stock else config.scheduler_config.get_scheduler_cls()
        self.scheduler: Any = make(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(names, spec)]),
            block_size=BLOCK_SIZE,
            structured_output_manager=StructuredOutputManager(config),
            log_stats=True,
        )
        self._in_flight: deque[tuple[Any, Any]] = deque()
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
        source = random.Random(0)
        for index in range(requests):
            length = prompt - source.randrange(256)
            params = SamplingParams(
                max_tokens=outputs, ignore_eos=True, output_kind=RequestOutputKind.DELTA
            )
            params.update_from_generation_config({}, 2)
            tokens = [source.randrange(3, 1000) for _ in range(length)]
            request = Request(str(index), tokens, params, None, block_hasher=hasher)
            self.scheduler.add_request(request)
        self._kept_pages = [[4] * HEADS for _ in range(LAYERS)]

    def read_prompts(self, settle: int) -> None:
        """Step until all requests decode, and ``settle`` steps more."""
        while any(
            request.num_computed_tokens < request.num_prompt_tokens
            for request in self.scheduler.requests.values()
        ):
            self.step()
        for _ in range(settle):
            self.step()
        self.times = {False: [], True: []}
        self.compressions = self.preemptions = 0

    def step(self) -> None:
        """One step, timed."""
        profile = self.profile
        if profile is not None:
            profile.enable()
        begin = time.thread_time()
        output = self.scheduler.schedule()
        took = time.thread_time() - begin
        if profile is not None:
            profile.disable()
        plan: StepPlan = getattr(output, "kv_compress", None) or StepPlan()
        self._in_flight.append((output, self._answer(output, plan)))
        if len(self._in_flight) > 1:
            arguments = self._in_flight.popleft()
            if profile is not None:
                profile.enable()
            begin = time.thread_time()
            self.scheduler.update_from_output(*arguments)
            took += time.thread_time() - begin
            if profile is not None:
                profile.disable()
        self.times[bool(plan.compressions)].append(1e6 * took)
        self.compressions += len(plan.compressions)
        self.preemptions += len(output.preempted_req_ids or ())

    def _answer(self, output: Any, plan: StepPlan) -> Any:
        """What a worker would answer."""
        from vllm.v1.outputs import ModelRunnerOutput

        from kvcompress_vllm.integration.worker import reports

        ids, requests = list(output.num_scheduled_tokens), self.scheduler.requests
        sampled = [
            [7] if requests[name].num_computed_tokens >= requests[name].num_prompt_tokens else []
            for name in ids
        ]
        result = ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, sampled)
        done = [
            Report(
                item.request_id,
                item.state_slot,
                item.num_tokens,
                item.trigger,
                self._kept_pages,
                0.1,
                1.0,
                LossCurve([item.kept, item.candidate_blocks], [0.1, 0.0]),
            )
            for item in plan.compressions
        ]
        pending: Any = [Reported(done)] if done else []
        return reports.attach(result, pending)


def median(times: list[float]) -> str:
    """Median, its 95% interval by order statistics, and the 95th percentile."""
    if len(times) < 20:
        return f"{'-':>6} {'':>15} {'-':>6} {len(times):>6}"
    ordered, half = sorted(times), 0.98 * len(times) ** 0.5
    low, high = (ordered[round(len(times) / 2 + sign * half)] for sign in (-1, 1))
    p95 = ordered[int(0.95 * len(times))]
    between = f"{low:.0f} to {high:.0f}"
    return f"{statistics.median(times):>6.0f} {between:>15} {p95:>6.0f} {len(times):>6}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduler_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engines", default=f"{STOCK};policy=echo;policy=kv_compress")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--settle", type=int, default=150, help="steps before the measured ones")
    parser.add_argument("--profile", metavar="ENGINE", help="profile this one instead")
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    names = [arguments.profile] if arguments.profile else arguments.engines.split(";")
    # Asynchronous scheduling is ahead by a token, and the step in flight by another.
    outputs = arguments.steps + arguments.settle + arguments.prompt // 8 + 300
    engines = [Engine(name, arguments.requests, arguments.prompt, outputs) for name in names]
    for engine in engines:
        engine.read_prompts(arguments.settle)
        if arguments.profile:
            engine.profile = cProfile.Profile(time.thread_time)
    gc.collect()
    gc.freeze()
    for _ in range(arguments.steps // TURN):
        for engine in engines:
            for _ in range(TURN):
                engine.step()
    head = f"{'median':>6} {'its interval':>15} {'p95':>6} {'steps':>6}"
    print(f"microseconds per step with {arguments.requests} decoding requests")
    print(f"{'engine':<28} {'compressing':<12} {head}")
    for engine in engines:
        for compressing, times in engine.times.items():
            if times:
                print(f"{engine.name:<28} {'yes' if compressing else 'no':<12} {median(times)}")
        if engine.compressions or engine.preemptions:
            print(f"{'':<28} {engine.compressions} compressions, {engine.preemptions} preemptions")
        if engine.profile is not None:
            pstats.Stats(engine.profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
