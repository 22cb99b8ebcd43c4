"""Two processes on gloo: the same global batches, the same numbers, the same run after a stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from mealfast.errors import UsageError
from mealfast.loaders import ImageIndex, ViewPlan
from mealfast.machine.processes import Runtime
from mealfast.recipe import make_recipe
from mealfast.record.run_directory import RunDirectory
from mealfast.training.assemble import make_job
from mealfast.training.loop import train

from ..runs import assert_same_run, last, lines

TESTS = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def launched(argv, log: Path):
    """torchrun with two processes; whatever happens, none of them is left."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [*TORCHRUN, *argv], env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def recipes(fields, weights, tmp_path_factory) -> dict[str, dict]:
    """Fields of the runs, by name; each has its run directory."""
    root = tmp_path_factory.mktemp("runs")
    spec = fields["student"].replace("@", "?drop_rate=0.3&drop_path_rate=0.3@")
    everything = fields | {"student": spec, "cutmix": True, "hard_label_weight": 0.2, "accumulate": 2}
    # LayerNorm only: with statistics over a process's batch two processes are another model.
    exact = fields | {
        "student": f"test_vit@{weights('test_vit', 9)}", "teachers": fields["teachers"][:1], "log_every": 1,
        "hard_label_weight": 0.2,
    }  # fmt: skip
    named = {"whole": everything, "stopped": everything, "failed": everything, "exact": exact, "one": exact}
    return {name: {**one, "run_dir": str(root / name)} for name, one in named.items()}


@pytest.fixture(scope="module")
def ran(recipes, tmp_path_factory) -> dict[str, dict]:
    """The recipes after two processes have run all but "one", which one process runs."""
    order = [
        recipes["whole"],
        recipes["stopped"] | {"max_steps": 3},
        recipes["stopped"] | {"max_steps": 4},
        recipes["stopped"],
        recipes["failed"] | {"fails": [1, 6]},
        recipes["failed"],
        recipes["exact"],
    ]
    path = tmp_path_factory.mktemp("work") / "recipes.json"
    path.write_text(json.dumps(order))
    log = path.with_name("log")
    with launched([str(TESTS / "two_processes.py"), str(path)], log) as process:
        assert process.wait(240) == 0, log.read_text()[-4000:]
    train(make_recipe(**recipes["one"]))
    return recipes


def test_a_resumed_run_is_the_run_that_never_stopped(ran):
    assert_same_run(ran["stopped"]["run_dir"], ran["whole"]["run_dir"])
    states = [process["rng"]["cpu"] for process in last(ran["whole"]["run_dir"])["processes"]]
    assert len(states) == 2
    assert not torch.equal(*states), "dropout must differ between processes"


def test_a_process_that_cannot_read_costs_no_finished_step(ran):
    """Rank 1 lacks the batch of step 6, and the checkpoint every 1000 steps is far: both stop after step 5, in time."""
    folder = Path(ran["failed"]["run_dir"])
    assert json.loads((folder / "failed.json").read_text()) == {"step": 6, "processes": 2, "error": "no seventh batch"}
    assert_same_run(folder, ran["whole"]["run_dir"])


def test_two_processes_share_the_batches_of_one(ran):
    """Their images of each step together, in rank order, are what one process would be given: the plan's."""
    index = ImageIndex.scan(Path(ran["exact"]["data"]) / "train")
    plan = ViewPlan(index.widths, index.heights, seed=0, size=32)
    shares = [
        dict(map(json.loads, (Path(ran["exact"]["run_dir"]) / f"indices-{rank}.jsonl").read_text().splitlines()))
        for rank in range(2)
    ]
    assert all(set(range(9)) <= set(share) for share in shares)
    for step in range(9):
        epoch, number = divmod(step, 3)
        assert shares[0][step] + shares[1][step] == plan.order(epoch)[8 * number : 8 * number + 8].tolist()


def test_two_processes_take_the_steps_of_one(ran):
    """Every logged loss, every evaluation and the final weights, up to the rounding of sums in another order."""
    two, one = (lines(ran[name]["run_dir"]) for name in ("exact", "one"))
    assert [(line["kind"], line["step"]) for line in two] == [(line["kind"], line["step"]) for line in one]
    for a, b in zip(two, one, strict=True):
        if a["kind"] == "eval":
            assert (a["top1"], a["top5"], a["images"]) == (b["top1"], b["top5"], 11)
            assert a["kl"] == pytest.approx(b["kl"], rel=1e-3)
        else:
            for name in ("loss", "soft_ce", "kl", "hard_ce", "discriminator_loss"):
                assert a[name] == pytest.approx(b[name], rel=1e-6 if a["step"] == 0 else 1e-3), (a["step"], name)
    ours, theirs = (last(ran[name]["run_dir"])["student"] for name in ("exact", "one"))
    start = torch.load(ran["one"]["student"].partition("@")[2], weights_only=True)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-2 * float((value - start[key]).abs().max()) + 1e-6)


@pytest.mark.parametrize(
    ("number", "handled"),
    [(signal.SIGTERM, []), (signal.SIGUSR1, ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"])],
    ids=["SIGTERM", "SIGUSR1"],
)
def test_torchrun_mealfast_train_stops_on_a_signal_and_one_process_goes_on(fields, tmp_path, number, handled):
    """The entry that README names. Afterwards one process continues with the same global batches."""
    options = fields | {"epochs": 40, "lr_decay_epochs": (30,), "eval_every": 0, "log_every": 2, "loader": "dali"}
    argv = ["--no-compile"]
    for name, value in {**options, "run_dir": tmp_path / "run"}.items():
        if name != "compile":
            argv += ["--" + name.replace("_", "-"), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    log, metrics = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
    with launched([*handled, str(TESTS.parent / "mealfast" / "train.py"), *argv], log) as process:
        deadline = time.monotonic() + 240
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            assert time.monotonic() < deadline, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        process.send_signal(number)
        process.wait(60)
    stopped = last(tmp_path / "run")
    assert 2 <= stopped["step"] < 120
    assert len(stopped["processes"]) == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"] is False
    if handled:
        return

    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    goal = stopped["step"] + 4
    summary = train(make_recipe(**{**options, "run_dir": str(tmp_path / "copy"), "max_steps": goal}))
    assert summary["steps"] == goal
    assert len(last(tmp_path / "copy")["processes"]) == 1
    steps = [line["step"] for line in lines(tmp_path / "copy") if line["kind"] == "train"]
    assert steps == list(range(1, goal, 2))


def test_a_batch_that_does_not_divide_among_processes_is_refused(options):
    """Before any process waits for another, so this one needs no partner."""
    recipe = make_recipe(**{**options, "batch_size": 7})
    with pytest.raises(UsageError) as caught:
        make_job(recipe, Runtime(0, 2, torch.device("cpu")), RunDirectory(recipe.run_dir))
    assert (
        str(caught.value)
        == "--batch-size 7: must be a multiple of processes x --accumulate = 2 x 1: use --batch-size 6"
    )
