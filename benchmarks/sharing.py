# SPDX-License-Identifier: Apache-2.0
"""Many users ask about few documents over HTTP: what sharing packed documents saves.

    python -m benchmarks.sharing --engines stock,1,4,8 --documents 40 --tokens 8000 --users 1,8,64

Every user asks one question after another, each about a document drawn by Zipf's law, so that some
are asked about often and most hardly ever. The KV cache holds a quarter of what vLLM needs for all
documents, unless ``--kv-tokens`` says otherwise. vLLM's prefix caching is on. Engines that compress
are told where the document ends (``kv_compress_context_tokens``).

With ``--model``, documents are natural text with facts in it, and answers are checked: in the
language of the bundled model or, with ``--texts``, real text for real models (``python -m
benchmarks.models text texts``). With random weights of the 8B shape they are random tokens. One
JSON line per engine and number of users:

    hit_rate       share of the prompts' tokens that were not computed
    held           documents that could be taken at the end; of vLLM what its pool has room for
    blocks         most that were in use at a time, of those polled
    right          share of right answers
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from benchmarks.offline import BLOCK_SIZE, STOCK, engine_parser
from benchmarks.server import Server, completion_chunks, serve

TOKENS = range(1000, 4000)
QUESTION_TOKENS = 40
ROOM = 64
"""Tokens of a question and its answer at most."""


class Document(NamedTuple):
    """Token ids, and (question, answer) pairs; no answer: nothing is checked."""

    tokens: list[int]
    questions: list[tuple[list[int], str | None]]


class Asked(NamedTuple):
    """One answer."""

    prompt_tokens: int
    cached_tokens: int
    first_token_s: float
    right: bool | None


def main() -> None:
    parser = engine_parser("sharing", __doc__, engines=f"{STOCK},1,4,8")
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=8000, help="of a document, at most")
    parser.add_argument("--users", default="1,8,64", help="at a time; comma-separated")
    parser.add_argument("--requests", type=int, default=200, help="of all users together")
    parser.add_argument("--output-tokens", type=int, default=32, help="of every answer")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent; 0: all alike")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=Path, help="folder with folders of real texts")
    parser.add_argument("serve_args", nargs="*", help="after --, further flags of vllm serve")
    args = parser.parse_args()
    args.users = [int(users) for users in args.users.split(",")]
    found = documents(args)
    whole = sum(len(document.tokens) for document in found)
    if args.kv_tokens is None:
        args.kv_tokens = whole // 4
    print(f"{len(found)} documents, {whole} tokens, KV cache of {args.kv_tokens}", flush=True)
    runs: list[dict[str, Any]] = []
    for name in args.engines:
        for run in measure(args, name, found):
            runs.append(run)
            print(json.dumps(run), flush=True)
            if args.output:
                with args.output.open("a") as file:
                    print(json.dumps(run), file=file)
    print_table(runs)


def documents(args: argparse.Namespace) -> list[Document]:
    """With a model: text, in its tokens. Without: random tokens."""
    if args.model is None:
        choice = random.Random(args.seed)
        return [
            Document(
                choice.choices(TOKENS, k=args.tokens),
                [(choice.choices(TOKENS, k=QUESTION_TOKENS), None) for _ in range(8)],
            )
            for _ in range(args.documents)
        ]
    from transformers import AutoTokenizer

    from benchmarks.retrieval import TaskGen

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.texts is not None:
        return real_documents(args, tokenizer)
    generator = TaskGen.load(Path(__file__).parents[1] / "models" / "tiny")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = []
    for index in range(args.documents):
        text, turns = generator.turns("multikey", args.tokens, args.seed * 1000 + index)
        context, _, first = text.removesuffix("<|assistant|>").rpartition("\n")
        found.append(
            Document(
                start + encode(context),
                [
                    (encode(f"\n{(first if question is None else question).strip()}<|assistant|>"),
                     answer.strip())
                    for question, answer in turns
                ],
            )
        )  # fmt: skip
    return found


def real_documents(args: argparse.Namespace, tokenizer: Any) -> list[Document]:
    """Real text of all sources in turn, with the facts and the questions of ``benchmarks.real``;
    replies are begun."""
    from benchmarks.real.samples import Maker

    sources = sorted(path.name for path in args.texts.iterdir() if path.is_dir())
    maker, found = Maker(tokenizer, args.texts), []
    for index in range(args.documents):
        source = sources[index % len(sources)]
        sample = maker.facts(source, args.tokens, args.seed * 1000 + index)
        questions = [
            (question.asked, tokenizer.decode(question.answer).strip())
            for question in sample.questions
        ]
        found.append(Document(sample.context, questions))
    return found


def measure(args: argparse.Namespace, name: str, found: list[Document]) -> list[dict[str, Any]]:
    """All numbers of users on one engine, its cache emptied in between.

    Raises:
        RuntimeError: a request failed.
    """
    longest = max(len(document.tokens) for document in found)
    longest += ROOM + args.output_tokens + BLOCK_SIZE
    flags = ["--enable-prefix-caching", "--enable-prompt-tokens-details", *args.serve_args]
    runs = []
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
    with serve(args.model, name, longest, args.kv_tokens, flags, environment=environment) as server:
        asyncio.run(ask_all(args, server, name, found, users=1, requests=2))  # warms up
        for users in args.users:
            asyncio.run(reset(server))
            before, start = server.metrics(), time.perf_counter()
            asked, blocks = asyncio.run(
                ask_all(args, server, name, found, users, max(args.requests, users))
            )
            seconds = time.perf_counter() - start
            after = server.metrics()
            runs.append(summary(args, name, users, found, asked, blocks, seconds, before, after))
    return runs


def summary(
    args: argparse.Namespace,
    name: str,
    users: int,
    found: list[Document],
    asked: list[Asked],
    blocks: int,
    seconds: float,
    before: dict[str, float],
    after: dict[str, float],
) -> dict[str, Any]:
    """One line."""
    first = sorted(item.first_token_s for item in asked)
    checked = [item.right for item in asked if item.right is not None]
    mean = statistics.mean(len(document.tokens) for document in found)
    held = after.get("kv_compress:shared_contexts") if name != STOCK else None
    prompt = sum(item.prompt_tokens for item in asked)
    return {
        "engine": name,
        "users": users,
        "documents": len(found),
        "kv_tokens": args.kv_tokens,
        "requests": len(asked),
        "hit_rate": round(sum(item.cached_tokens for item in asked) / prompt, 4),
        "held": round(min(len(found), args.kv_tokens / mean), 1) if held is None else int(held),
        "ttft_p50_ms": round(1000 * statistics.median(first), 1),
        "ttft_p99_ms": round(1000 * first[int(0.99 * (len(first) - 1))], 1),
        "requests_per_s": round(len(asked) / seconds, 3),
        "blocks": blocks,
        "right": round(sum(checked) / len(checked), 4) if checked else None,
        "preemptions": int(
            after["vllm:num_preemptions_total"] - before["vllm:num_preemptions_total"]
        ),
    }


async def reset(server: Server) -> None:
    """Empty the prefix cache."""
    url = f"{server.url}/reset_prefix_cache"
    async with aiohttp.ClientSession() as session, session.post(url) as reply:
        if reply.status != 200:
            raise RuntimeError(f"HTTP {reply.status}: {await reply.text()}")


async def ask_all(
    args: argparse.Namespace,
    server: Server,
    name: str,
    found: list[Document],
    users: int,
    requests: int,
) -> tuple[list[Asked], int]:
    """All questions, in the same order on every engine, and the most blocks in use."""
    choice = random.Random(args.seed + 7)
    weights = [1 / (rank + 1) ** args.zipf for rank in range(len(found))]
    drawn = choice.choices(found, weights, k=requests)
    questions = iter([(document, choice.choice(document.questions)) for document in drawn])
    asked: list[Asked] = []
    most = 0
    limit = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=limit, read_bufsize=1 << 22
    ) as session:

        async def user() -> None:
            for document, (question, answer) in questions:
                asked.append(
                    await ask(args, session, server, name, document.tokens, question, answer)
                )

        async def poll() -> None:
            nonlocal most
            while True:
                async with session.get(f"{server.url}/metrics") as reply:
                    for line in (await reply.text()).splitlines():
                        if line.startswith("vllm:kv_cache_usage_perc{"):
                            share = float(line.rsplit(" ", 1)[1])
                            most = max(most, round(share * (args.kv_tokens // BLOCK_SIZE)))
                await asyncio.sleep(0.1)

        polling = asyncio.create_task(poll())
        await asyncio.gather(*(user() for _ in range(users)))
        polling.cancel()
    return asked, most


async def ask(
    args: argparse.Namespace,
    session: aiohttp.ClientSession,
    server: Server,
    name: str,
    document: list[int],
    question: list[int],
    answer: str | None,
) -> Asked:
    """One answer, streamed.

    Raises:
        RuntimeError: there is none.
    """
    body: dict[str, Any] = {
        "model": "model", "prompt": document + question, "max_tokens": args.output_tokens,
        "ignore_eos": answer is None, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if name != STOCK:
        body["vllm_xargs"] = {"kv_compress_context_tokens": len(document)}
    start, first, text = time.perf_counter(), None, ""
    usage: dict[str, Any] = {}
    async for chunk in completion_chunks(session, server, body):
        usage = chunk.get("usage") or usage
        for part in chunk.get("choices", ()):
            first = first or time.perf_counter() - start
            text += part["text"]
    if first is None:
        raise RuntimeError("a request got no token")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    right = None if answer is None else text.strip().startswith(answer)
    return Asked(usage["prompt_tokens"], cached, first, right)


def print_table(runs: list[dict[str, Any]]) -> None:
    """A line per engine and number of users."""
    heads = ("users", "hit_rate", "held", "ttft_p50_ms", "ttft_p99_ms", "requests_per_s", "blocks",
             "right", "preemptions")  # fmt: skip
    print(f"{'engine':>24}", *(f"{head:>14}" for head in heads))
    for run in runs:
        print(f"{run['engine']:>24}", *(f"{run[head]!s:>14}" for head in heads))


if __name__ == "__main__":
    main()
