"""benchmarks/label_cache.py runs and writes what it measured; the figures themselves are no test's business."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/label_cache.py"


def test_it_measures_every_student_and_their_ratios(tree, tmp_path):
    out = tmp_path / "results.jsonl"
    options = {
        "rounds": 2,
        "seconds": 0.1,
        "batch-size": 8,
        "size": 32,
        "threads": 1,
        "classes": 20,
        "loader": "pillow",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, SCRIPT, "--data", tree / "train", "--student", "test_efficientnet", *flags]
    subprocess.run([*command, "--device", "cpu", "--amp", "off", "--out", out], check=True, capture_output=True)
    rows = {row["name"]: row for row in map(json.loads, out.read_text().splitlines())}
    names = ["hard-labels", "cached", "cached-discriminator"]
    assert list(rows) == [
        *(f"label-cache/{name}" for name in names), *(f"label-cache/{name} to hard-labels" for name in names[1:])
    ]  # fmt: skip
    for name, row in rows.items():
        value = row["ratio" if " to " in name else "images_per_second"]
        assert 0 < row["min"] <= value * 1.01
        assert value <= row["max"] * 1.01
        assert (row["rounds"], row["images"], row["top_k"]) == (2, 25, 10)
