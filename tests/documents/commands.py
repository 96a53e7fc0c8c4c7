# SPDX-License-Identifier: Apache-2.0
"""Every command in the documents, and how we know that it works.

A pattern of the whole command, and a test that runs it or what it runs, or the reason why none
does: ``GPU``, ``network`` (it downloads), ``long`` (minutes to hours; the arguments of our own
modules are parsed all the same), ``installs`` (it changes the environment).
"""

from __future__ import annotations

SERVER = "tests/integration/test_server.py"

COMMANDS = {
    # The environment and what is made in it.
    r"make (install|check|test|engine|docs)": "installs: .ci/run runs it on a fresh clone",
    r"make wheel": "tests/installed/conftest.py::wheel",
    r"pip install kvcompress_vllm-\S+\.whl": (
        "tests/installed/test_wheel.py::test_one_wheel_serves_every_python_and_torch"
    ),
    r"pip install --no-build-isolation \./examples/policy": (
        "tests/installed/test_examples.py::test_policy_of_ones_own"
    ),
    r"vllm serve models/tiny --kv-compress ratio=4,allow_policies=loudest": (
        "tests/installed/test_examples.py::test_policy_of_ones_own"
    ),
    r"vllm bench serve --base-url .*": "tests/installed/test_tools.py::test_bench_serve",
    r"guidellm run .*": "tests/installed/test_tools.py::test_guidellm",
    r"vllm bench throughput --model models/tiny .*": (
        "tests/installed/test_tools.py::test_bench_throughput"
    ),
    r"vllm serve models/tiny --kv-compress ratio=8 --otlp-traces-endpoint \S+": (
        "tests/installed/test_wheel.py::test_it_serves"
    ),
    r"make serve": f"{SERVER}::test_needles_and_blocks",
    r"make releases": "long: an hour, 30 GB",
    r"pip install --no-build-isolation \.": (
        "tests/test_build.py::test_a_wheel_from_the_sdist_runs_without_the_source_tree"
    ),
    r"pip install vllm==\S+": "installs: vLLM; .ci/run does it",
    r"pip install '?(kvcompress_vllm\[ray-vllm-0-26\]|lm-eval\[vllm,api\]|\w+)'?": (
        "installs: extras"
    ),
    r"pip install --no-deps --target kvpress_site kvpress==\S+": "installs: kvpress beside vLLM",
    # The command of the package.
    r"kvcompress-vllm doctor": "tests/integration/test_doctor.py::test_all_is_well",
    r"kvcompress-vllm doctor --wheel \S+": (
        "tests/integration/test_doctor.py::test_a_wheel_is_only_read"
    ),
    r"kvcompress-vllm doctor --model meta-llama/\S+ --gpu-memory 80G .*": (
        "tests/integration/test_capacity.py::test_an_8b_model_on_80_gib"
    ),
    r"kvcompress-vllm doctor --url \S+": f"{SERVER}::test_what_the_documents_ask",
    # Servers; tests/integration/test_documents.py parses the flags of all of them.
    r"vllm serve MODEL --kv-compress( ratio=8)?": f"{SERVER}::test_needles_and_blocks",
    r"vllm serve meta-llama/\S+ --kv-compress( \S+)?": "GPU: 16 GB of weights",
    r"vllm serve MODEL --kv-compress ratio=8 --tensor-parallel-size 2": (
        "tests/integration/test_parallel.py::test_tensor_parallel"
    ),
    r"vllm serve MODEL --kv-compress ratio=8 --pipeline-parallel-size 2": (
        "tests/integration/test_parallel.py::test_pipeline_parallel"
    ),
    r"vllm serve MODEL --kv-compress ratio=8 --data-parallel-size 2": (
        "tests/integration/test_parallel.py::test_data_parallel"
    ),
    r"vllm serve .* --distributed-executor-backend ray": (
        "tests/integration/test_ray.py::test_tensor_parallel_across_two_nodes"
    ),
    r"curl .*(127\.0\.0\.1:8000|SERVER).*": f"{SERVER}::test_what_the_documents_ask",
    r"\S*python -m benchmarks\.retrieval single 1500 100000 > request\.json": (
        f"{SERVER}::test_what_the_documents_ask"
    ),
    # Measurements.
    r"python -m benchmarks\.(throughput|serve|sharing|multiturn|generation|parallel) .*": (
        "GPU: the figures of docs/benchmarks.md"
    ),
    r"python -m benchmarks\.(batch|batch_ray) .*": "GPU: tests/test_batch_benchmarks.py has parts",
    r"python -m benchmarks\.ops": "GPU: kernels",
    r"python -m benchmarks\.soak .*": "long: tests/test_soak.py has its parts",
    r"python -m benchmarks\.speculation .*": "long: minutes; tests/integration/test_speculation.py",
    r"python -m benchmarks\.eagle_head .*": "long: minutes; tests/test_eagle_head.py",
    r"python -m benchmarks\.scheduler_step": "long: minutes on a quiet machine",
    r"python -m benchmarks\.quality .*": "tests/integration/test_quality.py::test_measured_cells",
    r"python -m benchmarks\.models .*": "network: a model and texts from package registries",
    r"(PYTHONPATH=\S+ )?python -m benchmarks\.real .*": (
        "tests/test_real_study.py::test_tables_say_what_share_of_the_full_caches_answers_is_left"
    ),
    r"lm_eval .*": "network: tasks and a model",
    r"python -m pytest -p tests\.mutation .*": "long: hours",
}
