"""A disk that is full or read-only while a run writes: the run goes on, and nothing is lost or half-written."""

import os
import re
import resource
import subprocess
import threading
from contextlib import contextmanager

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mealfast.cli.endings import run_command
from mealfast.errors import RunError
from mealfast.machine import append_log
from mealfast.machine.append_log import AppendLog
from mealfast.recipe import make_recipe
from mealfast.record import checkpoint
from mealfast.record.checkpoint_writer import CheckpointWriter
from mealfast.training.loop import train
from mealfast.training.step import Step

from ..runs import assert_same_run, die, lines


@contextmanager
def largest_file(size: int):
    """The system refuses to make any file larger than `size` bytes: as a full disk does, and for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk(folder, room: int = 0):
    """A file beside the run takes all but `room` bytes of the disk."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        file.write(b"x" * max(free - room, 0))
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def during(monkeypatch, steps: range, trouble):
    """Has the steps numbered so, and what the loop does after them, run in the context `trouble()`."""
    step, inside = Step.__call__, []

    def call(self, batch, number):
        for thread in threading.enumerate():  # so that it is told from the step which checkpoints were in time
            if thread.name == "mealfast-checkpoint":
                thread.join()
        if inside and number not in steps:
            inside.pop().__exit__(None, None, None)
        if number in steps and not inside:
            inside.append(trouble())
            inside[0].__enter__()
        return step(self, batch, number)

    monkeypatch.setattr(Step, "__call__", call)
    return inside


def run(fields, folder, **changes):
    return train(make_recipe(**{**fields, "checkpoint_every": 1, "log_every": 1, "run_dir": str(folder), **changes}))


@pytest.fixture(scope="module")
def whole(fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(fields, folder)
    return folder


def assert_board_is_complete(folder):
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    wanted = {line["step"]: line["loss"] for line in lines(folder) if line["kind"] == "train"}
    assert {event.step: pytest.approx(event.value) for event in board.Scalars("train/loss")} == wanted
    assert [event.step for event in board.Images("target/0")] == [0, 3, 6, 9]


@pytest.mark.parametrize("disk", ["limited", "full"])
def test_a_run_goes_on_where_the_disk_is_full_and_nothing_is_missing_after(
    fields, whole, tmp_path, request, monkeypatch, capsys, disk
):
    """From step 3 to 6, an evaluation with a new best included, nothing can be written."""
    if disk == "full":
        folder = request.getfixturevalue("small_disk")
        trouble = lambda: full_disk(folder)  # noqa: E731
    else:
        folder, trouble = tmp_path, lambda: largest_file(1000)
    seen = []

    def watched():
        seen.extend(checkpoint.candidates(folder / "run" / "checkpoints"))
        return trouble()

    inside = during(monkeypatch, range(2, 6), watched)
    capsys.readouterr()
    run(fields, folder / "run")
    assert not inside
    error = capsys.readouterr().err
    warned = [line for line in error.splitlines() if line.startswith("warning: the checkpoint")]
    assert len(warned) == 1, error
    needed = int(re.search(r"needs ([\d,]+) bytes", warned[0])[1].replace(",", ""))
    assert str(folder / "run" / "checkpoints") in warned[0]
    assert needed == pytest.approx(checkpoint.candidates(folder / "run" / "checkpoints")[0].stat().st_size, rel=1e-3)
    assert "the checkpoint of step 7 is written" in error
    refused = "metrics.jsonl" if disk == "limited" else "events.out.tfevents"  # the lines fit into a page that is there
    assert len(re.findall(f"{refused}.*: cannot be written", error)) == 1
    assert re.search(f"{refused}.*: is written again", error)
    assert seen, "no checkpoint lay there when the disk filled up"
    assert_same_run(folder / "run", whole)
    assert_board_is_complete(folder / "run")
    assert not [path for path in (folder / "run").rglob("*") if path.name.startswith(".")]


def test_the_checkpoint_before_stays_whole_and_a_resumed_run_is_the_same(fields, whole, tmp_path, monkeypatch):
    """The process dies while the disk is full: what it goes on from is the last checkpoint that was written."""
    step = Step.__call__

    def dies(self, batch, number):
        if number == 5:
            die()
        return step(self, batch, number)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dies)
        during(patch, range(2, 99), lambda: largest_file(1000))
        with pytest.raises(KeyboardInterrupt), largest_file(resource.RLIM_INFINITY):
            run(fields, folder)
    files = checkpoint.candidates(folder / "checkpoints")
    assert [checkpoint.step_of(path) for path in files] == [2, 1]
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    run(fields, folder)
    assert_same_run(folder, whole)


def test_a_disk_that_stays_full_ends_the_run_with_a_line_and_status_1(fields, whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, largest_file(resource.RLIM_INFINITY):
        during(patch, range(4, 99), lambda: largest_file(1000))
        status = run_command(lambda argv: run(fields, folder) and 0, [])
    assert status == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"mealfast: {folder / 'checkpoints'}: ")
    assert f"{folder / 'student.safetensors'}: cannot be written" in last
    assert f"{folder / 'summary.json'}: cannot be written" in last
    assert "step-00000004-" in last
    assert not (folder / "student.safetensors").exists()
    run(fields, folder)
    assert_same_run(folder, whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_folder_is_named(tmp_path):
    said = []
    writer = CheckpointWriter(tmp_path / "c", 2, said.append)
    (tmp_path / "c").mkdir(mode=0o500)
    writer.save(1, {"w": torch.zeros(3)}, best=False)
    writer.wait()
    assert str(tmp_path / "c") in said[0]
    assert "Permission denied" in said[0]


def test_an_appended_file_has_every_byte_once(tmp_path):
    """However the disk cuts a write short."""
    said, path = [], tmp_path / "log"
    log = AppendLog(path, said.append)
    content = [f"line {number}\n".encode() * 20 for number in range(40)]
    for number, data in enumerate(content):
        with largest_file(100 * number + 7):
            log.write(data)
    assert len(said) >= 1
    assert "cannot be written" in said[0]
    log.write(b"end\n")
    assert log.close() == 0
    assert path.read_bytes() == b"".join(content) + b"end\n"


def test_what_is_kept_in_memory_is_bounded_and_what_is_lost_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(append_log, "LIMIT", 1000)
    said = []
    log = AppendLog(tmp_path / "log", said.append)
    with largest_file(0):
        for _ in range(15):
            log.write(b"x" * 100)
        assert len(said) == 1
    log.write(b"end")
    assert "500 bytes are lost" in said[1]
    assert log.close() == 500
    assert (tmp_path / "log").read_bytes() == b"x" * 1000 + b"end"


def test_a_telemetry_that_lost_lines_says_so(tmp_path):
    from mealfast.record.metrics import Telemetry

    telemetry = Telemetry(tmp_path, 0, lambda line: True, lambda line: None)
    with largest_file(0):
        telemetry.write({"kind": "eval", "step": 3, "kl": 1})
        with pytest.raises(RunError, match=r"metrics\.jsonl: 37 bytes of it and .* could not be written"):
            telemetry.close()


def test_what_goes_wrong_in_the_thread_beside_the_disk_is_raised(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, 2, lambda line: None)
    writer.save(1, {"w": lambda: None}, best=False)
    with pytest.raises(Exception, match="pickle"):
        writer.wait()
    writer.wait()


def test_a_checkpoint_holds_the_moment_at_which_it_was_asked_for(tmp_path, monkeypatch):
    """Whatever happens to weights and scores while the thread writes."""
    go, encode = threading.Event(), checkpoint.encode
    monkeypatch.setattr(checkpoint, "encode", lambda *args: go.wait(10) and encode(*args))
    weight, scores = torch.ones(5), {"best": {"top1": 1.0}}
    writer = CheckpointWriter(tmp_path, 2, lambda line: None)
    writer.save(1, {"w": weight, "scores": scores, "list": [weight]}, best=True)
    weight += 1
    scores["best"]["top1"] = 2.0
    go.set()
    writer.save(2, {"w": weight, "scores": scores, "list": [weight]}, best=False)
    writer.wait()
    second, first = (checkpoint.read(path) for path in checkpoint.candidates(tmp_path))
    assert (float(first["w"][0]), float(first["list"][0][0]), first["scores"]["best"]["top1"]) == (1, 1, 1)
    assert (float(second["w"][0]), second["scores"]["best"]["top1"]) == (2, 2)
    assert checkpoint.read(tmp_path / "best.pt")["step"] == 1
