"""What a checkpoint holds of a run, and how a run takes it up again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mealfast.errors import UsageError
from mealfast.machine.files import reason
from mealfast.machine.processes import Runtime
from mealfast.models import tuning
from mealfast.models.class_names import Names
from mealfast.models.class_order import Order
from mealfast.models.description import Description
from mealfast.models.layout import is_layout
from mealfast.recipe import Recipe
from mealfast.record import checkpoint
from mealfast.record.run_directory import RunDirectory, refuse_other_recipe
from mealfast.record.stored_recipe import fields_of
from mealfast.training import report
from mealfast.training.job import Job
from mealfast.training.step_calendar import Calendar, Period
from mealfast.training.where import Scores, Where


@dataclass(frozen=True)
class Found:
    """A checkpoint whose plain values are what `content` put there."""

    path: Path
    state: dict[str, Any]

    @property
    def what(self) -> str:
        """Its name in messages."""
        return f"checkpoint {self.path}"

    def recipe_fields(self, names: Collection[str]) -> dict[str, Any]:
        """Those of its recipe's fields, their types checked. Raises UsageError."""
        return fields_of({name: value for name, value in self.state["recipe"].items() if name in names}, self.what)

    @property
    def layouts(self) -> dict[str, Any]:
        """Of the teachers, as the run had them."""
        found: dict[str, Any] = self.state.get("layouts", {})
        return found

    @property
    def classes(self) -> Names | None:
        """The student's; None: of a mealfast that kept none."""
        return Description.of(self.state["model"]).classes if "model" in self.state else None

    @property
    def orders(self) -> tuple[Order | None, ...]:
        """Of the outputs of teachers and cache, as `Job.class_orders`; empty: of a mealfast that knew none."""
        return tuple(None if order is None else tuple(order) for order in self.state.get("class_orders", ()))


# -- writing -----------------------------------------------------------------------------------------------------------


def content(job: Job, where: Where) -> dict[str, Any]:
    """All of a checkpoint. Every process must call it; the result is for the main one to save."""
    return capture(job) | {
        "recipe": job.recipe.to_json(),
        "identity": report.identity(job),
        "periods": [list(astuple(period)) for period in job.calendar.periods],
        "scores": where.scores.to_json(),
        "bad_in_a_row": where.bad_in_a_row,
        "layouts": tuning.layouts(job.reports),
        "model": report.description(job).to_json(),
        "class_orders": [None if order is None else list(order) for order in job.class_orders],
    }


def capture(job: Job) -> dict[str, Any]:
    """Every tensor that decides the steps to come. Every process must call it."""
    random_states = {"cpu": torch.get_rng_state()}
    if job.runtime.device.type == "cuda":
        random_states["cuda"] = torch.cuda.get_rng_state(job.runtime.device)
    discriminator = job.student.discriminator
    return {
        "student": job.student.model.state_dict(),
        "discriminator": discriminator.state_dict() if discriminator is not None else None,
        **job.optimiser.state_dict(),
        "skipped": job.meter.skipped.cpu(),
        "processes": job.runtime.gather({"rng": random_states, "meter": job.meter.sums.cpu()}),
        "threads": torch.get_num_threads(),
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def find(recipe: Recipe, directory: RunDirectory) -> Found | None:
    """The checkpoint that `--resume` asks for, None where there is none. Raises UsageError: it is damaged, or of a run
    with other options."""
    resume = recipe.resume
    if resume == "never":
        return None
    if resume == "auto":
        newest = checkpoint.newest(directory.checkpoints)
        if newest is None:
            return None
        found = Found(*newest)
    else:
        found = Found(Path(resume), checkpoint.read(Path(resume)))
    check(found.state, found.what)
    refuse_other_recipe(recipe, found.state["recipe"], f"{found.what}: of a run")
    return found


def calendar(recipe: Recipe, images: int, found: Found) -> Calendar:
    """The recipe's calendar from the checkpoint on, and the run's own before it."""
    stored = found.state["recipe"]
    periods = found.state.get("periods") or [[0, stored["log_every"], stored["eval_every"]]]
    return Calendar.of(recipe, images, tuple(Period(*period) for period in periods), found.state["step"])


def take_up(found: Found, job: Job) -> tuple[Where, list[str]]:
    """Gives the job's tensors what the checkpoint holds. Returns where the run stands, and notes on how it goes on.

    Raises UsageError: the checkpoint is of other images or targets, or does not fit.
    """
    state, identity = found.state, report.identity(job)
    for name, option in {"images": "--data", "targets": "--label-cache", "teachers": "--teachers"}.items():
        if state["identity"].get(name) != identity[name]:
            raise UsageError(f"{option}: not the {name} that the run of {found.what} has seen")
    epochs = state["recipe"].get("epochs")
    if job.writing and job.recipe.label_cache_views is None and epochs != job.recipe.epochs:
        raise UsageError(
            f"--epochs {job.recipe.epochs}: the run of {found.what} writes a label cache of one view an epoch, "
            f"{epochs}; use --epochs {epochs}, or another --run-dir"
        )
    restore(state, job, found.what)
    job.optimiser.set_lr(max(state["step"] - 1, 0))  # of the step taken last, should no other come
    where = Where(state["step"], state.get("bad_in_a_row", 0), Scores.of(state["scores"]))
    return where, [*_extended(job, where), *notes(state, job.runtime)]


def restore(state: dict[str, Any], job: Job, what: str) -> None:
    """Takes up what `capture` gave. With another number of processes the meters are averaged and random numbers start
    anew (dropout only: the view plan and CutMix do not depend on them). Raises UsageError if it does not fit."""
    try:
        _restore(state, job)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{what}: does not fit this run ({reason(error)})") from error


def _restore(state: dict[str, Any], job: Job) -> None:
    job.student.model.load_state_dict(state["student"])
    if job.student.discriminator is not None:
        job.student.discriminator.load_state_dict(state["discriminator"])
    job.optimiser.load_state_dict(state)
    runtime, meter, processes = job.runtime, job.meter, state["processes"]
    meter.skipped.copy_(state["skipped"])
    if any(process["meter"].shape != meter.sums.shape for process in processes):
        raise ValueError("the sums of its losses have another shape")
    if len(processes) != runtime.world_size:
        meter.sums.copy_(sum(process["meter"] for process in processes) / len(processes))
        return
    own = processes[runtime.rank]
    meter.sums.copy_(own["meter"])
    torch.set_rng_state(own["rng"]["cpu"])
    if runtime.device.type == "cuda" and "cuda" in own["rng"]:
        torch.cuda.set_rng_state(own["rng"]["cuda"], runtime.device)


def check(state: dict[str, Any], what: str) -> None:
    """Raises UsageError where the plain values of a checkpoint are not what `content` put there."""
    for name in ("recipe", "identity", "scores"):
        if not isinstance(state.get(name), dict):
            raise UsageError(f"{what}: is damaged (its {name})")
    for name in ("start", "latest", "best"):
        line = state["scores"].get(name)
        if line is not None and not (
            isinstance(line, dict) and isinstance(line.get("top1"), (int, float)) and type(line.get("step")) is int
        ):
            raise UsageError(f"{what}: is damaged (its {name} score)")
    layouts = state.get("layouts", {})
    if not isinstance(layouts, dict) or not all(map(is_layout, layouts.values())):
        raise UsageError(f"{what}: is damaged (its teachers' layouts)")
    if type(state.get("bad_in_a_row", 0)) is not int:
        raise UsageError(f"{what}: is damaged (its count of bad steps)")
    if "model" in state:
        try:
            Description.of(state["model"])
        except ValueError as error:
            raise UsageError(f"{what}: is damaged (what it says of its model: {error})") from error
    orders = state.get("class_orders", [])
    if not isinstance(orders, list) or not all(order is None or isinstance(order, list) for order in orders):
        raise UsageError(f"{what}: is damaged (its order of classes)")
    if not _are_periods(state.get("periods", [[0, 1, 0]])):
        raise UsageError(f"{what}: is damaged (its periods)")


def _are_periods(periods: object) -> bool:
    if not isinstance(periods, list) or not periods:
        return False
    if not all(isinstance(one, list) and len(one) == 3 and all(type(n) is int for n in one) for one in periods):
        return False
    firsts = [first for first, _, _ in periods]
    return firsts == sorted(set(firsts)) and firsts[0] == 0 and all(log > 0 <= every for _, log, every in periods)


def _extended(job: Job, where: Where) -> list[str]:
    """A line where the best score is of an evaluation that this run's recipe would not have made."""
    best = where.scores.best_at
    if best is None or job.calendar.evaluates(best):
        return []
    return [
        f"note: the evaluation after {best} steps, where the run was to end before it was extended, stays the best so "
        "far, though a run that was planned so long would not have made it"
    ]


def notes(state: dict[str, Any], runtime: Runtime) -> list[str]:
    """Lines on why a run that goes on here is not, to the bit, the one that would have been."""
    lines = []
    if len(state["processes"]) != runtime.world_size:
        lines.append(
            f"note: the checkpoint was written by {len(state['processes'])} processes, now there are "
            f"{runtime.world_size}: the global batches stay the same, BatchNorm sees other shares of them"
        )
    threads = state.get("threads", torch.get_num_threads())
    if runtime.device.type == "cpu" and threads != torch.get_num_threads():
        lines.append(
            f"note: the checkpoint was written with {threads} CPU threads a process, now there are "
            f"{torch.get_num_threads()}: sums round a little differently (OMP_NUM_THREADS={threads} would not)"
        )
    return lines


def share_buffers(module: nn.Module, runtime: Runtime) -> None:
    """Gives every process the main one's buffers (BatchNorm's running statistics), for evaluation.

    Only the main process's are saved, and none is read in training, so this changes no later step.
    """
    if runtime.world_size > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
