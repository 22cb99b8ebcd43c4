"""A run that was stopped and resumed is the run that never stopped: one process, to the bit."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from mealfast.errors import UsageError
from mealfast.machine.stop_signal import SIGNALS, StopSignal
from mealfast.recipe import make_recipe
from mealfast.record import checkpoint
from mealfast.record.run_directory import RunDirectory
from mealfast.training.loop import train
from mealfast.training.step import Step

from ..runs import assert_same_run, die, differences, last, lines, lines_but_speeds

TOTAL = 9  # steps: 3 epochs of 3


@pytest.fixture(scope="module")
def everything(fields):
    """Dropout, drop path, CutMix, discriminator, labels, decay: all that a resumed run could lose the thread of."""
    spec = fields["student"].replace("@", "?drop_rate=0.3&drop_path_rate=0.3@")
    return fields | {"student": spec, "cutmix": True, "discriminator": "cooperative", "hard_label_weight": 0.2}


def run(fields, folder, **changes):
    return train(make_recipe(**{**fields, "run_dir": str(folder), **changes}))


@pytest.fixture(scope="module")
def whole(everything, tmp_path_factory):
    """The folder of a run that never stopped, and what it returned."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(everything, folder)


@pytest.mark.parametrize(
    ("stops", "changes"),
    [((1,), {}), ((5,), {}), ((2, 7), {"checkpoint_every": 1, "accumulate": 2}), ((4,), {"loader": "dali"})],
    ids=["in the first epoch", "between two logs", "twice", "DALI"],
)
def test_a_resumed_run_is_the_run_that_never_stopped(everything, whole, tmp_path, stops, changes):
    folder, wanted = whole if not changes else (tmp_path / "whole", run(everything, tmp_path / "whole", **changes))
    for stop in stops:
        summary = run(everything, tmp_path / "stopped", max_steps=stop, **changes)
        assert (summary["finished"], summary["steps"], summary["total_steps"]) == (False, stop, TOTAL)
        assert last(tmp_path / "stopped")["step"] == stop
    summary = run(everything, tmp_path / "stopped", **changes)
    assert_same_run(tmp_path / "stopped", folder)
    for key in ("finished", "steps", "start", "final", "best", "teachers", "ensemble", "skipped_steps"):
        assert summary[key] == wanted[key], key
    steps = [line["step"] for line in lines(tmp_path / "stopped") if line["kind"] == "train"]
    assert steps == [1, 3, 5, 7, 8]


def test_dropout_matters_to_the_test_above(everything, tmp_path):
    """Were random numbers not restored, the runs would differ: with another state of the generator they do."""
    run(everything, tmp_path / "a", max_steps=2)
    folder = tmp_path / "b"
    run(everything, folder, max_steps=1)
    content = last(folder)
    content["processes"][0]["rng"]["cpu"] = torch.Generator().manual_seed(9).get_state()
    (path,) = checkpoint.candidates(folder / "checkpoints")
    path.unlink()
    checkpoint.save(folder / "checkpoints", 1, content, keep=2)
    run(everything, folder, max_steps=2)
    assert differences(last(folder)["student"], last(tmp_path / "a")["student"])


def test_a_killed_run_goes_on_from_its_last_checkpoint(everything, whole, tmp_path, monkeypatch):
    """Steps, lines and half-written files after the last checkpoint are as if they had never been."""
    folder, step = tmp_path / "killed", Step.__call__
    with monkeypatch.context() as patch:

        def dies(self, batch, number):
            if number == 5:
                die()
            return step(self, batch, number)

        patch.setattr(Step, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            run(everything, folder, checkpoint_every=4)
    assert last(folder)["step"] == 4
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind": "train", "step": 5, "lo')
    (folder / "checkpoints" / ".writing-x").mkdir()
    (folder / ".config.json.x.tmp").write_text("half")
    run(everything, folder)
    assert_same_run(folder, whole[0])
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(everything, whole, tmp_path, capfd):
    folder = tmp_path / "damaged"
    run(everything, folder, max_steps=5)
    newest, before = checkpoint.candidates(folder / "checkpoints")
    assert [checkpoint.step_of(path) for path in (newest, before)] == [5, 3]
    content = bytearray(newest.read_bytes())
    content[len(content) // 3] ^= 4
    newest.write_bytes(content)
    capfd.readouterr()
    run(everything, folder)
    assert f"{newest} is damaged" in capfd.readouterr().err
    assert_same_run(folder, whole[0])


def test_a_named_checkpoint_is_taken_up_and_what_lay_ahead_is_done_again(everything, tmp_path):
    folder = tmp_path / "run"
    run(everything, folder, keep=9)
    (path,) = [one for one in checkpoint.candidates(folder / "checkpoints") if checkpoint.step_of(one) == 3]
    before = lines_but_speeds(folder)
    run(everything, folder, resume=str(path), max_steps=4, keep=9)
    assert last(folder)["step"] == 4
    assert [line["step"] for line in lines(folder)] == [0, 1, 3, 3, 4]  # the last two: stopped here, not scheduled
    run(everything, folder)
    assert lines_but_speeds(folder) == before


def test_a_finished_run_is_left_as_it_is(everything, tmp_path):
    folder = tmp_path / "run"
    first = run(everything, folder, max_steps=TOTAL)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tensorboard" not in str(path)}
    assert run(everything, folder) == first
    for path, content in files.items():
        if path.name != "config.json":  # says --max-steps
            assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.01}, "--lr 0.05, not 0.01"),
        ({"seed": 7}, "--seed 0, not 7"),
        ({"epochs": 2}, "--epochs 3, not 2: a run can be given more epochs, not fewer"),
        ({"cutmix": True}, "--cutmix False, not True"),
        ({"hard_label_weight": 0.5}, "--hard-label-weight 0.0, not 0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_options_in_a_used_run_directory_are_refused(options, tmp_path, changes, words):
    recipe = make_recipe(**options)
    directory = RunDirectory(recipe.run_dir)
    directory.claim({"recipe": recipe.to_json()})
    allowed = {"max_steps": 4, "keep": 3, "checkpoint_every": 5, "epochs": 4, "log_every": 3, "eval_every": 2}
    directory.check(make_recipe(**{**options, **allowed}))
    before = directory.config.read_bytes()
    with pytest.raises(UsageError) as caught:
        train(make_recipe(**{**options, **changes}))
    assert str(caught.value).startswith(f"--run-dir {recipe.run_dir}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert directory.config.read_bytes() == before


@pytest.mark.parametrize("stop", [None, 10], ids=["at its end", "in the middle"])
def test_an_extended_run_is_the_run_that_was_planned_so_long(everything, tmp_path, stop):
    """Five epochs and then eight; the last step of the five is logged and evaluated out of turn."""
    fields = everything | {"teachers": everything["teachers"][:1], "lr_decay_epochs": (2, 6), "eval_every": 4}
    if stop is None:  # else the end of the five would give the best score of the eight
        fields |= {"eval_every": 1}
    run(fields, tmp_path / "planned", epochs=8)
    run(fields, tmp_path / "extended", epochs=5, max_steps=stop)
    summary = run(fields, tmp_path / "extended", epochs=8)
    assert (summary["finished"], summary["steps"]) == (True, 24)
    assert_same_run(tmp_path / "extended", tmp_path / "planned")


def test_a_run_takes_up_another_rhythm_and_keeps_what_was_done(everything, tmp_path):
    """Three stretches: a line every 2 steps and an evaluation every epoch; 3 and none; 1 and none."""
    fields = everything | {"teachers": everything["teachers"][:1], "epochs": 5}
    run(fields, tmp_path / "run", max_steps=6)
    run(fields, tmp_path / "run", max_steps=11, log_every=3, eval_every=0)
    run(fields, tmp_path / "run", log_every=1, eval_every=0)
    found = {
        kind: [line["step"] for line in lines(tmp_path / "run") if line["kind"] == kind] for kind in ("train", "eval")
    }
    assert found == {"train": [1, 3, 5, 8, 11, 12, 13, 14], "eval": [0, 3, 6, 15]}
    run(fields, tmp_path / "whole")
    assert differences(last(tmp_path / "run")["student"], last(tmp_path / "whole")["student"]) == []


def test_a_best_score_at_the_end_that_was_planned_is_kept_with_a_note(everything, tmp_path, capsys):
    """A run of four epochs would not have evaluated after the third: its score stays, and so does its line."""
    fields = everything | {"teachers": everything["teachers"][:1], "eval_every": 4, "keep": 1}
    run(fields, tmp_path / "run")
    state = last(tmp_path / "run")
    state["scores"]["best"] = {**state["scores"]["latest"], "top1": 101.0}
    (path,) = checkpoint.candidates(tmp_path / "run" / "checkpoints")
    path.unlink()
    checkpoint.save(tmp_path / "run" / "checkpoints", TOTAL, state, keep=1)
    capsys.readouterr()
    summary = run(fields, tmp_path / "run", epochs=4)
    assert "note: the evaluation after 9 steps" in capsys.readouterr().err
    assert summary["best"]["step"] == TOTAL
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "eval"] == [0, 9, 12]


def test_other_images_or_teachers_under_the_same_names_are_refused(options, weights, tree, tmp_path):
    teacher = tmp_path / "teacher.pth"
    shutil.copy(weights("test_resnet", 2), teacher)
    data = shutil.copytree(tree, tmp_path / "data")
    options |= {"data": str(data), "teachers": (f"test_resnet@{teacher}",), "max_steps": 1, "eval_start": False}
    train(make_recipe(**options))
    torch.save(torch.load(weights("test_resnet", 5), weights_only=True), teacher)
    with pytest.raises(UsageError, match=r"^--teachers: not the teachers that the run of checkpoint"):
        train(make_recipe(**options))
    shutil.copy(weights("test_resnet", 2), teacher)
    (data / "train" / "ant" / "000.jpg").unlink()
    with pytest.raises(UsageError, match=r"^--data: not the images that the run of checkpoint"):
        train(make_recipe(**options))


def test_never_refuses_a_used_directory_and_a_damaged_config_is_named(options, tmp_path):
    recipe = make_recipe(**options, resume="never")
    directory = RunDirectory(recipe.run_dir)
    directory.check(recipe)
    directory.claim({"recipe": recipe.to_json()})
    with pytest.raises(UsageError, match="already holds a run"):
        directory.check(recipe)
    directory.config.write_text('{"recipe": ')
    with pytest.raises(UsageError, match=r"config\.json: is damaged"):
        directory.check(make_recipe(**options))


def test_sigterm_ends_a_run_well_and_it_resumes(everything, tmp_path):
    fields = everything | {"epochs": 16, "lr_decay_epochs": (10,), "log_every": 5, "eval_every": 0}
    folder = tmp_path / "stopped"
    argv = []
    for name, value in {**fields, "run_dir": str(folder)}.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            argv += [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    log = (tmp_path / "log").open("w+")
    # Sums over another number of threads round differently.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "mealfast", "train", *argv]
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        log.close()
    stopped = last(folder)["step"]
    assert 5 <= stopped < 48
    text = (tmp_path / "log").read_text()
    assert f"stopped after {stopped} of 48 steps; the same command goes on from here" in text
    assert "Traceback" not in text
    run(fields, folder)
    run(fields, tmp_path / "whole")
    assert_same_run(folder, tmp_path / "whole")


def test_a_second_interrupt_ends_at_once_and_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignal() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        for number in SIGNALS:
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_each_signal_asks_and_one_that_was_ignored_stays_so(number):
    """Under nohup SIGHUP is ignored. SIGTERM and SIGINT are heard all the same: a shell starts background jobs with the
    latter ignored."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert stop.asked == (number in (signal.SIGTERM, signal.SIGINT))
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked
