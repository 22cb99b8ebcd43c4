"""Makes a label cache: the teachers run once over planned views, and their top-k targets go to disk.

Shape legend: B images of a batch, H and W pixels, k entries kept of each target.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch

from mealfast.errors import UsageError
from mealfast.labels.labelling import Labelled, Labeller, LabelTeachers, load_teachers, together
from mealfast.loaders import (
    CacheHeader,
    Claim,
    ImageIndex,
    LabelWriter,
    ViewPlan,
    claim_label_cache,
    label_loader,
    plan_fields,
    read_header,
)
from mealfast.machine.precision import name_of, precision
from mealfast.machine.processes import Runtime
from mealfast.machine.terminal import say
from mealfast.machine.version import VERSION
from mealfast.method.data import scan_images, view_plan
from mealfast.models import tuning
from mealfast.models.class_order import Named
from mealfast.models.layout import is_layout
from mealfast.recipe import Recipe
from mealfast.record.console import Progress, size_text

LINE_EVERY = 10.0  # seconds between lines of the log
TOP_K = 10  # probabilities of each target that are kept, where nobody says how many


def build(
    recipe: Recipe, runtime: Runtime, out: Path, *, views: int, top_k: int | None, batch_size: int
) -> CacheHeader | None:
    """Makes, or goes on making, the cache of views 0 to `views` - 1 in `out`; on all processes together.

    `recipe` gives images, teachers and views (its student is not looked at), `batch_size` is each process's, `top_k`
    None: TOP_K, or every class where there are fewer. Returns the finished header in the main process. Raises
    UsageError or DataError, one line.
    """
    index = scan_images(recipe.data, "train", runtime, recipe.loader_threads, val=recipe.val, share=recipe.val_share)
    stored = read_header(out) if (out / "header.json").is_file() else None
    cache = None if stored is None else Named(f"--out {out}", stored.class_names)
    models, described, classes = load_teachers(recipe, runtime, index, cache)
    names = models[0].classes if cache is None else cache.classes
    top_k = top_k or min(TOP_K, classes)
    if top_k > classes:
        raise UsageError(f"--top-k {top_k}: the teachers have {classes} classes; ask for as many or fewer")
    plan = view_plan(recipe, index, cycle=views)
    batch_size = min(batch_size, len(index))
    images = _first_images(recipe, runtime, index, plan, batch_size)
    compiled = runtime.device.type == "cuda" if recipe.compile is None else recipe.compile
    earlier = _earlier_layouts(out)
    ensemble, reports = tuning.prepare(
        recipe, runtime, models, images, compile=compiled, earlier=earlier, specs=recipe.teachers
    )
    for report in reports if runtime.is_main else ():
        say(str(report))
    teachers = LabelTeachers(ensemble, described, classes, compiled, {**earlier, **tuning.layouts(reports)}, names)
    header = cache_header(recipe, runtime, index, plan, teachers, views, top_k, batch_size)
    labeller = Labeller(recipe, runtime, index, plan, teachers, top_k, batch_size)
    with ExitStack() as stack:
        if runtime.is_main:
            _say_what_is_left(header, stack.enter_context(claim_label_cache(out, header)))
        runtime.barrier()
        writer = stack.enter_context(closing(LabelWriter(out, runtime.rank)))
        batches = {view: labeller.share(view, writer.missing(view)) for view in writer.incomplete}
        runtime.barrier()  # all have read what there is before any adds to it
        everything = [batch for some in batches.values() for batch in some]
        progress = stack.enter_context(closing(_BuildProgress(runtime, len(everything), views, batch_size)))
        labelled = progress.counted(stack.enter_context(closing(labeller(everything))))  # one loader for all views
        for view, some in batches.items():
            for made in together(labelled, len(some)):
                writer.add(view, *made)
                writer.flush()
                progress.say_where(view)
            runtime.barrier()
            if runtime.is_main:
                writer.complete(view)
        return writer.header if runtime.is_main else None


def _first_images(recipe: Recipe, runtime: Runtime, index: ImageIndex, plan: ViewPlan, rows: int) -> torch.Tensor:
    """uint8 [rows, H, W, 3]: the first batch."""
    loader = label_loader(
        recipe.loader,
        index,
        plan,
        [(0, 0)],
        batch_size=rows,
        device=runtime.device,
        threads=recipe.loader_threads,
        timeout=recipe.loader_timeout,
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
            "precision": name_of(precision(recipe.amp, runtime.device)),
            "loader": recipe.loader,
            "compiled": teachers.compiled,
            "layouts": teachers.layouts,
            "device": torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "cpu",
            "mealfast": VERSION,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        class_names=teachers.class_names,
    )


def _say_what_is_left(header: CacheHeader, claim: Claim) -> None:
    total = header.views * header.bytes_per_view
    left = "" if claim.bytes_left == total else f", {size_text(claim.bytes_left)} of it left to write"
    if claim.note:
        say(claim.note)
    say(
        f"{header.views} views of {header.images:,} images, top {header.top_k} of {header.classes} classes: "
        f"{size_text(total)}{left}"
    )


class _BuildProgress:
    """How far a build is, by the main process's share: in a bar or, every LINE_EVERY seconds, in lines."""

    def __init__(self, runtime: Runtime, batches: int, views: int, batch_size: int) -> None:
        self._progress = Progress(batches, 0, batch_size * runtime.world_size, enabled=runtime.is_main, unit="batch")
        self._views, self._began, self._said = views, time.perf_counter(), time.perf_counter()

    def counted(self, labelled: Iterable[Labelled]) -> Iterator[Labelled]:
        """The same, counted; after the first batches it is said how long the rest takes."""
        for one in labelled:
            self._progress.advance()
            if self._progress.enabled and self._progress.step in (1, 4):
                one[2].sum().item()  # waits for the device
                self._forecast()
            yield one

    def _forecast(self) -> None:
        """The very first batch, which warms up, is left out."""
        if self._progress.step == 1:
            self._began = time.perf_counter()
            return
        seconds = (time.perf_counter() - self._began) / 3
        left = timedelta(seconds=round(seconds * (self._progress.total_steps - 4)))
        rate, hours = self._progress.batch_size / seconds, left.total_seconds() / 3600
        self._progress.say(f"forecast: {rate:,.0f} images/s, {hours:.2f} hours ({left}) from here")

    def say_where(self, view: int) -> None:
        """Says so if it is time to, or if it was the last batch."""
        now, done = time.perf_counter(), self._progress.step
        if now - self._said < LINE_EVERY and done < self._progress.total_steps:
            return
        if done > 1:
            rate = (done - 1) * self._progress.batch_size / max(now - self._began, 1e-9)
            self._progress.line(f"view {view + 1}/{self._views}", {}, rate)
        self._said = now

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._progress.close()
