"""benchmarks/loaders.py runs and writes what it measured; the figures themselves are no test's business."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/loaders.py"


def test_it_measures_every_loader_on_images_like_imagenets(tmp_path):
    out = tmp_path / "results.jsonl"
    options = {"images": 100, "rounds": 3, "seconds": 0.1, "batch-size": 16, "size": 64, "threads": 2}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, SCRIPT, *flags, "--device", "cpu", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["bare-dali", "mealfast-dali", "mealfast-pillow", "torchvision"]
    for row in rows:
        assert row["min"] <= row["spread"]["p25"] <= row["images_per_second"] <= row["spread"]["p75"] <= row["max"]
        assert row["images_per_second"] > 0
        assert row["rounds"] == 3
        assert row["images"] == 100
        width, height = row["mean_pixels"]
        assert 350 < width < 450
        assert 300 < height < 400
        assert 80_000 < row["mean_bytes"] < 140_000


def test_a_missing_folder_gets_one_line(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--data", tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
