"""SIGKILL at random moments: the run always resumes by itself and ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import fault_runs
from runs import assert_same_run

from mealfast.record import checkpoint

EVERY = 2  # steps between checkpoints


def campaign(times: int, seed: int) -> dict[str, object]:
    """Kills runs `times` times in all and compares each with one that was left alone. Raises AssertionError."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="mealfast-kill-") as name:
        root = Path(name)
        fields = fault_runs.tiny_fields(root, epochs=20, lr_decay_epochs=(4,), checkpoint_every=EVERY, eval_every=8)
        whole, log = root / "whole", root / "log"
        assert fault_runs.wait(fault_runs.fork(fault_runs.train(fields, whole), log), 300, log) == 0, log.read_text()
        kills = in_a_write = runs = 0
        lost: list[int] = []
        while kills < times:
            killed = root / f"killed-{runs}"
            while kills < times:
                struck = strike(fault_runs.fork(fault_runs.train(fields, killed), log), killed, rng)
                if struck is None:  # it came to its end first; the next run takes the other kills
                    break
                kills += 1
                in_a_write += struck
                lost.append(steps_lost(killed))
            life = fault_runs.fork(fault_runs.train(fields, killed), log)
            assert fault_runs.wait(life, 300, log) == 0, log.read_text()[-4000:]
            assert_same_run(killed, whole)
            left = [path for path in killed.rglob("*") if path.name.startswith(".")]
            assert left == [], left
            runs += 1
        assert "damaged" not in log.read_text()
        # A checkpoint may be in the writing while the steps after it are taken.
        assert max(lost) <= 2 * EVERY + 1, lost
        return {
            "fault": f"SIGKILL of a training process at a random moment, a checkpoint every {EVERY} steps",
            "injected": kills,
            "outcome": f"resumed by itself each time; {runs} run(s) of 60 steps, all files bit-identical to the run "
            f"left alone; {in_a_write} of the kills were within a checkpoint's writing",
            "lost": f"{max(lost)} steps at most, {sum(lost)} in all",
        }


def steps_lost(run_dir: Path) -> int:
    """How many of the logged steps the newest checkpoint does not have."""
    newest = checkpoint.newest(run_dir / "checkpoints")
    kept = newest[1]["step"] if newest else 0
    return max([step + 1 - kept for step in fault_runs.trained_lines(run_dir)] + [0])


def strike(pid: int, run_dir: Path, rng: random.Random) -> bool | None:
    """Kills a life at a random moment, every second one when it next writes a checkpoint. Returns whether a
    checkpoint was half-written then; None if the life had ended before."""
    time.sleep(rng.uniform(0, 1))
    folder = run_dir / "checkpoints"
    if rng.random() < 0.5:
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not writing(folder):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.005))
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return bool(writing(folder)) if status == -signal.SIGKILL else None


def writing(folder: Path) -> list[Path]:
    return list(folder.glob(".*")) if folder.is_dir() else []
