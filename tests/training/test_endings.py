"""Whatever ends a run but SIGKILL: the last finished step is kept, one line says why, and the same command goes on."""

import os
import shutil
import signal

import pytest
import torch

from mealfast.cli.endings import run_command
from mealfast.errors import RunError
from mealfast.loaders import DataError
from mealfast.method.student import Student
from mealfast.recipe import make_recipe
from mealfast.training.feed import Feed
from mealfast.training.loop import train
from mealfast.training.optimiser import Optimiser
from mealfast.training.step import Step

from ..runs import assert_same_run, differences, last, lines, lines_but_speeds


@pytest.fixture(scope="module")
def everything(fields):
    """Dropout and BatchNorm: what a step that fails half-way has changed already."""
    return fields | {
        "student": fields["student"].replace("@", "?drop_rate=0.3@"), "teachers": fields["teachers"][:1],
        "cutmix": True, "log_every": 1, "checkpoint_every": 100,
    }  # fmt: skip


def run(fields, folder, **changes):
    return train(make_recipe(**{**fields, "run_dir": str(folder), **changes}))


@pytest.fixture(scope="module")
def whole(everything, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(everything, folder)
    return folder


@pytest.mark.parametrize(
    ("evaluation", "step", "number"),
    [(0, 0, signal.SIGHUP), (1, 3, signal.SIGUSR1), (3, 9, signal.SIGTERM)],
    ids=["first", "middle", "last"],
)
def test_a_signal_during_an_evaluation_cuts_it_short(
    everything, whole, tmp_path, monkeypatch, evaluation, step, number
):
    """Of val/'s two batches the second is not asked for; the run goes on with the evaluation that is due."""
    logits, calls = Student.logits, []  # which training does not call

    def interrupted(self, images):
        calls.append(1)
        if len(calls) == 2 * evaluation + 1:
            os.kill(os.getpid(), number)
        return logits(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "logits", interrupted)
        summary = run(everything, tmp_path / "run")
    assert len(calls) == 2 * evaluation + 1
    assert (summary["finished"], summary["steps"]) == (False, step)
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "eval"] == [0, 3, 6][:evaluation]
    if step:
        assert last(tmp_path / "run")["step"] == step
    assert run(everything, tmp_path / "run")["finished"]
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_while_an_evaluation_is_due_at_max_steps(everything, tmp_path, monkeypatch):
    """It ends a run out of turn; the same command evaluates."""
    logits = Student.logits

    def interrupted(self, images):
        os.kill(os.getpid(), signal.SIGTERM)
        return logits(self, images)

    fields = everything | {"eval_start": False, "eval_every": 0, "max_steps": 4}
    with monkeypatch.context() as patch:
        patch.setattr(Student, "logits", interrupted)
        assert run(fields, tmp_path / "run")["final"] is None
    assert last(tmp_path / "run")["step"] == 4
    assert run(fields, tmp_path / "run")["final"]["step"] == 4


@pytest.fixture
def broken(tree, tmp_path):
    """A copy of the images, and a function that removes a folder of it, or brings it back."""
    root = shutil.copytree(tree, tmp_path / "tree")

    def change(folder: str) -> None:
        if (root / folder).exists():
            shutil.rmtree(root / folder)
        else:
            shutil.copytree(tree / folder, root / folder)

    return root, change


@pytest.mark.parametrize(
    ("folder", "kept"), [("val", 6), ("val/bee", 6), ("train/ant", None)], ids=["val", "a class of val", "of train"]
)
def test_folders_that_vanish_cost_no_finished_step(
    everything, whole, tmp_path, monkeypatch, capsys, broken, folder, kept
):
    """After step 5, far from the next checkpoint."""
    root, change = broken
    step, taken = Step.__call__, []

    def watched(self, batch, number):
        if number == 4 and not taken.count(4):
            change(folder)
        step(self, batch, number)
        taken.append(number)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", watched)
        capsys.readouterr()
        status = run_command(lambda argv: run(everything, tmp_path / "run", data=str(root)) and 0, [])
    said = capsys.readouterr().err.splitlines()
    assert status == 2
    assert said[-1].startswith(f"mealfast: {root}/{folder.partition('/')[0]}")
    done = taken[-1] + 1
    assert done == kept or (kept is None and 5 <= done < 9)
    assert f"{done} steps are saved: {tmp_path}/run/checkpoints" in said[-2]
    assert last(tmp_path / "run")["step"] == done
    change(folder)
    assert run(everything, tmp_path / "run", data=str(root))["finished"]
    if kept:  # broken training images were replaced before there were too many
        assert_same_run(tmp_path / "run", whole)


def test_an_error_within_a_step_leaves_no_trace(everything, whole, tmp_path, monkeypatch, capsys):
    """Raised after the forward pass, which has drawn random numbers and moved running statistics."""
    backward, calls = Optimiser.backward, []

    def fails(self, loss):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError("no memory for gradients")
        backward(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Optimiser, "backward", fails)
        with pytest.raises(MemoryError):
            run(everything, tmp_path / "run")
    assert f"5 steps are saved: {tmp_path}/run/checkpoints" in capsys.readouterr().err
    assert last(tmp_path / "run")["step"] == 5
    run(everything, tmp_path / "run")
    ours, theirs = last(tmp_path / "run"), last(whole)
    changed = differences(ours["student"], theirs["student"])
    assert changed, "the count of the failed forward pass"
    assert all(name.endswith("num_batches_tracked") for name in changed), changed  # which nothing reads
    assert differences(ours["optimizer"]["state"], theirs["optimizer"]["state"]) == []
    assert lines_but_speeds(tmp_path / "run") == lines_but_speeds(whole)


def test_an_error_after_a_step_keeps_it(everything, whole, tmp_path, monkeypatch):
    """Between the device's work and the count of it, as where a label cache cannot be written."""
    step = Step.__call__

    def fails(self, batch, number):
        step(self, batch, number)
        if number == 4:
            raise DataError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", fails)
        with pytest.raises(DataError, match="no room"):
            run(everything, tmp_path / "run")
    assert last(tmp_path / "run")["step"] == 5
    run(everything, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_an_error_at_the_end_adds_no_step(everything, whole, tmp_path, monkeypatch):
    """The end's measurement trains on: nothing of it may be taken for a step."""

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mealfast.training.finish.weights.save", full)
        with pytest.raises(RunError, match=r"student\.safetensors: cannot be written \(No space left on device\)"):
            run(everything, tmp_path / "run")
    assert last(tmp_path / "run")["step"] == last(whole)["step"]
    assert lines_but_speeds(tmp_path / "run") == lines_but_speeds(whole)
    run(everything, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_what_is_said_of_the_last_weights_is_true(everything, weights, tmp_path):
    """At this learning rate the first step is finite and its weights are not worth keeping; every later one is bad."""
    with pytest.raises(RunError) as caught:
        run(everything, tmp_path / "run", student=f"test_vit@{weights('test_vit', 9)}", lr=1e30, max_bad_steps=3)
    saved = last(tmp_path / "run")["student"]
    parameters = {name: one.abs().max() for name, one in saved.items() if "running" not in name and one.dim() > 0}
    name = max(parameters, key=lambda one: float(parameters[one]))
    assert float(parameters[name]) > 1e25
    assert f"largest |weight| {float(parameters[name]):.4g} ({name})" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_batch_that_cannot_be_had_is_told_ahead(everything):
    """A feed of several processes notes the error two steps before the batch is due, and gives what comes before."""

    class Loader:
        def __iter__(self):
            yield from (torch.tensor(number) for number in range(4))
            raise DataError("no fifth")

    feed, told = Feed(Loader(), 2), []
    for number in range(4):
        assert int(feed.next()) == number
        told.append(feed.error is not None)
    assert told == [False, False, True, True]
    with pytest.raises(DataError, match="no fifth"):
        feed.next()
