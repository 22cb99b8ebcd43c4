"""One torchrun and all that befalls its workers: killed, failed, hung, orphaned; and its own signals."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from pathlib import Path

import fault_launch
import fault_runs
from runs import assert_same_run, last


def campaign(times: int, seed: int) -> dict[str, object]:
    """With `times` 1 the faults of one launch; with more the slow ones too. Raises AssertionError."""
    with tempfile.TemporaryDirectory(prefix="mealfast-processes-") as name:
        root = Path(name)
        fields = fault_runs.tiny_fields(root, epochs=4, checkpoint_every=2, eval_every=0, collective_timeout=6)
        outcomes = [
            one_after_the_other(root, fields, ["raised", "hung"] if times == 1 else ["killed", "raised", "hung"])
        ]
        if times > 1:
            outcomes += [hang(root, fields), stopped(root, fields, "SIGTERM"), stopped(root, fields, "SIGINT")]
            outcomes += [three(root, fields)]
    return {
        "fault": "of two workers one is killed, fails, hangs; their torchrun is killed, gets SIGTERM and SIGINT",
        "injected": 2 if times == 1 else 6,
        "outcome": "; ".join(outcomes),
        "lost": "1 step at most",
    }


def one_after_the_other(root: Path, fields: dict, names: list[str]) -> str:
    """In each attempt of torchrun another fault: a worker is killed, one raises; one hangs, and torchrun is killed."""
    kinds = {"killed": "kill", "raised": "raise", "hung": "hang"}
    faults = [None, *([kinds[name], attempt, 1, 5] for attempt, name in enumerate(names))]
    faults[-1][3] = 3
    runs = [({**fields, "run_dir": str(root / n)}, fault) for n, fault in zip(["whole", *names], faults, strict=True)]
    runs[-1][0]["collective_timeout"] = 600
    log = root / "log"
    argv = fault_launch.command(
        fault_launch.write_work(root / "work.json", *runs),
        "--standalone", "--nproc-per-node", "2", "--max-restarts", "2",
    )  # fmt: skip
    with fault_launch.launched(argv, log) as process:
        fault_launch.wait_until(lambda: len(fault_runs.trained_lines(root / "hung")) == 3, 200, log)
        time.sleep(0.5)
        workers = fault_launch.descendants(process.pid)
        assert len(fault_launch.alive(workers)) >= 2
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        fault_launch.wait_until(lambda: not fault_launch.alive(workers), 5, log)
    text = log.read_text()
    for name in names[:-1]:
        assert_same_run(root / name, root / "whole")
    assert text.count("resuming after 4 of 12 steps") == len(names) - 1, text[-4000:]
    # Of the rank that raised there is a traceback and a line, and of the other nothing before them.
    said = text[: text.index("ArithmeticError: this rank failed first")]
    assert "mealfast: process 1 failed with the error above" in text
    assert said.count("Traceback") == 1, said[-4000:]
    assert "process 0" not in said
    return (
        f"workers {', '.join(names[:-1])}: torchrun started them again, and they went on to files bit-identical to a "
        "run left alone; the error that came first was printed first; a killed torchrun left no worker, not a hung one"
    )


def hang(root: Path, fields: dict) -> str:
    """A process that hangs ends the job with a line of the one that waited for it."""
    work = fault_launch.write_work(root / "work.json", ({**fields, "run_dir": str(root / "h")}, ["hang", 0, 1, 5]))
    log = root / "log-hang"
    with fault_launch.launched(fault_launch.command(work, "--standalone", "--nproc-per-node", "2"), log) as process:
        fault_launch.wait_until(lambda: len(fault_runs.trained_lines(root / "h")) == 5, 120, log)
        began = time.monotonic()
        assert process.wait(120) == 1
        seconds = time.monotonic() - began
    text = log.read_text()
    assert re.search(r"mealfast: process 0: has waited in vain .*--collective-timeout", text), text[-4000:]
    assert "Traceback" not in text[: text.index("has waited in vain")]
    assert seconds < 6 + 60, seconds
    return f"a hung worker ended the job {seconds:.0f} s after it (timeout 6 s), with a line that says so"


def stopped(root: Path, fields: dict, name: str) -> str:
    """torchrun passes the signal on; the workers save and leave, and the job goes on from there to the same end."""
    run_dir, log = root / name, root / f"log-{name}"
    fields = {**fields, "epochs": 60, "lr_decay_epochs": (4,), "run_dir": str(run_dir)}
    work = fault_launch.write_work(root / "work.json", (fields, None))
    argv = fault_launch.command(work, "--standalone", "--nproc-per-node", "2")
    with fault_launch.launched(argv, log) as process:
        fault_launch.wait_until(lambda: len(fault_runs.trained_lines(run_dir)) > 9, 120, log)
        began = time.monotonic()
        workers = fault_launch.descendants(process.pid)
        process.send_signal(getattr(signal, name))
        process.wait(60)
        seconds = time.monotonic() - began
        assert not fault_launch.alive(workers)
    step = last(run_dir)["step"]
    assert f"stopped after {step} of 180 steps; the same command goes on from here" in log.read_text()
    with fault_launch.launched(argv, log) as process:
        assert process.wait(200) == 0, log.read_text()[-4000:]
    if not (root / "long").exists():
        work = fault_launch.write_work(root / "work.json", ({**fields, "run_dir": str(root / "long")}, None))
        with fault_launch.launched(argv, log) as process:
            assert process.wait(200) == 0, log.read_text()[-4000:]
    assert_same_run(run_dir, root / "long")
    return f"{name} to torchrun: a checkpoint of the last step, {seconds:.0f} s; then to the same end"


def three(root: Path, fields: dict) -> str:
    """Sums over three processes depend on their order, which DDP must not change between a run and its resumption."""
    fields, log = {**fields, "batch_size": 9}, root / "log-three"
    runs = [("three", None), ("three-stopped", 5), ("three-stopped", None)]
    work = fault_launch.write_work(
        root / "work.json",
        *(({**fields, "run_dir": str(root / name), "max_steps": stop}, None) for name, stop in runs),
    )
    with fault_launch.launched(fault_launch.command(work, "--standalone", "--nproc-per-node", "3"), log) as process:
        assert process.wait(300) == 0, log.read_text()[-4000:]
    assert_same_run(root / "three-stopped", root / "three")
    return "three workers stopped and resumed: bit-identical"
