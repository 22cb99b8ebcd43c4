"""The demo in pieces: its trees of digits, its pipeline over a few steps, its figure and its table."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mealfast.__main__ import dispatch
from mealfast.cli import demo, demo_data
from mealfast.cli.demo_data import FEW_LABELS, SIDE, TRAIN_IMAGES, write_digits
from mealfast.cli.endings import run_command
from mealfast.loaders import ImageIndex
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


def test_the_pipeline_over_a_few_steps(tmp_path, capfd, monkeypatch):
    """All six runs through the engine and the DALI loader, cut short; the last line is the object that README shows."""

    def short(name, **changes):
        return make_recipe(name, **{**changes, "epochs": 1, "lr_decay_epochs": (), "eval_every": 0})

    monkeypatch.setattr(demo, "make_recipe", short)
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
    assert (root / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"tensorboard --logdir {root}" in table


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
