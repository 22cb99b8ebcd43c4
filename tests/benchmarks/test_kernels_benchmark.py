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


def test_without_a_gpu_it_says_what_is_missing_and_what_is_known():
    pytest.importorskip("triton")
    grid = ["--batch", "64", "--classes", "1000", "--teachers", "2", "--dtype", "bf16", "--arch", "90"]
    lines = script("kernels.py", *grid).splitlines()
    assert lines[0].startswith("No CUDA device")
    assert any(line.split()[-3:] == ["0.4", "/", "0.5"] for line in lines)  # 64 x 1000 x 2 bytes, 3 and 4 times
    assert sum("128-bit loads" in line for line in lines) == 2


def test_record_says_what_it_was_measured_on(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    script("-c", f"from _record import record, write\nfor i in range(2): write({str(path)!r}, [record('x', value=i)])")
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["name"], first["value"], second["value"]) == ("x", 0, 1)
    assert {"gpu", "driver", "cuda", "torch", "triton", "python", "cpu", "cores", "commit", "date"} < set(first)
