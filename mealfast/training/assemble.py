"""From a recipe to the objects of a run: models on their device, teachers made ready, a checkpoint taken up.

Shape legend: B images of this process, H and W pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mealfast.errors import UsageError
from mealfast.labels.fit import check_fit, open_label_cache
from mealfast.labels.write_through import write_plan
from mealfast.machine.files import brief
from mealfast.machine.precision import precision
from mealfast.machine.processes import Runtime
from mealfast.machine.terminal import is_terminal, say
from mealfast.machine.waiting import waiting
from mealfast.method.classes import absent_notes, number_classes
from mealfast.method.data import Splits, scan_splits, view_plan
from mealfast.method.student import Student
from mealfast.models import normalised as models
from mealfast.models.class_order import Agreed
from mealfast.models.random_weights import require_weights
from mealfast.models.tuning import prepare
from mealfast.recipe import Recipe
from mealfast.record.run_directory import RunDirectory
from mealfast.training import fit, resume
from mealfast.training.classes import agree_on_classes
from mealfast.training.job import Job
from mealfast.training.meter import Meter
from mealfast.training.optimiser import Optimiser
from mealfast.training.step_calendar import Calendar
from mealfast.training.where import Where


def make_job(recipe: Recipe, runtime: Runtime, directory: RunDirectory) -> tuple[Job, Where, list[str]]:
    """Builds everything, takes up the checkpoint that `--resume` asks for, and makes the teachers ready, all processes
    together. Also returns where the run stands, and notes on how it goes on.

    Writes nothing. Raises UsageError or DataError for what the user can mend.
    """
    precision(recipe.amp, runtime.device)  # refused before anything is read
    if "batch_size" not in recipe.left_open:
        fit.check_batch(recipe.batch_size, runtime.world_size, recipe.accumulate)
    with runtime.main_first():  # the others find the index that the main process has stored
        found = scan_splits(
            recipe.data, recipe.val, recipe.val_share, workers=recipe.loader_threads,
            progress=runtime.is_main and is_terminal(sys.stderr),
        )  # fmt: skip
    checkpoint = resume.find(recipe, directory)
    if checkpoint is not None:
        recipe = fit.adopt(recipe, checkpoint.recipe_fields(recipe.left_open))
    recipe, chosen = fit.fit(recipe, runtime.world_size, len(found.train), found.train.root)
    job, loaded = _assemble(recipe, runtime, found, checkpoint)
    where = Where()
    layouts: dict[str, Any] = {}
    notes: list[str] = []
    if checkpoint is not None:
        job = replace(job, calendar=resume.calendar(recipe, len(job.data.train), checkpoint))
        where, notes = resume.take_up(checkpoint, job)
        layouts = checkpoint.layouts
    for line in (*found.notes, *chosen) if runtime.is_main else ():
        say(line)  # now that nothing was refused, and before what may take minutes
    return _with_teachers(job, loaded, layouts), where, notes


def _assemble(
    recipe: Recipe, runtime: Runtime, found: Splits, checkpoint: resume.Found | None
) -> tuple[Job, list[models.NormalizedModel]]:
    """The job as it is for a new run but for its classes, and its teachers as loaded: they are none of it yet."""
    writing = write_plan(recipe, runtime)
    label_cache = None if writing else open_label_cache(recipe)
    live_teachers = recipe.teachers if writing else recipe.live_teachers
    _check_cuda_graphs(recipe, runtime, writing is not None)
    torch.manual_seed(recipe.seed)  # of random weights
    model, teachers, digests = _models(recipe, live_teachers)
    agreed = agree_on_classes(recipe, found, model, teachers, label_cache, checkpoint)
    compiled = runtime.device.type == "cuda" if recipe.compile is None else recipe.compile
    student = Student(recipe, runtime, model, compile=compiled)
    # From here on random numbers are each process's own (dropout, drop path).
    torch.manual_seed(recipe.seed + 1 + runtime.rank)
    data, calendar = _images(recipe, found, agreed)
    seed, cycle = (writing.seed, writing.views) if writing else (None, None)
    views = view_plan(recipe, data.train, label_cache, seed=seed, cycle=cycle)
    if label_cache is not None:
        check_fit(label_cache, recipe, views, data.train, student.num_classes)
    job = Job(
        recipe=recipe,
        runtime=runtime,
        data=data,
        class_orders=agreed.orders,
        class_notes=(*agreed.notes, *absent_notes(data, agreed.names or ())),
        calendar=calendar,
        views=views,
        student=student,
        optimiser=Optimiser(recipe, runtime, student, calendar.lr_factor),
        meter=Meter(runtime.device),
        live_teachers=live_teachers,
        teacher_digests=digests,
        teachers=None,
        reports=(),
        label_cache=label_cache,
        writing=writing,
        compiled=compiled,
    )
    return job, teachers


def _models(
    recipe: Recipe, live_teachers: tuple[str, ...]
) -> tuple[models.NormalizedModel, list[models.NormalizedModel], tuple[str, ...]]:
    """Student, teachers, and the teachers' digests; refused where they do not fit together."""
    require_weights(live_teachers, "--teachers")
    if recipe.distils:
        require_weights([recipe.student], "--student")
    with waiting(f"loading the student {brief(recipe.student)}"):
        student = models.build(recipe.student, recipe.size)  # first: random weights do not depend on the teachers
    teachers = []
    for number, spec in enumerate(live_teachers, start=1):
        with waiting(f"loading teacher {number} of {len(live_teachers)}: {brief(spec)}"):
            teachers.append(models.build(spec, recipe.size))
    models.check_classes(live_teachers, teachers, (recipe.student, student.num_classes))
    digests = tuple(models.digest(teacher) for teacher in teachers)
    models.check_distinct(live_teachers, digests)
    for model, spec in zip((student, *teachers), (recipe.student, *live_teachers), strict=True):
        models.probe(model, spec, recipe.size)
    return student, teachers, digests


def _images(recipe: Recipe, found: Splits, agreed: Agreed) -> tuple[Splits, Calendar]:
    """The images as the student numbers their classes, and what they make of an epoch."""
    data = number_classes(found, agreed, labels_needed=recipe.hard_label_weight > 0)
    return data, Calendar.of(recipe, len(data.train))


def _with_teachers(job: Job, loaded: list[models.NormalizedModel], layouts: Mapping[str, Any]) -> Job:
    """The same with its teachers ready, measured and checked on the first batch of training images; `layouts` are those
    that the run which is resumed had."""
    if not loaded:
        return job
    with waiting("reading images to measure and check the teachers on"):
        loader = job.loader(0, 1)
        try:
            images = next(iter(loader)).images.chunk(job.recipe.accumulate)[0]
        finally:
            loader.close()
    teachers, reports = prepare(
        job.recipe,
        job.runtime,
        loaded,
        images,
        compile=job.compiled,
        earlier=layouts,
        specs=job.live_teachers,
    )
    return replace(job, teachers=teachers, reports=tuple(reports))


def _check_cuda_graphs(recipe: Recipe, runtime: Runtime, writes_cache: bool) -> None:
    if recipe.cuda_graphs in (None, "off"):
        return
    option = f"--cuda-graphs {recipe.cuda_graphs}"
    if runtime.device.type != "cuda":
        raise UsageError(f"{option} needs a GPU: leave it out on the CPU")
    if recipe.cuda_graphs == "step" and precision(recipe.amp, runtime.device) == torch.float16:
        raise UsageError(f"{option} cannot scale float16 gradients: use --amp bf16, or --cuda-graphs ensemble")
    if recipe.cuda_graphs == "step" and writes_cache:
        raise UsageError(
            f"{option}: a run that writes its label cache has steps of two kinds; use --cuda-graphs ensemble"
        )
    if recipe.cuda_graphs == "step" and recipe.optimizer != "sgd":
        raise UsageError(f"{option} needs --optimizer sgd, whose learning rate can lie on the GPU")
