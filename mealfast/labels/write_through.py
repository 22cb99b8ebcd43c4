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
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from mealfast.errors import UsageError
from mealfast.kernels import ensemble_topk
from mealfast.labels.build import LabelTeachers, cache_header, top_k_targets
from mealfast.labels.fit import require_cache
from mealfast.loaders import (
    DataError,
    ImageIndex,
    LabelCache,
    LabelSpool,
    ViewPlan,
    claim_label_cache,
    forecast_bytes,
    gather_spools,
    holds_label_cache,
    label_loader,
    read_header,
)
from mealfast.machine.processes import Runtime
from mealfast.recipe import Recipe
from mealfast.record import checkpoint
from mealfast.record.console import size_text

TOP_K = 10
QUEUED = 64  # steps whose targets may wait for the disk, before training waits too


@dataclasses.dataclass(frozen=True)
class WritePlan:
    """What a run writes. It stands in config.json and in checkpoints: whatever the cache holds by then, a run that goes
    on runs its teachers in the same epochs."""

    first: int  # epoch (and view) with which the live ones begin; those before were complete when the run began
    views: int  # V, and the epoch with which they end
    top_k: int | None  # None: 10, or every class where there are fewer
    seed: int  # of the views

    @property
    def live_epochs(self) -> range:
        return range(self.first, self.views)

    def to_json(self) -> dict[str, int | None]:
        return dataclasses.asdict(self)


def write_plan(recipe: Recipe, runtime: Runtime) -> WritePlan | None:
    """What this run is to write; None where it has no label cache or reads one that is complete.

    Raises UsageError or DataError: there is nothing to read and no teacher, the cache has other views or another k.
    """
    if not recipe.label_cache:
        return None
    known, plan = _of_the_run_that_goes_on(recipe)
    return runtime.gather(plan if known else _for_a_new_run(recipe))[0]  # another process may look a moment later


def _of_the_run_that_goes_on(recipe: Recipe) -> tuple[bool, WritePlan | None]:
    """Whether there is such a run, and its plan."""
    config = Path(recipe.run_dir) / "config.json"
    if recipe.resume not in ("auto", "never"):
        stored = checkpoint.read(Path(recipe.resume)).get("identity", {}).get("targets")
    elif recipe.resume == "auto" and config.exists():
        stored = json.loads(config.read_text(encoding="utf-8")).get("write_through")
    else:
        return False, None
    try:
        return True, WritePlan(**stored) if isinstance(stored, dict) else None
    except TypeError as error:
        raise UsageError(
            f"--run-dir {recipe.run_dir}: its plan for the label cache is damaged; name another"
        ) from error


def _for_a_new_run(recipe: Recipe) -> WritePlan | None:
    folder, what = Path(recipe.label_cache), f"--label-cache {recipe.label_cache}"
    views, top_k = recipe.label_cache_views, recipe.label_cache_top_k
    if not recipe.teachers:
        require_cache(recipe)
    if recipe.teachers and not folder.is_file() and not holds_label_cache(folder, "--label-cache"):
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


class WriteThrough:
    """The label cache that a run writes, and from epoch V on reads: `cache`. Close it to let go of the folder."""

    def __init__(
        self, recipe: Recipe, runtime: Runtime, teachers: LabelTeachers, index: ImageIndex, views: ViewPlan,
        plan: WritePlan,
    ) -> None:  # fmt: skip
        """Claims the cache, all processes together. Raises UsageError or DataError: it is of other targets."""
        self.recipe, self.runtime, self.index, self.views, self.plan = recipe, runtime, index, views, plan
        self.rows = recipe.batch_size // runtime.world_size // recipe.accumulate  # that the teachers see at once
        self.teachers, classes = teachers, teachers.classes
        top_k = plan.top_k or min(TOP_K, classes)
        if top_k > classes:
            raise UsageError(
                f"--label-cache-top-k {top_k}: the teachers have {classes} classes; ask for as many or fewer"
            )
        folder, count = Path(recipe.label_cache), plan.views
        if holds_label_cache(folder, "--label-cache"):  # which another program may have begun to extend
            count = max(count, read_header(folder).views)
        self.header = cache_header(recipe, runtime, index, views, self.teachers, count, top_k, self.rows)
        self._pending: deque[Future] = deque()
        with ExitStack() as stack:
            if runtime.is_main:
                stack.enter_context(claim_label_cache(folder, self.header, by_training=True))
                gather_spools(folder, self.header)
            runtime.barrier()
            self.cache = LabelCache(folder)
            self._spool = LabelSpool(folder, runtime.rank)
            stack.callback(self._spool.close)
            self._thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="mealfast-labels"))
            runtime.barrier()  # all have read what there is before any adds to it
            self._stack = stack.pop_all()

    # -- in the steps ------------------------------------------------------------------------------------------------

    def top_k(self, teacher_logits: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """K logits [B, C] -> ids int32 [B, k], probabilities float32 [B, k]: a cache's target. No host sync."""
        return ensemble_topk(teacher_logits, self.header.top_k)

    def add(self, epoch: int, images: torch.Tensor, made: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Has the targets `made`, in parts of the batch, of images int64 [B] in an epoch written. Does not wait for it.

        Raises DataError where an earlier write has failed.
        """
        if epoch not in self.plan.live_epochs or self.cache.has(epoch):
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
        self._spool.add(view, *(part.numpy() for part in parts))

    def flush(self) -> None:
        """Waits until all that was added is on disk: before a checkpoint says that it is."""
        while self._pending:
            self._pending.popleft().result()
        self._spool.flush()

    # -- between epochs ----------------------------------------------------------------------------------------------

    def finish(self, epochs: range) -> list[str]:
        """Completes the views of epochs that are over, all processes together. Returns what to tell the user."""
        notes = []
        for view in epochs:
            if view < self.plan.views and not self.cache.has(view):
                notes += self._complete(view)
        return notes

    def _complete(self, view: int) -> list[str]:
        runtime = self.runtime
        self.flush()
        runtime.barrier()
        missing = self._spool.missing(view)
        runtime.barrier()  # all have counted before any adds
        broken = "".join(sorted(set(runtime.gather(self._label(view, missing[runtime.rank :: runtime.world_size])))))
        if broken:
            return [f"note: label cache: {broken}"]
        if runtime.is_main:
            self._spool.complete(view)
        runtime.barrier()
        self.cache.refresh()
        return [
            f"label cache: view {view + 1} of {self.plan.views} is complete; {len(missing)} of {len(self.index):,} "
            "targets were made outside of the steps"
        ]

    def _label(self, view: int, missing: np.ndarray) -> str:
        """Has the teachers label images int64 [m] and adds them; why it could not, where a file is broken."""
        if not len(missing):
            return ""
        batches = [(view, missing[first : first + self.rows]) for first in range(0, len(missing), self.rows)]
        loader = label_loader(
            self.recipe.loader, self.index, self.views, batches, batch_size=self.rows, device=self.runtime.device,
            threads=self.recipe.loader_threads,
        )  # fmt: skip
        pad_to = self.rows if self.teachers.compiled else None
        loaded = iter(loader)
        try:
            for _ in batches:
                try:
                    batch = next(loaded)
                except DataError as error:
                    return f"view {view} stays incomplete, and the teachers run where it is shown: {error}"
                target = top_k_targets(self.teachers, batch.images, self.header.top_k, pad_to)
                self._spool.add(view, *(part.cpu().numpy() for part in (batch.indices, *target)))
        finally:
            loader.close()
        self._spool.flush()
        return ""

    def introduction(self) -> str:
        """What this run does with its cache."""
        plan, header = self.plan, self.header
        size = forecast_bytes(header.images, plan.views, header.top_k, header.classes)
        return (
            f"label cache {self.recipe.label_cache}: {len(self.cache.header.complete)} of {plan.views} views complete; "
            f"the teachers run in epochs {plan.first + 1} to {plan.views}, and the top {header.top_k} of "
            f"{header.classes} classes of what they say is written ({size_text(size)} in all); other epochs read it"
        )

    def close(self) -> None:
        """Writes what waits, and lets go of the folder."""
        self._stack.close()
