"""A signal while a model compiles, in the first step or in an evaluation, does not wait for its end."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from mealfast.machine.stop_signal import CutShort, StopSignal
from mealfast.method.student import Student
from mealfast.recipe import make_recipe
from mealfast.training.loop import train

from ..runs import assert_same_run


def recipe_in(fields, folder, **changes):
    return make_recipe(None, **{**fields, "epochs": 2, "lr_decay_epochs": (1,), "run_dir": str(folder), **changes})


@pytest.fixture(scope="module")
def whole(fields, tmp_path_factory):
    """A run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    train(recipe_in(fields, folder))
    return folder


@pytest.mark.parametrize("place", ["evaluation", "first step", "first step of a resumed run"])
def test_what_has_nothing_to_keep_is_cut_short(fields, weights, whole, tmp_path, monkeypatch, place):
    """The student's forward pass (`logits` in an evaluation), in whose first call it is compiled, never returns."""
    cut = recipe_in(fields, tmp_path / "cut")
    resumed = place.endswith("resumed run")
    if resumed:
        train(recipe_in(fields, tmp_path / "cut", max_steps=2))
    evaluation = place == "evaluation"
    name = "logits" if evaluation else "__call__"
    original = getattr(Student, name)

    def compiling(self, *arguments):
        original(self, *arguments)  # BatchNorm's statistics move
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal was not acted on")

    with monkeypatch.context() as patch:
        patch.setattr(Student, name, compiling)
        summary = train(cut)
    assert not summary["finished"]
    assert summary["steps"] == (2 if resumed else 0)
    if not resumed:
        state = torch.load(weights("test_efficientnet", 1), weights_only=True)
        written = load_file(tmp_path / "cut" / "student.safetensors")
        changed = [key for key, tensor in state.items() if not torch.equal(written[key], tensor)]
        assert all(key.endswith("num_batches_tracked") for key in changed), changed  # which nothing reads
    train(cut)
    assert_same_run(tmp_path / "cut", whole)


def test_a_signal_that_came_before_counts_and_one_after_waits():
    with StopSignal() as stop:
        with stop.at_once():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert (stop.asked, stop.number) == (True, signal.SIGTERM)
        with pytest.raises(CutShort), stop.at_once():
            raise AssertionError("begun after the signal")
