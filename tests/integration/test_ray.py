# SPDX-License-Identifier: Apache-2.0
"""Ray on one machine: a cluster of two nodes that claim to have a GPU each.

``num_cpus`` is of the mind: with as few as two, Ray Data never starts all of its stages.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

if find_spec("ray") is None:
    pytest.skip("Ray is not installed: kvcompress_vllm[ray]", allow_module_level=True)

import ray
from ray.cluster_utils import Cluster
from vllm.v1.executor.abstract import Executor

from kvcompress_vllm.ray import check_nodes, engine_kwargs
from tests.integration.engines import engine, samples
from tests.integration.simulation import MODEL
from tests.integration.test_policy_faults import choosing

ROOT = Path(__file__).parents[2]
NOT_HERE = """
import sys
class NotHere:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "kvcompress_vllm":
            raise ImportError("not here")
sys.meta_path.insert(0, NotHere())
"""
NODE = {"num_cpus": 16, "num_gpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}


@contextlib.contextmanager
def nodes(*wanted: dict[str, int]) -> Iterator[Cluster]:
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # Of every process that Ray starts from here on.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # The engine's own process must end with the actor that is killed.
        patch.setenv("RAY_process_group_cleanup_enabled", "true")
        patch.setenv("HF_HUB_OFFLINE", "1")
        # Whoever asks for the cluster of this machine gets this one, whatever others run here.
        patch.setenv("RAY_TMPDIR", folder)
        found = Cluster()
        try:
            for node in wanted:
                found.add_node(**node)
            patch.setenv("RAY_ADDRESS", found.address)
            # As in test_parallel.py.
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            ray.init()
            yield found
        finally:
            ray.shutdown()
            found.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with nodes(NODE, NODE) as found:
        yield found


@pytest.mark.slow
def test_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's older executor, which calls the model runner past its worker. It wants every node to
    have an address of its own, so there is one; before the cluster of the
    other tests."""
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    # Without a GPU activations travel through shared memory.
    monkeypatch.setenv("VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE", "shm")
    monkeypatch.setenv("VLLM_USE_RAY_WRAPPED_PP_COMM", "0")
    with nodes({**NODE, "num_gpus": 2}):
        assert across_nodes(pipeline_parallel_size=2) == "KVCompressRayExecutor on 1"


@pytest.mark.parametrize("lacks", ["the package", "nothing"])
def test_a_node_without_the_package_is_named(
    cluster: Cluster, lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks == "nothing":
        check_nodes()
        return
    # As if it were not installed: Python runs this first in every process of the new node.
    (tmp_path / "sitecustomize.py").write_text(NOT_HERE)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    before = {node["NodeID"] for node in ray.nodes()}
    monkeypatch.setenv("PYTHONPATH", path)
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    try:
        (new,) = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - before
        with pytest.raises(RuntimeError, match="every Ray node needs kvcompress_vllm") as error:
            check_nodes()
        assert new[:8] in str(error.value) and "not here" in str(error.value)
        assert not any(node[:8] in str(error.value) for node in before)
    finally:
        cluster.remove_node(node)


def across_nodes(**arguments: Any) -> str:
    """What executes; checks an engine of two ranks, of which each sees half of all heads."""
    pairs = samples("single", 900, 3)
    options = {"ratio": 8, "allow_policies": True}
    with engine(options, distributed_executor_backend="ray", **arguments) as llm:
        executor = Executor.get_class(llm.llm_engine.vllm_config).__name__
        llm.collective_rpc("kv_compress_record")
        outputs = llm.generate([p for p, _ in pairs], choosing(None), use_tqdm=False)
        first, second = llm.collective_rpc("kv_compress_record")
        groups = ray.util.placement_group_table().values()
        nodes = {
            n for g in groups if g["state"] == "CREATED" for n in g["bundles_to_node_id"].values()
        }
    for output, (_, answer) in zip(outputs, pairs, strict=True):
        assert output.outputs[0].text.strip().startswith(answer)
        assert output.kv_compress.blocks_before > 4 * output.kv_compress.blocks_after
    assert first.keys() == second.keys() and len(first) == 3
    kept = {sum(map(len, heads)) for record in (first, second) for heads in record.values()}
    assert len(kept) == 1, "as many on both ranks"
    return f"{executor} on {len(nodes)}"


@pytest.mark.usefixtures("cluster")
def test_pipeline_across_two_nodes() -> None:
    assert across_nodes(pipeline_parallel_size=2) == "KVCompressRayExecutorV2 on 2"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_tensor_parallel_across_two_nodes() -> None:
    assert across_nodes(tensor_parallel_size=2) == "KVCompressRayExecutorV2 on 2"


def lines(path: Path) -> list[dict[str, Any]]:
    found = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("\n")]


def engine_actors() -> list[int]:
    """Processes that run an engine for Ray Data."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=1) for line in found.stdout.splitlines()]
    return [int(pid) for pid, command in rows if "ray::" in command and "vLLMEngine" in command]


@pytest.mark.usefixtures("cluster")
def test_batch(tmp_path: Path) -> None:
    """Goes on where it was stopped, and a worker is killed in the middle."""
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    pairs = samples("single", 500, 48)
    rows = [{"id": f"r{i}", "prompt": prompt} for i, (prompt, _) in enumerate(pairs)]
    rows[8]["sampling_params"] = {"extra_args": {"kv_compress_ratio": 0.5}}
    rows[9]["sampling_params"] = {"max_tokens": 12, "extra_args": {"kv_compress_ratio": 2}}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    # What a job leaves that is killed itself.
    done = [{"id": f"r{i}", "text": "of another run"} for i in range(4)]
    answers.write_text("".join(json.dumps(line) + "\n" for line in done) + '{"id": "r')
    settings = {"max_model_len": 2048, "dtype": "float32", "enforce_eager": True, "max_num_seqs": 4}
    command = [sys.executable, str(ROOT / "examples" / "batch_ray.py"), str(MODEL), str(prompts),
               str(answers), "--max-tokens", "40", "--batch-size", "4",
               "--engine", json.dumps(settings)]  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            killed = False
            while job.poll() is None:
                if not killed and 8 <= len(lines(answers)) < 40:
                    os.kill(engine_actors()[0], signal.SIGKILL)
                    killed = True
                time.sleep(0.2)
        finally:
            job.kill()
    text = log.read_text()
    assert job.returncode == 0 and killed, text[-4000:]
    assert "48 of 48 rows done, 2 failed" in text
    found = lines(answers)
    assert found[:4] == done
    assert sorted(line["id"] for line in found) == sorted(f"r{i}" for i in range(48) if i != 8)
    right = 0
    for line in found[4:]:
        right += line["text"].strip().startswith(pairs[int(line["id"][1:])][1])
        usage = line["usage"]["kv_compress"]
        most = 3 if line["id"] == "r9" else 12
        assert usage["compressions"] and usage["blocks_before"] < most * usage["blocks_after"]
    assert right >= 38  # of 43, at ratio 8
    failed = lines(answers.with_name("answers.jsonl.failed"))
    assert {line["id"] for line in failed} == {"r8", 49}
    assert any("kv_compress_ratio=0.5 is not accepted" in line["error"] for line in failed)


def test_serve(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's app, asked over HTTP."""
    from ray import serve

    monkeypatch.setenv("MODEL", str(MODEL))
    from examples.serve_ray import app

    ((prompt, answer),) = samples("single", 900, 1)
    before = compressions().keys()  # of engines that ran in this cluster before
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app)
        url = f"http://127.0.0.1:{port}"
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        wrong = httpx.post(
            f"{url}/v1/completions", json={**body, "vllm_xargs": {"kv_compress_ratio": 0.5}}
        )
        counted = 0.0
        for _ in range(120):
            found = compressions()
            counted = sum(found[series] for series in found.keys() - before)
            if counted:
                break
            time.sleep(0.5)
    finally:
        serve.shutdown()
    assert reply["choices"][0]["text"].strip().startswith(answer)
    assert (
        reply["usage"]["kv_compress"]["blocks_before"]
        > 4 * reply["usage"]["kv_compress"]["blocks_after"]
    )
    assert wrong.status_code == 400 and "kv_compress_ratio=0.5 is not accepted" in wrong.text
    assert counted == 1


def compressions() -> dict[str, float]:
    """Of every engine on every node, as Ray tells them: by name and labels."""
    found: dict[str, float] = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with contextlib.suppress(httpx.HTTPError):
            for line in httpx.get(url).text.splitlines():
                if line.startswith("ray_kv_compress_compressions_total{"):
                    series, value = line.rsplit(" ", 1)
                    found[series] = float(value)
    return found


def test_engine_kwargs() -> None:
    with pytest.raises(ValueError, match="ratio=0 is not accepted"):
        engine_kwargs(ratio=0)
    assert engine_kwargs(ratio=8)["additional_config"] == {"kv_compress": {"ratio": 8}}
