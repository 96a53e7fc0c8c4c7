# SPDX-License-Identifier: Apache-2.0
"""Requests of the batch benchmarks: lengths of real ones, the same for every engine."""

import argparse
import statistics
from pathlib import Path

import pytest

from benchmarks.batch import write_burstgpt
from benchmarks.batch_ray import draw, tokens
from benchmarks.offline import arguments as of_engine
from benchmarks.offline import options
from benchmarks.parallel import layout
from benchmarks.turn import pauses


def arguments(**given: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"trace": "chat", "num_prompts": 400, "scale": 1.0, "max_model_len": 8192, **given}
    )


@pytest.mark.parametrize(("trace", "longest"), [("chat", 4094), ("code", 7436)])
def test_lengths(trace: str, longest: int, tmp_path: Path) -> None:
    found = draw(arguments(trace=trace))
    assert found == draw(arguments(trace=trace)) and max(found)[0] == longest
    assert statistics.median(given for given, _ in found) > 200
    write_burstgpt(tmp_path / "trace.csv", found)
    lines = (tmp_path / "trace.csv").read_text().splitlines()
    assert [tuple(map(int, line.split(",")[2:4])) for line in lines[1:]] == found


def test_longer_requests_are_cut() -> None:
    found = draw(arguments(trace="documents", max_model_len=4096))
    assert max(map(sum, found)) < 4096 and min(map(min, found)) > 0
    assert len(tokens(3, 50)) == 50 and tokens(3, 50) == tokens(3, 50) != tokens(4, 50)


def test_a_trace_that_is_not_there_ends_the_command(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--trace nothing.*columns input,output"):
        draw(arguments(trace="nothing"))
    (tmp_path / "bad.csv").write_text("input,output\n1,x\n")
    with pytest.raises(SystemExit, match="columns input,output"):
        draw(arguments(trace=str(tmp_path / "bad.csv")))


def test_layouts() -> None:
    assert layout("tp2+pp3") == {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}
    for wrong in ("tp0", "tp", "xx2", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is no layout, like tp2"):
            layout(wrong)


def test_names_of_engines() -> None:
    assert options("stock:kv_cache_dtype=fp8") is None and options("8:dtype=half") == {"ratio": 8}
    given = of_engine("ratio=8,decode=false:kv_cache_dtype=fp8,enforce_eager=true", 1600)
    expected = {"kv_cache_dtype": "fp8", "enforce_eager": True, "num_gpu_blocks_override": 201}
    assert given == expected
    assert of_engine("8", 1600) == {"num_gpu_blocks_override": 101} and of_engine("8", None) == {}


def test_pauses_are_where_no_stream_ran() -> None:
    ran = [(0.0, 2000.0, "a"), (500.0, 1000.0, "b"), (3000.0, 4000.0, "c"), (4500.0, 9000.0, "d")]
    assert pauses(ran[::-1]) == [(1.0, "a", "c"), (0.5, "c", "d")]
    assert pauses([]) == []
