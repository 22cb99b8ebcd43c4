"""The demo in pieces: its trees of digits, its pipeline over a few steps, its figure and its table."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mealfast.__main__ import dispatch
from mealfast.cli import demo, demo_data, demo_runs
from mealfast.cli.demo_data import FEW_LABELS, SIDE, TRAIN_IMAGES, write_digits
from mealfast.cli.endings import run_command
from mealfast.loaders import ImageIndex
from mealfast.machine import lock
from mealfast.recipe import make_recipe

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="the demo's digits come from scikit-learn")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits(root, seed=3)
    return root


def names(folder):
    return {path.name for path in folder.rglob("*.jpg")}


def test_the_trees_share_their_validation_images_and_no_training_image(digits):
    train, few, flat = (names(digits / tree / "train") for tree in ("all", "few", "unlabelled"))
    assert (len(train), len(few)) == (TRAIN_IMAGES, FEW_LABELS)
    assert few < train == flat
    val = [names(digits / tree / "val") for tree in ("all", "few", "unlabelled")]
    assert val[0] == val[1] == val[2]
    assert len(val[0]) == 1797 - TRAIN_IMAGES
    assert not val[0] & train


def test_the_images_are_the_digits_and_their_folders_the_labels(digits):
    source = sklearn_datasets.load_digits()
    index = ImageIndex.scan(digits / "all" / "train")
    assert index.classes == tuple("0123456789")
    assert set(index.widths) == set(index.heights) == {SIDE}
    assert ImageIndex.scan(digits / "unlabelled" / "train").labels.tolist() == [-1] * TRAIN_IMAGES
    for row in range(0, TRAIN_IMAGES, 60):
        path = digits / "all" / "train" / index.relative_path(row)
        number = int(path.stem)
        assert int(path.parent.name) == source.target[number] == index.labels[row]
        pixels = np.asarray(Image.open(path).convert("L").resize((8, 8), Image.Resampling.BOX), float)
        assert np.corrcoef(pixels.ravel(), source.images[number].ravel())[0, 1] > 0.9


def test_a_seed_decides_the_split(digits, tmp_path):
    write_digits(tmp_path, seed=4)
    assert names(tmp_path / "all" / "train") != names(digits / "all" / "train")


def test_a_demo_in_use_is_left_alone(tmp_path, capfd):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "image").touch()
    with lock.hold(tmp_path):
        assert run_command(dispatch, ["demo", "--run-dir", str(tmp_path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"mealfast: --run-dir {tmp_path}: is in use by process {os.getpid()} on ")
    assert (tmp_path / "data" / "image").exists()


def test_the_pipeline_over_a_few_steps(tmp_path, capfd, monkeypatch):
    """All six runs through the engine and the DALI loader, cut short; the last line is the object that README shows."""

    def short(name, **changes):
        return make_recipe(name, **{**changes, "epochs": 1, "lr_decay_epochs": (), "eval_every": 0})

    monkeypatch.setattr(demo_runs, "make_recipe", short)
    monkeypatch.setattr(demo, "write_digits", small_digits)
    threads = torch.get_num_threads()
    assert run_command(dispatch, ["demo", "--run-dir", str(tmp_path / "demo"), "--device", "cpu", "--json"]) == 0
    assert torch.get_num_threads() == threads
    out = capfd.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert set(found) == {
        "teachers", "ensemble", "start", "distilled", "same_labels_longer", "all_labels", "seconds",
    }  # fmt: skip
    assert len(found["teachers"]) == 2
    table = "\n".join(out)
    for name in ("ensemble of both", "student at its start", "without labels", "longer on the same", "on all"):
        assert name in table
    root = tmp_path / "demo"
    for name, value in (("distilled", found["distilled"]), ("all-labels", found["all_labels"])):
        assert json.loads((root / name / "summary.json").read_text())["final"]["top1"] == value
    start = json.loads((root / "start" / "summary.json").read_text())
    assert found["start"] == start["final"]["top1"], "distilling must begin where the start ended"
    for name in ("curves.png", "digits.png"):
        assert (root / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((root / "demo.json").read_text()) == found
    assert f"tensorboard --logdir {root}" in table
    assert "?" not in table, "specs are shortened"
    # The command that it ends with runs, and says of a seven what the distilled student says.
    (line,) = [line for line in out if " predict " in line]
    argv = shlex.split(line.partition("predict ")[2].replace("*.jpg", ""))
    (image, *_) = sorted(Path(argv.pop()).glob("*.jpg"))
    assert run_command(dispatch, ["predict", *argv, str(image), "--json", "--top", "10"]) == 0
    (answer,) = json.loads(capfd.readouterr().out)["images"]
    model = timm.create_model(
        "test_efficientnet", num_classes=10, checkpoint_path=root / "distilled/student.safetensors"
    )
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    pixels = (torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1) / 255 - mean) / std
    expected = model.eval()(pixels[None]).softmax(dim=1)[0]
    given = {one["class"]: one["probability"] for one in answer["classes"]}
    assert [given[c] for c in range(10)] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)


def small_digits(root, seed):
    """The demo's trees with 100 training images, 60 of them labelled, and few for validation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_data, "TRAIN_IMAGES", 100)
        patch.setattr(demo_data, "FEW_LABELS", 60)
        write_digits(root, seed)
    kept = sorted((root / "all" / "val").rglob("*.jpg"))[::20]
    for tree in ("all", "few", "unlabelled"):
        for path in (root / tree / "val").rglob("*.jpg"):
            if not any(path.name == one.name for one in kept):
                path.unlink()


@pytest.mark.parametrize(
    ("start", "distilled", "control", "says"),
    [
        (91.6, 98.8, 92.3, None),
        (91.6, 95.59, 92.3, "gained 3.99 points"),
        (91.6, 96.0, 96.0, "no more than the control"),
    ],
)
def test_ci_refuses_a_demo_that_does_not_pay(tmp_path, start, distilled, control, says):
    found = tmp_path / "demo.json"
    found.write_text(json.dumps({"start": start, "distilled": distilled, "same_labels_longer": control}))
    script = Path(__file__).parents[2] / ".ci" / "check_demo.py"
    done = subprocess.run([sys.executable, script, found], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if says is None else 1)
    assert (says or "") in done.stderr
