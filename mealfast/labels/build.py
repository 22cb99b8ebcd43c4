"""Makes a label cache: the teachers run once over planned views, their top-k targets go to disk in parts.

Shape legend: B images of a batch, H and W pixels, N images, k entries kept of each target.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import mealfast
from mealfast.errors import UsageError
from mealfast.kernels import ensemble_topk
from mealfast.loaders import (
    Batch,
    CacheHeader,
    ImageIndex,
    LabelWriter,
    ViewPlan,
    claim_label_cache,
    forecast_bytes,
    label_loader,
    plan_fields,
    read_header,
)
from mealfast.machine.precision import name_of, precision
from mealfast.machine.processes import Runtime
from mealfast.models import normalised as models
from mealfast.models import tuning as teacher_setup
from mealfast.models.ensemble import FrozenEnsemble
from mealfast.models.layout import default_layout, is_layout
from mealfast.models.tuning import TeacherReport, prepare
from mealfast.recipe import Recipe
from mealfast.record.console import Progress, size_text
from mealfast.training.scoring import padded

PART_BATCHES = 16  # that go to disk together: what a kill can lose, and 640 bytes x batch size a write at k = 10
LINE_EVERY = 10.0  # seconds between lines of the log


@dataclass(frozen=True)
class LabelTeachers:
    """An ensemble ready to label, and what a cache's header says of it."""

    ensemble: FrozenEnsemble
    described: tuple[dict[str, str], ...]  # {"spec", "digest"} each
    classes: int
    compiled: bool
    layouts: dict[str, Any] = field(default_factory=dict)  # teacher_setup.layouts: as `prepare` takes them again


@dataclass(frozen=True)
class LoadedTeachers:
    """Models that are yet to be laid out on their device."""

    models: list[models.NormalizedModel]
    described: tuple[dict[str, str], ...]
    classes: int
    compile: bool

    def as_they_are(self, runtime: Runtime, dtypes: Sequence[str]) -> LabelTeachers:
        """In the default layout, unmeasured, each in its dtype of teacher_layout.DTYPES."""
        layouts = [default_layout(dtype, self.compile) for dtype in dtypes]
        ensemble = FrozenEnsemble(self.models, runtime, compile=self.compile, layouts=layouts)
        return LabelTeachers(ensemble, self.described, self.classes, self.compile)

    def prepared(
        self, recipe: Recipe, runtime: Runtime, images: torch.Tensor, earlier: dict[str, Any]
    ) -> tuple[LabelTeachers, list[TeacherReport]]:
        """As fast as they run on images like these, uint8 [B, H, W, 3] on the device, and how that is; all processes
        together. `earlier` are the layouts that a build which goes on had. Raises UsageError."""
        ensemble, reports = prepare(
            recipe, runtime, self.models, images, compile=self.compile, earlier=earlier, specs=recipe.teachers
        )
        layouts = earlier | teacher_setup.layouts(reports)
        return LabelTeachers(ensemble, self.described, self.classes, self.compile, layouts), reports


def load_teachers(recipe: Recipe, runtime: Runtime) -> LoadedTeachers:
    """The recipe's teachers. Raises UsageError for wrong specs, weights or sizes."""
    torch.manual_seed(recipe.seed)  # random weights, where a spec has no others
    teachers = [models.build(spec, recipe.size) for spec in recipe.teachers]
    first = recipe.teachers[0]
    for spec, teacher in zip(recipe.teachers, teachers, strict=True):
        if teacher.num_classes != teachers[0].num_classes:
            raise UsageError(
                f"--teachers {spec} has {teacher.num_classes} classes, {first} has {teachers[0].num_classes}: they "
                "must agree (?num_classes=N in a spec sets them)"
            )
        models.probe(teacher, spec, recipe.size)
    digests = [models.digest(teacher) for teacher in teachers]
    models.check_distinct(recipe.teachers, digests)
    for spec in filter(models.is_random, recipe.teachers if runtime.is_main else ()):
        print(f"note: {spec} has random weights (no tag and no checkpoint)", file=sys.stderr)
    compiled = runtime.device.type == "cuda" if recipe.compile is None else recipe.compile
    described = tuple({"spec": spec, "digest": digest} for spec, digest in zip(recipe.teachers, digests, strict=True))
    return LoadedTeachers(teachers, described, teachers[0].num_classes, compiled)


def training_images(data: str, runtime: Runtime, workers: int | None) -> ImageIndex:
    """The index of DATA/train, or of DATA where it has no train/. Raises UsageError or DataError."""
    folder = Path(data)
    if not data or not folder.is_dir():
        raise UsageError(f"--data {data}: no such folder" if data else "--data is missing: name a folder of images")
    with runtime.main_first():  # the others find the index that the main process has stored
        return ImageIndex.scan(
            folder / "train" if (folder / "train").is_dir() else folder,
            workers=workers,
            progress=runtime.is_main and sys.stderr.isatty(),
        )


def build(
    recipe: Recipe, runtime: Runtime, out: Path, *, views: int, top_k: int, batch_size: int
) -> CacheHeader | None:
    """Makes, or goes on making, the cache of views 0 to `views` - 1 in `out`; on all processes together.

    `recipe` gives images, teachers and views (its student is not looked at), `batch_size` is each process's. Returns
    the finished header in the main process. Raises UsageError or DataError, one line.
    """
    index = training_images(recipe.data, runtime, recipe.loader_threads)
    loaded = load_teachers(recipe, runtime)
    if top_k > loaded.classes:
        raise UsageError(f"--top-k {top_k}: the teachers have {loaded.classes} classes; ask for as many or fewer")
    plan = ViewPlan(
        index.widths, index.heights, seed=recipe.seed, size=recipe.size, scale=recipe.crop_scale,
        ratio=recipe.crop_ratio, flip=recipe.flip, interpolation=recipe.interpolation, cycle=views,
    )  # fmt: skip
    batch_size = min(batch_size, len(index))
    teachers, reports = loaded.prepared(
        recipe, runtime, _first_images(recipe, runtime, index, plan, batch_size), _earlier_layouts(out)
    )
    for report in reports if runtime.is_main else ():
        print(report, file=sys.stderr)
    header = cache_header(recipe, runtime, index, plan, teachers, views, top_k, batch_size)
    with ExitStack() as stack:
        if runtime.is_main:
            todo = stack.enter_context(claim_label_cache(out, header))
            _say_forecast(header, todo)
        runtime.barrier()
        writer = LabelWriter(out, runtime.rank)
        stack.callback(writer.close)
        runtime.barrier()  # all have read what there is before any adds to it
        _Labelling(recipe, runtime, index, plan, teachers, writer, batch_size).run()
        runtime.barrier()
        if not runtime.is_main:
            return None
        writer.finish()
        return writer.header


def _first_images(recipe: Recipe, runtime: Runtime, index: ImageIndex, plan: ViewPlan, rows: int) -> torch.Tensor:
    """uint8 [rows, H, W, 3]: the first batch."""
    loader = label_loader(
        recipe.loader, index, plan, [(0, 0)], batch_size=rows, device=runtime.device, threads=recipe.loader_threads
    )
    try:
        return next(iter(loader)).images
    finally:
        loader.close()


def _earlier_layouts(out: Path) -> dict[str, Any]:
    """How the teachers ran that began the cache in `out`: in other layouts the rest would round differently."""
    if not (out / "header.json").is_file():
        return {}
    stored = read_header(out).made_with.get("layouts")
    return {key: one for key, one in stored.items() if is_layout(one)} if isinstance(stored, dict) else {}


def cache_header(
    recipe: Recipe, runtime: Runtime, index: ImageIndex, plan: ViewPlan, teachers: LabelTeachers, views: int,
    top_k: int, batch_size: int,
) -> CacheHeader:  # fmt: skip
    """What a cache of `views` views says of itself; `batch_size` is what the teachers see at once."""
    return CacheHeader(
        images=len(index),
        images_digest=index.images_digest,
        plan=plan_fields(plan),
        views=views,
        classes=teachers.classes,
        top_k=top_k,
        teachers=teachers.described,
        made_with={
            "batch_size": batch_size,
            "rows_per_part": PART_BATCHES * batch_size,
            "precision": name_of(precision(recipe.amp, runtime.device)),
            "loader": recipe.loader,
            "compiled": teachers.compiled,
            "layouts": teachers.layouts,
            "device": torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "cpu",
            "mealfast": mealfast.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
    )


def _say_forecast(header: CacheHeader, todo: int) -> None:
    total = forecast_bytes(header.images, header.views, header.top_k, header.classes)
    left = "" if todo == total else f", {size_text(todo)} of it left to write"
    print(
        f"{header.views} views of {header.images:,} images, top {header.top_k} of {header.classes} classes: "
        f"{size_text(total)}{left}",
        file=sys.stderr,
    )


class _Labelling:
    """One process's share of the parts that are missing."""

    def __init__(
        self, recipe: Recipe, runtime: Runtime, index: ImageIndex, plan: ViewPlan, teachers: LabelTeachers,
        writer: LabelWriter, batch_size: int,
    ) -> None:  # fmt: skip
        self.runtime, self.teachers, self.writer, self.batch_size = runtime, teachers, writer, batch_size
        self.parts = writer.todo[runtime.rank :: runtime.world_size]
        self.batches = [(view, first) for view, part in self.parts for first in range(*writer.rows(part), batch_size)]
        self.loader = label_loader(
            recipe.loader, index, plan, self.batches, batch_size=batch_size, device=runtime.device,
            threads=recipe.loader_threads,
        )  # fmt: skip
        self.progress = Progress(
            len(self.batches), 0, batch_size * runtime.world_size, enabled=runtime.is_main, unit="batch"
        )
        self.began = self.said = time.perf_counter()

    def run(self) -> None:
        """Labels and writes every part; the main process enters the views that become complete into the header."""
        try:
            loaded = iter(self.loader)
            for view, part in self.parts:
                targets = [self._target(next(loaded)) for _ in range(*self.writer.rows(part), self.batch_size)]
                ids, probabilities = (torch.cat(one).cpu().numpy() for one in zip(*targets, strict=True))
                self.writer.write(view, part, ids, probabilities)
                if self.runtime.is_main:
                    self.writer.complete_views()
                    self._say_where(view)
        finally:
            self.loader.close()
            self.progress.close()

    def _target(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pad_to = self.batch_size if self.teachers.compiled else None  # compiled models see one shape only
        target = top_k_targets(self.teachers, batch.images, self.writer.header.top_k, pad_to)
        self.progress.advance()
        if self.runtime.is_main and self.progress.step in (1, 4):
            self._forecast(target)
        return target

    def _forecast(self, target: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Says after the first batches how long the rest takes; the very first, which warms up, is left out."""
        target[1].sum().item()  # waits for the device
        if self.progress.step == 1:
            self.began = time.perf_counter()
            return
        seconds = (time.perf_counter() - self.began) / 3
        left = timedelta(seconds=round(seconds * (len(self.batches) - 4)))
        rate = self.batch_size * self.runtime.world_size / seconds
        self.progress.say(f"forecast: {rate:,.0f} images/s, {left.total_seconds() / 3600:.2f} hours ({left}) from here")

    def _say_where(self, view: int) -> None:
        now = time.perf_counter()
        if now - self.said < LINE_EVERY and self.progress.step < len(self.batches):
            return
        rate = (self.progress.step - 1) * self.batch_size * self.runtime.world_size / max(now - self.began, 1e-9)
        if self.progress.step > 1:
            self.progress.line(f"view {view + 1}/{self.writer.header.views}", {}, rate)
        self.said = now


def top_k_targets(
    teachers: LabelTeachers, images: torch.Tensor, top_k: int, pad_to: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images [B, H, W, 3] -> ids int32 [B, k], probabilities float32 [B, k] of the mean of the softmaxes.

    `pad_to` adds black images up to that many, for the teachers only.
    """
    logits = teachers.ensemble(padded(images, pad_to))
    return ensemble_topk([one[: len(images)] for one in logits], top_k)


def compare(found: Sequence[np.ndarray], stored: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """Total variation, float64 [B], between two top-k targets (ids [B, k], probabilities [B, k]) with the rest spread
    evenly: 0 where they are equal, 1 where they have nothing in common."""
    one, other = (_dense(*target, classes) for target in (found, stored))
    return np.abs(one - other).sum(axis=1) / 2


def _dense(ids: np.ndarray, probabilities: np.ndarray, classes: int) -> np.ndarray:
    p = probabilities.astype(np.float64)
    rest = np.clip(1 - p.sum(axis=1, keepdims=True), 0, None) / max(classes - p.shape[1], 1)
    dense = np.repeat(rest, classes, axis=1)
    np.put_along_axis(dense, ids.astype(np.int64), p, axis=1)
    return dense
