"""The end of a run: the student's file and the summary, or what the disk said against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mealfast.errors import RunError
from mealfast.machine.files import write_json
from mealfast.models import weights
from mealfast.record import checkpoint
from mealfast.training import report
from mealfast.training.job import Job
from mealfast.training.outputs import Outputs
from mealfast.training.where import Where


@dataclass(frozen=True)
class Figures:
    """What one process knows of its part of the run."""

    images_per_second: float | None  # over all processes; None: no step was taken
    data_wait_fraction: float | None
    seconds: float
    replaced: Mapping[str, str]  # path -> reason of the images in whose place others were shown
    replaced_views: int
    cuda_graph: str | None  # what of a step one replayed at the end, as `Job.cuda_graph` has it


def summarise(job: Job, where: Where, figures: Figures) -> dict[str, Any]:
    """The content of summary.json, but for what is measured after it; all processes together."""
    everyone = job.runtime.gather((dict(figures.replaced), figures.replaced_views))
    scores, calendar, data = where.scores, job.calendar, job.data
    return {
        "finished": is_finished(job, where),
        "steps": where.step,
        "total_steps": calendar.total_steps,
        "epochs": where.step / calendar.steps_per_epoch,
        "start": scores.start,
        "final": scores.latest,
        "best": scores.best,
        "teachers": scores.teachers,
        "ensemble": scores.ensemble,
        "images_per_second": figures.images_per_second,
        "data_wait_fraction": figures.data_wait_fraction,
        "compiled": job.compiled,
        "cuda_graph": figures.cuda_graph,
        "skipped_steps": int(job.meter.skipped),
        "replaced_views": sum(views for _, views in everyone),
        "replaced_images": {path: reason for replaced, _ in everyone for path, reason in replaced.items()},
        "quarantined_images": len(data.train.quarantined) + len(data.val.quarantined),
        "seconds": figures.seconds,
    }


def is_finished(job: Job, where: Where) -> bool:
    """Whether nothing of the recipe is left to do, its last evaluation included."""
    return where.step == job.calendar.total_steps == where.scores.evaluated


def finish(
    job: Job, where: Where, outputs: Outputs, figures: Figures, replay: Callable[[], float | None]
) -> dict[str, Any]:
    """Writes student.safetensors and summary.json; says where they are, or how to go on. Returns the summary.

    `replay` measures images/s of more steps on the last batch, None: it could not. It changes the weights in memory, so
    it comes after they are saved. Raises RunError on the main process where the disk does not take the files, or did
    not take the last checkpoint.
    """
    if outputs.checkpoints:
        outputs.checkpoints.wait()
    summary, directory = summarise(job, where, figures), outputs.directory
    problems = []
    if outputs.checkpoints:
        problems += [outputs.checkpoints.failure] if outputs.checkpoints.failure else []
        problems += _refused(directory.student, _student_writer(job))
    summary["replayed_images_per_second"] = replay()
    if job.runtime.is_main:
        stored = report.stored_summary(directory.summary)
        same = all(stored.get(name) == summary[name] for name in ("finished", "steps", "total_steps", "final"))
        if figures.images_per_second is None and same:  # nothing was left to do: the run's own figures stay
            summary = stored
        problems += _refused(directory.summary, partial(write_json, content=summary))
    if problems:
        raise RunError(
            f"{'; '.join(problems)}: make room, or mend the permissions, and run the same command again; "
            f"its newest checkpoint is {next(iter(checkpoint.candidates(directory.checkpoints)), 'none')}"
        )
    done, again = "finished", ""
    if not is_finished(job, where):
        done = f"stopped after {where.step} of {job.calendar.total_steps} steps"
        again = "; the same command goes on from here"
    outputs.say(f"{done}{again}: {directory.student}")
    if is_finished(job, where) and (lost := worse_than_its_start(where)):
        outputs.say(lost)
    return summary


def worse_than_its_start(where: Where) -> str | None:
    """The warning of a student that has lost what it could at its start; None where it has not."""
    start, final, best = where.scores.start, where.scores.latest, where.scores.best
    if not start or not final or final["top1"] >= start["top1"]:
        return None
    better = f"; best.pt has {best['top1']:.2f}%" if best and best["top1"] > final["top1"] else ""
    lost = f"top-1 {final['top1']:.2f}% after {start['top1']:.2f}%{better}"
    advice = "try a lower --lr, more --epochs, or --student-bn eval"
    return f"warning: the student is worse than at its start, {lost}: {advice}"


def _student_writer(job: Job) -> Callable[[Path], None]:
    return partial(weights.save, job.student.model, description=report.description(job))


def _refused(path: Path, write: Callable[[Path], None]) -> list[str]:
    """What the disk said against writing `path`; nothing where it is written."""
    try:
        write(path)
    except OSError as error:
        return [f"{path}: cannot be written ({error.strerror or error})"]
    return []
