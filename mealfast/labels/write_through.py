"""Write-through: a live run that fills a label cache as it goes, so that the first student pays no extra pass.

The teachers run in the first V epochs for the loss as in any live run, and the top k of what they say goes to disk in a
thread. At the end of such an epoch they label what its steps left out (the remainder of N / batch), and the view is
complete. From epoch V on the run reads its own cache.

Shape legend: N images, V views, B images of this process, K teachers, C classes, k entries kept of each target.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch

from mealfast.errors import UsageError
from mealfast.kernels import ensemble_topk
from mealfast.labels.build import TOP_K, cache_header
from mealfast.labels.fit import require_cache
from mealfast.labels.labelling import Labeller, LabelTeachers, together
from mealfast.loaders import (
    Batch,
    DataError,
    ImageIndex,
    LabelCache,
    LabelWriter,
    ViewPlan,
    claim_label_cache,
    holds_label_cache,
    read_header,
)
from mealfast.machine.processes import Runtime
from mealfast.method.inputs import Inputs
from mealfast.method.targets import Target
from mealfast.recipe import Recipe
from mealfast.record import checkpoint
from mealfast.record.console import size_text

OPTION = "--label-cache"
QUEUED = 64  # steps whose targets may wait for the disk, before training waits too


@dataclasses.dataclass(frozen=True)
class WritePlan:
    """What a run writes. It stands in config.json and in checkpoints: whatever the cache holds by then, a run that goes
    on runs its teachers in the same epochs."""

    first: int  # epoch (and view) with which the live ones begin; those before were complete when the run began
    views: int  # V, and the epoch with which they end
    top_k: int | None  # None: TOP_K, or every class where there are fewer
    seed: int  # of the views

    def __post_init__(self) -> None:
        """Raises TypeError: of a file that is no such plan."""
        if any(type(one) is not int for one in (self.first, self.views, self.seed, self.top_k or 0)):
            raise TypeError("a plan of numbers")

    @property
    def live_epochs(self) -> range:
        """The epochs whose targets the run writes."""
        return range(self.first, self.views)

    def to_json(self) -> dict[str, int | None]:
        """For config.json and for checkpoints."""
        return dataclasses.asdict(self)


def write_plan(recipe: Recipe, runtime: Runtime) -> WritePlan | None:
    """What this run is to write; None where it has no label cache or reads one that is complete.

    Raises UsageError or DataError: there is nothing to read and no teacher, the cache has other views or another k.
    """
    if not recipe.label_cache:
        return None
    known, plan = _of_the_run_that_goes_on(recipe)
    plan = plan if known else _for_a_new_run(recipe)
    return runtime.gather(plan)[0]  # another process may look a moment later


def _of_the_run_that_goes_on(recipe: Recipe) -> tuple[bool, WritePlan | None]:
    """Whether there is such a run, and its plan. Raises UsageError."""
    path = Path(recipe.run_dir) / "config.json"
    try:
        if recipe.resume not in ("auto", "never"):
            path = Path(recipe.resume)
            stored = checkpoint.read(path)["identity"]["targets"]
        elif recipe.resume == "auto" and path.exists():
            stored = json.loads(path.read_text(encoding="utf-8")).get("write_through")
        else:
            return False, None
        return True, WritePlan(**stored) if isinstance(stored, dict) else None
    except UsageError:
        raise
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise UsageError(f"{path}: its plan for the label cache is damaged; name another --run-dir") from None


def _for_a_new_run(recipe: Recipe) -> WritePlan | None:
    folder, what = Path(recipe.label_cache), f"--label-cache {recipe.label_cache}"
    views, top_k = recipe.label_cache_views, recipe.label_cache_top_k
    if not recipe.teachers:
        require_cache(recipe)
    if recipe.teachers and not folder.is_file() and not holds_label_cache(folder, OPTION):
        return WritePlan(0, views or recipe.epochs, top_k, recipe.seed)
    header = LabelCache(folder).header
    for option, asked, there in (("views", views, header.views), ("top-k", top_k, header.top_k)):
        if asked not in (None, there):
            raise UsageError(f"{what}: has --label-cache-{option} {there}, not {asked}: leave the option out")
    if header.is_complete or header.explicit or not recipe.teachers:
        return None
    complete = {one.view for one in header.complete}
    first = next(view for view in range(header.views) if view not in complete)
    return WritePlan(first, header.views, header.top_k, header.plan["seed"])


class RecordingTargets:
    """A target source (`method.targets.TargetSource`): live teachers, whose top k goes to a label cache.

    Close it to let go of the folder.
    """

    def __init__(
        self, recipe: Recipe, runtime: Runtime, teachers: LabelTeachers, index: ImageIndex, views: ViewPlan,
        plan: WritePlan, reordered: bool = False,
    ) -> None:  # fmt: skip
        """Claims the cache, all processes together. `views` are those of `plan`: its seed, its number of views.
        `reordered` says that a teacher's outputs are not in its own order.

        Raises UsageError or DataError: it is of other targets.
        """
        self.cache: LabelCache  # what is complete of it: a loader reads its targets where there are any
        self._recipe, self._runtime, self._teachers, self._plan = recipe, runtime, teachers, plan
        self._steps_per_epoch = len(index) // recipe.batch_size
        self._made: list[tuple[torch.Tensor, torch.Tensor]] = []  # the step's top k, [B / accumulate, k] each
        self._pending: deque[Future[None]] = deque()
        k = plan.top_k or min(TOP_K, teachers.classes)
        if k > teachers.classes:
            raise UsageError(
                f"--label-cache-top-k {k}: the teachers have {teachers.classes} classes; ask for as many or fewer"
            )
        folder, count = Path(recipe.label_cache), plan.views
        if holds_label_cache(folder, OPTION):  # which another program may have begun to extend
            stored = read_header(folder)
            count = max(count, stored.views)
            if stored.class_names is None and reordered:
                raise UsageError(
                    f"{OPTION} {folder}: was begun by an earlier mealfast, with the teachers' outputs in another order "
                    "than the student's; use another folder"
                )
        rows = recipe.batch_size // runtime.world_size // recipe.accumulate  # that the teachers see at once
        self.header = cache_header(recipe, runtime, index, views, teachers, count, k, rows)
        self._labeller = Labeller(recipe, runtime, index, views, teachers, k, rows)
        self._note = ""
        with ExitStack() as stack:
            if runtime.is_main:
                self._note = stack.enter_context(claim_label_cache(folder, self.header, OPTION)).note
            runtime.barrier()
            self.cache = LabelCache(folder)
            self._writer = stack.enter_context(closing(LabelWriter(folder, runtime.rank, OPTION)))
            self._thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="mealfast-labels"))
            runtime.barrier()  # all have read what there is before any adds to it
            self._stack = stack.pop_all()

    # -- in a step ---------------------------------------------------------------------------------------------------

    def before(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The batch's own targets, where the cache has them. Else, under CutMix, the top k of the images as they are:
        the run learns from what it writes, mixed by area as a run from the cache mixes it. Otherwise nothing: the
        teachers see the student's images."""
        self._made = []
        if batch.targets or not self._recipe.cutmix:
            return batch.targets or ()
        for part in batch.images.chunk(self._recipe.accumulate):
            self._made.append(self.top_k(self._teachers.ensemble(part)))
        return tuple(torch.cat(one) for one in zip(*self._made, strict=True))

    def __call__(self, part: Inputs) -> Target:
        """The given target; else the teachers' logits, with the top k that the cache will hold."""
        if part.cached:
            return Target(top_k=part.cached)
        logits = self._teachers.ensemble(part.images)
        self._made.append(self.top_k(logits))
        return Target(logits=logits, top_k=self._made[-1])

    def after(self, batch: Batch, step: int) -> None:
        """Has the top k that the step made written. Raises DataError where an earlier write has failed."""
        if self._made:
            self.add(step // self._steps_per_epoch, batch.indices, self._made)

    def top_k(self, teacher_logits: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """K logits [B, C] -> ids int32 [B, k], probabilities float32 [B, k]: a cache's target. No host sync."""
        return ensemble_topk(teacher_logits, self.header.top_k)

    def add(self, epoch: int, images: torch.Tensor, made: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Has the targets `made`, in parts of the batch, of images int64 [B] in an epoch written. Does not wait for it.

        Raises DataError where an earlier write has failed.
        """
        if epoch not in self._plan.live_epochs or self.cache.has(epoch):
            return
        while self._pending and (self._pending[0].done() or len(self._pending) >= QUEUED):
            self._pending.popleft().result()
        on_device = (images, *(torch.cat(one) for one in zip(*made, strict=True)))
        if images.is_cuda:
            on_host = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in on_device]
            for there, here in zip(on_device, on_host, strict=True):
                here.copy_(there, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._pending.append(self._thread.submit(self._write, epoch, on_host, copied))
        else:
            self._pending.append(self._thread.submit(self._write, epoch, on_device, None))

    def _write(self, view: int, parts: Sequence[torch.Tensor], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        images, ids, probabilities = (part.numpy() for part in parts)
        finite = np.isfinite(probabilities).all(axis=1)  # others stay missing; such a step is skipped, too
        self._writer.add(view, images[finite], ids[finite], probabilities[finite])

    def flush(self) -> None:
        """Waits until all that was added is on disk: before a checkpoint says that it is. Raises DataError."""
        while self._pending:
            self._pending.popleft().result()
        self._writer.flush()

    # -- between epochs ----------------------------------------------------------------------------------------------

    def finish(self, epochs: range) -> list[str]:
        """Completes the views of epochs that are over, all processes together. Returns what to tell the user.

        Raises DataError: a full disk, teachers whose targets are not finite.
        """
        notes = []
        for view in epochs:
            if view < self._plan.views and not self.cache.has(view):
                notes.append(self._complete(view))
        return notes

    def _complete(self, view: int) -> str:
        runtime = self._runtime
        self.flush()
        runtime.barrier()
        missing = self._writer.missing(view)
        runtime.barrier()  # all have counted before any adds
        broken = sorted(set(map(str, runtime.gather(self._label(view, missing)))) - {""})
        if broken:
            return f"note: label cache: {'; '.join(broken)}"
        if runtime.is_main:
            self._writer.complete(view)
        runtime.barrier()
        self.cache.refresh()
        return (
            f"label cache: view {view + 1} of {self._plan.views} is complete; {len(missing)} of "
            f"{self.header.images:,} targets were made outside of the steps"
        )

    def _label(self, view: int, missing: range | np.ndarray) -> str:
        """Has the teachers label this process's share of images [m]; why they could not, where a file is broken."""
        batches = self._labeller.share(view, missing)
        with closing(self._labeller(batches)) as labelled:
            made = together(labelled, len(batches))
            while True:
                try:
                    some = next(made, None)
                except DataError as error:
                    return f"view {view} stays incomplete, and the teachers run where it is shown: {error}"
                if some is None:
                    break
                self._writer.add(view, *some)
        self._writer.flush()
        return ""

    def introduction(self) -> list[str]:
        """What this run does with its cache, for its log."""
        plan, header = self._plan, self.header
        size = plan.views * header.bytes_per_view
        return [
            *([self._note] if self._note else []),
            f"label cache {self._recipe.label_cache}: {len(self.cache.header.complete)} of {plan.views} views "
            f"complete; the teachers run in epochs {plan.first + 1} to {plan.views}, and the top {header.top_k} of "
            f"{header.classes} classes of what they say is written ({size_text(size)} in all); other epochs read it",
        ]

    def close(self) -> None:
        """Writes what waits, and lets go of the folder."""
        self._stack.close()
