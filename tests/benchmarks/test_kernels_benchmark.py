"""benchmarks/kernels.py where there is no GPU, and the record that every benchmark writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(*arguments: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=BENCHMARKS, env=environment, check=True, capture_output=True, text=True).stdout


def test_without_a_gpu_it_says_what_is_missing_and_predicts(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "kernels.jsonl"
    grid = ["--batch", "64", "--classes", "1000", "--teachers", "2", "--dtype", "bf16", "--arch", "90"]
    lines = script("kernels.py", *grid, "--gpu", "h100", "--out", str(out)).splitlines()
    assert lines[0].startswith("No CUDA device")
    assert any(line.split()[-3:] == ["0.4", "/", "0.5"] for line in lines)  # 64 x 1000 x 2 bytes, 3 and 4 times
    rows = {(row["op"], row["kl"]): row for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == {
        ("dense", False),
        ("dense", True),
        ("dense backward", False),
        ("sparse", True),
        ("topk", False),
    }
    dense = rows["dense", True]
    expected = {"classes": 1000, "teachers": 2, "dtype": "bf16", "arch": "sm_90", "warps": 1, "bytes_per_row": 8008}
    assert expected.items() <= dense.items()
    assert dense["instructions"] == dense["issue_slots_per_row"]  # one warp, no loop
    assert dense["registers"] > 32
    # 64 rows of 8,008 bytes at 3.35 TB/s; that many instructions of 132 multiprocessors with 4 schedulers at 1.98 GHz
    assert dense["predicted us"] == pytest.approx(64 * 8008 / 3.35e6)
    assert dense["bound"] == "memory"
    assert dense["predicted us"] > 64 * dense["issue_slots_per_row"] / (132 * 4 * 1.98e3)
    assert rows["topk", False]["predicted us"] == pytest.approx(
        max(64 * 4128 / 3.35e6, 64 * rows["topk", False]["issue_slots_per_row"] / (132 * 4 * 1.98e3))
    )


def test_record_says_what_it_was_measured_on(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    script("-c", f"from _record import record, write\nfor i in range(2): write({str(path)!r}, [record('x', value=i)])")
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["name"], first["value"], second["value"]) == ("x", 0, 1)
    assert {"gpu", "driver", "cuda", "torch", "triton", "python", "cpu", "cores", "commit", "date"} < set(first)
