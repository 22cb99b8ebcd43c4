"""Where training and validation images lie, and which are kept for validation where nobody says."""

import hashlib
import os
import shutil

import numpy as np
import pytest

from mealfast.errors import UsageError
from mealfast.loaders import ImageIndex, pack
from mealfast.machine.processes import start
from mealfast.method import folders
from mealfast.method.data import scan_images, scan_splits

from ..conftest import write_tree


@pytest.fixture(scope="module")
def photos_tree(tmp_path_factory):
    """168 images in seven class folders, and nothing else."""
    return write_tree(tmp_path_factory.mktemp("mine") / "photos", dict.fromkeys("abcdefg", 24), seed=7)


def names(index):
    return {index.relative_path(i) for i in range(len(index))}


def made(root, *paths):
    for path in paths:
        (root / path).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("paths", "train", "val"),
    [
        (("train/a", "val/a"), "train", "val"),
        (("Train/a", "Validation/a"), "Train", "Validation"),
        (("training/a", "TEST/a"), "training", "TEST"),
        (("train/a", "valid/a", "test/a"), "train", "valid"),
        (("train/a", "Val/a", "val/a"), "train", "val"),
        (("train/a", "test"), "train", None),  # a competition's: no class folders, no labels
        (("train/a",), "train", None),
        (("a", "b"), ".", None),
        (("valid", "invalid"), ".", None),  # two classes
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_folders_are_found_by_their_usual_names(tmp_path, paths, train, val):
    root = made(tmp_path, *paths)
    found = folders.find(str(root))
    assert found.train == root / train
    assert found.val == (None if val is None else root / val)


def test_a_train_folder_itself_has_its_neighbour(tmp_path, monkeypatch):
    root = made(tmp_path, "train/a", "val/a", "more/a")
    assert folders.find(str(root / "train")) == folders.Folders(root / "train", root / "val")
    assert folders.find(str(root), str(root / "more")) == folders.Folders(root / "train", root / "more")
    monkeypatch.chdir(root / "train")
    assert folders.find(".").val == root / "val"


@pytest.mark.parametrize(
    ("data", "val", "message"),
    [
        ("", "", "--data is missing"),
        ("none", "", "--data .*none: no such folder"),
        ("file", "", "--data .*file: is a file"),
        ("only", "", "--data .*only: has no train/ beside val/"),
        ("both", "nowhere", "--val .*nowhere: no such folder"),
        ("classes", "classes/b", "--val .*classes/b: lies within the training images"),
        ("both", "both/train", "--val .*both/train: lies within"),
    ],
)
def test_a_wrong_folder_is_one_line(tmp_path, data, val, message):
    made(tmp_path, "only/val/a", "both/train/a", "both/val/a", "classes/a", "classes/b")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=message) as caught:
        folders.find(str(tmp_path / data) if data else "", str(tmp_path / val) if val else "")
    assert "\n" not in str(caught.value)


def test_membership_is_the_sha256_of_the_path(photos_tree):
    found = scan_splits(str(photos_tree), share=0.25)
    whole = {str(path.relative_to(photos_tree)) for path in photos_tree.rglob("*.jpg")}
    expected = {
        name for name in whole if int(hashlib.sha256(os.fsencode(name)).hexdigest()[:12], 16) / 2**48 < 0.25
    }  # fmt: skip
    assert names(found.val) == expected
    assert names(found.train) == whole - expected
    assert 0.1 < len(expected) / len(whole) < 0.4
    assert found.train.classes == found.val.classes == tuple("abcdefg")
    assert f"{len(expected)} of 168 images are kept for validation (--val-share 0.25" in found.notes[0]


def test_images_that_are_added_move_none(tmp_path):
    write_tree(tmp_path, {"a": 30, "b": 30}, seed=1)
    before = scan_splits(str(tmp_path))
    for number in range(30):
        shutil.copy(tmp_path / "a" / "000.jpg", tmp_path / "a" / f"new-{number}.jpg")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    after = scan_splits(str(tmp_path))
    assert names(before.val) < names(after.val)
    assert names(before.train) < names(after.train)


def test_each_class_keeps_a_training_image_and_an_absent_one_is_said(tmp_path):
    write_tree(tmp_path, {"a": 40, "b": 1, "c": 1}, seed=1)
    found = scan_splits(str(tmp_path), share=0.999)
    assert np.bincount(found.train.labels, minlength=3).min() >= 1
    assert found.notes[1].startswith("note: no validation image is of 2 classes: b, c;")


@pytest.mark.parametrize("share", [0.001, 1e-9])
def test_a_share_of_nothing_is_refused(tmp_path, share):
    write_tree(tmp_path, {"a": 2, "b": 2}, seed=1)
    with pytest.raises(UsageError, match=rf"^--val-share {share:g}: keeps none of the 4 images"):
        scan_splits(str(tmp_path), share=share)


def test_images_without_classes_need_a_validation_folder(tmp_path, tree):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate((tree / "train").rglob("*.jpg")):
        shutil.copy(path, flat / f"{number}.jpg")
    with pytest.raises(UsageError, match=r"its images lie in no class folders.*--val"):
        scan_splits(str(flat))
    found = scan_splits(str(flat), str(tree / "val"))
    assert (len(found.train), len(found.val)) == (25, 11)
    assert found.notes == ()  # the user has named it
    assert len(scan_images(str(flat), "train", start("cpu"))) == 25


def test_a_selection_is_a_tree_of_these_images_alone(photos_tree, tmp_path):
    whole = ImageIndex.scan(photos_tree)
    rows = np.flatnonzero(np.random.default_rng(0).random(len(whole)) < 0.3)
    chosen = whole.select(rows)
    for i in rows.tolist():
        target = tmp_path / whole.relative_path(i)
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(whole.path(i), target)
    alone = ImageIndex.scan(tmp_path)
    assert (chosen.digest, chosen.images_digest) == (alone.digest, alone.images_digest)
    assert [chosen.path(i) for i in range(len(chosen))] == [whole.path(i) for i in rows.tolist()]
    assert (chosen.widths == alone.widths).all()
    assert chosen.digest != whole.digest


def test_a_pack_is_cut_as_its_folder(photos_tree, tmp_path):
    pack(ImageIndex.scan(photos_tree), tmp_path / "packed")
    ours, theirs = scan_splits(str(tmp_path / "packed")), scan_splits(str(photos_tree))
    assert (ours.train.digest, ours.val.digest) == (theirs.train.digest, theirs.val.digest)
    for i in range(len(ours.val)):
        with open(theirs.val.path(i), "rb") as file:
            assert ours.val.open(i).read() == file.read()


def test_label_caches_and_evaluations_have_the_same_images(photos_tree, capfd):
    runtime, found = start("cpu"), scan_splits(str(photos_tree))
    assert scan_images(str(photos_tree), "train", runtime).digest == found.train.digest
    assert "150 of" not in capfd.readouterr().out
    assert scan_images(str(photos_tree), "val", runtime, share=0.1).digest == found.val.digest
    everything = scan_images(str(photos_tree), "val", runtime)  # which may well be a validation folder
    assert len(everything) == 168
    assert f"note: all images of {photos_tree} count; --val-share" in capfd.readouterr().err
