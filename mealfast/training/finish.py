"""The end of a run: the student's file and the summary, or what the disk said against them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mealfast.errors import RunError
from mealfast.machine.files import write_json
from mealfast.models import weights
from mealfast.record import checkpoint
from mealfast.record.clock import Clock
from mealfast.training import report as run_report

if TYPE_CHECKING:
    from mealfast.training.loop import Run


def finish(run: Run, loader: Any) -> dict[str, Any]:
    """Writes student.safetensors and summary.json; says where they are, or how to go on.

    Raises RunError on the main process where the disk does not take them, or did not take the last checkpoint.
    """
    if run.writer:
        run.writer.wait()
    rate, waiting = run.clock.medians()
    replaced = run.runtime.gather(
        {"files": loader.replaced, "views": loader.replaced_count} if loader else {"files": {}, "views": 0}
    )
    summary = {
        "finished": run.step == run.total_steps,
        "steps": run.step,
        "total_steps": run.total_steps,
        "epochs": run.step / run.steps_per_epoch,
        "start": run.scores["start"],
        "final": run.scores["latest"],
        "best": run.scores["best"],
        "teachers": run.scores.get("teachers", []),
        "ensemble": run.scores.get("ensemble"),
        "images_per_second": rate,
        "data_wait_fraction": waiting,
        "skipped_steps": int(run.train_step.skipped),
        "replaced_views": sum(one["views"] for one in replaced),
        "replaced_images": {path: reason for one in replaced for path, reason in one["files"].items()},
        "quarantined_images": len(run.data.train.quarantined) + len(run.data.val.quarantined),
        "seconds": time.perf_counter() - run.began,
    }
    problems = []
    if run.runtime.is_main:
        problems += [run.writer.failure] if run.writer.failure else []
        problems += _refused(run.directory.student, partial(weights.save, run.parts.student.model))
    summary["replayed_images_per_second"] = _replay(run)
    if run.runtime.is_main:
        stored = run_report.stored_summary(run.directory.summary)
        if rate is None and stored.get("steps") == run.step:  # nothing was left to do: the run's own figures stay
            summary = stored
        problems += _refused(run.directory.summary, partial(write_json, content=summary))
    if problems:
        raise RunError(
            f"{'; '.join(problems)}: make room, or mend the permissions, and run the same command again; "
            f"its newest checkpoint is {next(iter(checkpoint.candidates(run.directory.checkpoints)), 'none')}"
        )
    done = "finished" if run.step == run.total_steps else f"stopped after {run.step} of {run.total_steps} steps"
    again = "" if run.step == run.total_steps else "; the same command goes on from here"
    run.progress.say(f"{done}{again}: {run.directory.student}")
    return summary


def _replay(run: Run) -> float | None:
    """Images/s of a few more steps on the last batch: what this run would reach if data cost nothing.

    It changes the weights in memory, so it comes after everything is saved; none where the run was asked to stop.
    """
    if run.batch is None or run.step < run.last_step:
        return None
    steps = min(max((run.step - run.first_step) // 50, 2), 20)
    clock = Clock()
    for _ in range(steps + 1):
        began = time.perf_counter()
        run.train_step(run.batch, run.step)
        run.train_step.meter.tolist()  # waits for the device
        clock.add(time.perf_counter() - began, 0.0)
        clock.close_window(run.recipe.batch_size)
    return clock.medians()[0]


def _refused(path: Path, write: Callable[[Path], None]) -> list[str]:
    """What the disk said against writing `path`; nothing where it is written."""
    try:
        write(path)
    except OSError as error:
        return [f"{path}: cannot be written ({error.strerror or error})"]
    return []
