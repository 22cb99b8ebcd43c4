"""A disk that stops to answer within a run: its wait has a deadline, a signal ends it, and no finished step is lost."""

import fcntl
import os
import shutil
import signal
import threading
import time

import pytest

from mealfast.loaders import DataError
from mealfast.recipe import make_recipe
from mealfast.training.loop import train
from mealfast.training.step import Step

from ..runs import assert_same_run, last

pytestmark = pytest.mark.skipif(
    not hasattr(fcntl, "F_SETLEASE"), reason="needs Linux's file leases, which make an open wait"
)


@pytest.fixture
def stalls_after(tree, tmp_path, stall, monkeypatch):
    """A copy of the images, and a function: from the end of that step on none of them can be opened."""
    shutil.copytree(tree, tmp_path / "data")

    def stalls_after(step, then=lambda: None):
        call = Step.__call__

        def stalling(self, batch, number):
            call(self, batch, number)
            if number == step - 1:
                stall(*(tmp_path / "data/train").rglob("*.*"))
                then()

        monkeypatch.setattr(Step, "__call__", stalling)
        return str(tmp_path / "data")

    return stalls_after


@pytest.mark.parametrize("loader", ["dali", "pillow"])
def test_a_stalled_disk_costs_no_finished_step(fields, loader, stalls_after, stall, tmp_path, monkeypatch):
    options = {**fields, "loader": loader, "log_every": 1, "checkpoint_every": 100}
    train(make_recipe(**{**options, "run_dir": str(tmp_path / "whole")}))
    run, asked = tmp_path / "run", []
    with monkeypatch.context():
        options |= {"data": stalls_after(1), "run_dir": str(run)}
        with pytest.raises(DataError, match="--loader-timeout"):
            train(make_recipe(**options, loader_timeout=2))
        reached = last(run)["step"]
        assert 1 <= reached < 9

        stall()  # the disk answers again, and once more does not; a second later somebody stops the run

        def stop_soon():
            asked.append(time.monotonic() + 1)
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

        monkeypatch.undo()
        stalls_after(reached + 1, stop_soon)
        assert not train(make_recipe(**options, resume="auto"))["finished"]
        assert time.monotonic() - asked[0] < 20  # five of them closing the loader
        assert reached < last(run)["step"] < 9
    stall()
    monkeypatch.undo()
    assert train(make_recipe(**options))["finished"]
    assert_same_run(run, tmp_path / "whole")
