# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels exist once per instruction set. All other tests run the machine's best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SAMPLE = [
    "test_paged_attention.py::test_hostile_batch[cpu-16-32-1-dtype0]",
    "test_paged_attention.py::test_hostile_batch[cpu-16-80-2-dtype1]",
    "test_paged_attention.py::test_hostile_batch[cpu-16-128-7-dtype2]",
    "test_paged_attention.py::test_free_memory_does_not_matter[cpu-dtype1]",
    "test_attention_statistics.py::test_hostile_batch[cpu-8-32-2-dtype1]",
    "test_attention_statistics.py::test_hostile_batch[cpu-16-80-7-dtype0]",
    "test_attention_statistics.py::test_low_count_where_it_is_clear_cut[cpu]",
    "test_key_statistics.py::test_hostile_batch[cpu-8-80-dtype1]",
    "test_key_statistics.py::test_hostile_batch[cpu-16-128-dtype2]",
    "test_echo_scores.py::test_hostile_batch[cpu-8-80-7-dtype1]",
    "test_echo_scores.py::test_nan_stays_visible[cpu-dtype0-query]",
]


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets(capability):
    best = torch.backends.cpu.get_cpu_capability().lower()
    if best == capability:
        pytest.skip(f"{best} is what all other tests run")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + [str(HERE / node) for node in SAMPLE],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )
    assert result.returncode == 0, result.stdout
    assert f"{len(SAMPLE)} passed" in result.stdout or "skipped" in result.stdout
