# SPDX-License-Identifier: Apache-2.0
"""A ``vllm serve`` of its own for a benchmark, and what it tells about itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp

from benchmarks.offline import BLOCK_SIZE, SHAPE, STOCK, pool_blocks

TOKENIZER = Path(__file__).parents[1] / "models" / "tiny"
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


@dataclass
class Server:
    """A server that answers at ``url``."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: IO[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """What it has printed so far."""
        self.log_file.seek(0)
        return self.log_file.read()

    def metrics(self) -> dict[str, float]:
        """Its metrics by name, summed over their labels."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            text = response.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
        return found


@contextmanager
def serve(
    model: str | Path | None,
    name: str,
    max_model_len: int,
    kv_tokens: int | None,
    flags: Sequence[str] = (),
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server that answers, until the block is left. The model is called ``model``.

    Args:
        model: None: random weights of the Llama-3.1-8B shape, with the vocabulary of the bundled
            model so that its tokenizer fits.
        name: of the engine, see :func:`benchmarks.offline.options`.
        max_model_len: tokens.
        kv_tokens: size of the KV cache in tokens; None: all memory.
        flags: further ones for ``vllm serve``.
        port: None: any that is free.
        environment: variables to set.

    Raises:
        RuntimeError: it did not start.
    """
    port = port or free_port()
    command = [
        *VLLM, "serve", str(model or SHAPE), "--served-model-name", "model", "--host", "127.0.0.1",
        "--port", str(port), "--block-size", str(BLOCK_SIZE), "--max-model-len", str(max_model_len),
    ]  # fmt: skip
    if model is None:
        command += ["--load-format", "dummy", "--tokenizer", str(TOKENIZER)]
        command += ["--hf-overrides", '{"vocab_size": 4096}']
    if kv_tokens is not None:
        command += ["--num-gpu-blocks-override", str(pool_blocks(kv_tokens))]
    if name != STOCK:
        command += ["--kv-compress", name if "=" in name else f"ratio={name}"]
    with tempfile.TemporaryFile("a+") as log:  # appending: reading moves no writer
        process = subprocess.Popen(
            [*command, *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        server = Server(process, port, log)
        try:
            wait_until_ready(server)
            yield server
        except BaseException:
            print(server.log()[-4000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def completion_chunks(
    session: aiohttp.ClientSession, server: Server, body: Mapping[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """What ``/v1/completions`` streams, chunk by chunk.

    Raises:
        RuntimeError: it does not answer 200.
    """
    async with session.post(f"{server.url}/v1/completions", json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"HTTP {reply.status}: {await reply.text()}")
        async for line in reply.content:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(server: Server, limit: float = 600) -> None:
    """Return once the server answers.

    Raises:
        RuntimeError: it ended, or did not answer within ``limit`` seconds.
    """
    start = time.monotonic()
    while time.monotonic() - start < limit:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.process.returncode}")
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {limit:.0f} s")
