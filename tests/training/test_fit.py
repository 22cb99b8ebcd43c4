"""Batch, epochs and intervals fit few images where nobody says them, and stay as they are when the run goes on."""

import json
from pathlib import Path

import pytest

from mealfast.errors import UsageError
from mealfast.recipe import FITTED, make_recipe
from mealfast.training import fit
from mealfast.training.loop import train

from ..conftest import CLASSES, write_tree
from ..runs import assert_same_run, lines

BARE = {"student": "resnet18", "hard_label_weight": 1.0}
HERE = Path("images")


def fitted(images, processes=1, **changes):
    return fit.fit(make_recipe(**{**BARE, **changes}), processes, images, HERE)


def test_168_photos_make_a_run_of_some_500_steps():
    recipe, said = fitted(150)
    assert (recipe.batch_size, recipe.epochs, recipe.lr_decay_epochs) == (16, 60, (33,))
    assert (recipe.log_every, recipe.eval_every) == (27, 6)
    assert said == [
        "chosen for 150 images: --batch-size 16, --epochs 60, --lr-decay-epochs 33, --eval-every 6, --log-every 27"
    ]
    assert recipe.left_open == ()


@pytest.mark.parametrize("images", [1, 2, 7, 8, 9, 50, 150, 1000, 4095, 4096, 1_281_167])
@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (3, 1), (8, 2)])
def test_a_batch_is_a_power_of_two_of_what_the_processes_share(images, processes, accumulate):
    unit = processes * accumulate
    if images < unit or (images >= 4096 and 512 % unit):
        with pytest.raises(UsageError, match=f"^--batch-size 512: .*{unit} or more|multiple"):
            fitted(images, processes, accumulate=accumulate)
        return
    recipe, _ = fitted(images, processes, accumulate=accumulate)
    pieces, rest = divmod(recipe.batch_size, unit)
    assert rest == 0
    assert images >= 4096 or pieces & (pieces - 1) == 0
    assert 1 <= recipe.batch_size <= min(512, images)
    assert images // recipe.batch_size >= min(8, images // max(8, unit))
    assert recipe.epochs >= 60
    assert recipe.lr_decay_epochs[0] < recipe.epochs


def test_what_is_given_stays():
    recipe, said = fitted(150, batch_size=50, epochs=7, eval_every=2, log_every=9)
    assert (recipe.batch_size, recipe.epochs, recipe.eval_every, recipe.log_every) == (50, 7, 2, 9)
    assert recipe.lr_decay_epochs == (100,)
    assert said == []
    whole, said = fitted(4096)
    assert (whole.batch_size, whole.epochs, whole.lr_decay_epochs, whole.log_every) == (512, 180, (100,), 50)
    assert said == []
    named = make_recipe("resnet50-224")
    assert named.left_open == ()
    with pytest.raises(
        UsageError, match=r"^--batch-size 512: images holds only 150 training images: use --batch-size 16"
    ):
        fit.fit(named, 1, 150, HERE)


@pytest.fixture
def small(tmp_path, fields):
    """A recipe of 40 images that leaves everything open which may be."""
    data = write_tree(tmp_path / "photos", dict.fromkeys(CLASSES, 16), seed=3)
    left = {name: value for name, value in fields.items() if name not in FITTED}
    return {**left, "data": str(data), "teachers": fields["teachers"][:1], "eval_start": False, "tune_teachers": False}


def test_the_same_command_goes_on_with_what_was_chosen(small, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_recipe(**small, run_dir=str(whole), epochs=2))
    train(make_recipe(**small, run_dir=str(parts), epochs=2, max_steps=5))
    before = json.loads((parts / "config.json").read_text())["recipe"]
    assert before["batch_size"] == 8
    train(make_recipe(**small, run_dir=str(parts), epochs=2))
    after = json.loads((parts / "config.json").read_text())["recipe"]
    assert [before[name] for name in FITTED] == [after[name] for name in FITTED]
    assert_same_run(whole, parts)
    with pytest.raises(UsageError, match="holds a run with --batch-size 8, not 16"):
        train(make_recipe(**small, run_dir=str(parts), epochs=2, batch_size=16))


def test_a_run_of_its_own_name_is_found_again_by_the_same_command(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = make_recipe(**small, epochs=1)
    assert (
        make_recipe(**small, epochs=1).run_dir == make_recipe(**small, epochs=3, log_every=1).run_dir == first.run_dir
    )
    names = {
        make_recipe(**{**small, **change}).run_dir
        for change in ({}, {"lr": 0.5}, {"seed": 1}, {"batch_size": 512}, {"data": "photos"}, {"data": "more/photos"})
    }
    assert len(names) == 5  # the same folder by another path is the same data
    assert all(name.startswith("runs/test_efficientnet-photos-") for name in names)
    train(first)
    summary = train(make_recipe(**small, epochs=1))
    assert summary["finished"]
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_log_has_a_line_after_half_a_minute_and_metrics_do_not(small, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("mealfast.record.console.SILENCE", 0.0)
    train(make_recipe(**small, run_dir=str(tmp_path / "run"), epochs=1, log_every=3))
    logged = [line for line in capfd.readouterr().err.splitlines() if line.startswith("epoch 1/1  step ")]
    assert len(logged) == 5  # one a step, of which two have values
    assert sum("loss" in line for line in logged) == 2
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "train"] == [2, 4]


@pytest.mark.parametrize(
    ("student", "tuned"),
    [
        ("resnet18@w.pth", True), ("resnet18?num_classes=7@w.pth", True), ("resnet18.tv_in1k", True),
        ("resnet18.tv_in1k?num_classes=7", False), ("resnet18?num_classes=7", False),
    ],
)  # fmt: skip
def test_a_student_that_has_learnt_goes_on_by_small_steps(student, tuned):
    """The linear scaling rule (arXiv 1706.02677) from the paper's 0.01 at 512, and statistics that few images keep."""
    recipe, said = fitted(150, student=student)
    assert (recipe.lr, recipe.student_bn) == ((0.01 * 16 / 512, "eval") if tuned else (0.01, "train"))
    assert ("--lr 0.0003125, --student-bn eval" in said[0]) is tuned
    given, _ = fitted(150, student=student, lr=0.1, student_bn="train")
    assert (given.lr, given.student_bn) == (0.1, "train")
    many, _ = fitted(4096, student=student)
    assert (many.lr, many.student_bn) == (0.01, "train")
