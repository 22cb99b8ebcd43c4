"""benchmarks/throughput.py and report.py say what they measured; the figures themselves are no test's business."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..released_code import discriminator_loss, soft_cross_entropy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONTENDERS = ["baseline", "timm-style", "mealfast", "mealfast-replayed", "models-alone", "mealfast-cached"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "results.jsonl"
    options = {"sizes": 32, "batch": 8, "images": 40, "rounds": 2, "seconds": 0.02, "workers": 1, "sweep": 4}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    models = ["--student", "test_efficientnet", "--teachers", "test_resnet", "resnet10t"]
    command = [sys.executable, BENCHMARKS / "throughput.py", *flags, *models, "--device", "cpu", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_it_measures_everyone_the_stages_and_other_batches(results):
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    compared = [row["name"] for row in rows if row["batch"] == 8 and not row["name"].startswith("stage")]
    assert compared == CONTENDERS
    stages = [row["name"] for row in rows if row["name"].startswith("stage: ")]
    assert stages == [
        f"stage: {name}"
        for name in (
            "decode", "teacher test_resnet", "teacher resnet10t", "ensemble", "student forward",
            "student forward and backward", "loss", "step, one batch replayed", "optimiser", "step",
            "step from a label cache",
        )
    ]  # fmt: skip
    assert [row["name"] for row in rows if row["batch"] == 4] == ["mealfast", "mealfast-replayed", "mealfast-cached"]
    for row in rows:
        assert row["spread"]["p25"] <= row["images_per_second"] <= row["spread"]["p75"]
        assert row["images_per_second"] > 0
        assert row["size"] == 32
        assert {"gpu", "driver", "torch", "commit", "date", "precision", "clocks"} <= row.keys()
    assert {row["precision"] for row in rows if row["name"] == "baseline"} == {"float32"}


def test_the_report_has_every_figure_and_its_ratio(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    command = [sys.executable, BENCHMARKS / "report.py", results, "--plot", tmp_path / "plot.png", "--readme", readme]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = {row["name"]: row for row in map(json.loads, results.read_text().splitlines()) if row["batch"] == 8}
    ratio = rows["mealfast"]["images_per_second"] / rows["baseline"]["images_per_second"]
    (line,) = [
        line for line in printed.splitlines() if line.startswith("| **mealfast** |") and f" {ratio:.2f} |" in line
    ]
    assert f"{rows['mealfast']['images_per_second']:,.1f}" in line
    assert readme.read_text() == f"before\n<!-- benchmarks -->\n\n{printed.strip()}\n\n<!-- /benchmarks -->\nafter\n"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_report_refuses_what_is_no_result(tmp_path):
    (tmp_path / "x.jsonl").write_text("{")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "report.py", tmp_path / "x.jsonl"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "cannot be read as JSON lines" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_baseline_learns_what_the_released_code_learns(tree):
    """One step of it has the released code's loss, by that code's formulas in float64."""
    spec = importlib.util.spec_from_file_location("baseline", BENCHMARKS / "baseline.py")
    baseline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(baseline)
    torch.manual_seed(5)
    names = ("test_efficientnet", ["test_resnet", "resnet10t"])
    made = baseline.Baseline(tree / "train", *names, 32, 8, torch.device("cpu"), workers=0)
    images = made.next_batch()
    made.next_batch = lambda: images
    losses = []
    backward = torch.Tensor.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", lambda self: losses.append(float(self.detach())) or backward(self))
        with torch.no_grad():
            student = made.student(images).double()  # BatchNorm in training mode: the same batch, the same output
            teachers = [teacher(images).double() for teacher in made.teachers]
            layers = [
                (m.weight[:, :, 0, 0].double(), m.bias.double()) for m in made.discriminator if hasattr(m, "bias")
            ]
            expected = soft_cross_entropy(student, teachers) + discriminator_loss(student, teachers, layers)
        made.step()
    assert losses == [pytest.approx(float(expected), rel=1e-5)]
    made.close()
