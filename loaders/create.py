"""Makes loaders by the name of their backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .batch import DataError
from .cores import core_share
from .index import ImageIndex
from .label_cache import LabelCache
from .pillow import PillowLoader
from .prefetch import TIMEOUT, LoaderOptions, PrefetchLoader
from .steps import EvalSteps, LabelSteps, Steps, TrainSteps
from .views import EvalViews, ViewPlan

if TYPE_CHECKING:  # importing it takes DALI
    from .dali_pipeline import GpuDecoding

BACKENDS = ("dali", "pillow")
PREFETCH = 2  # batches


def train_loader(
    backend: str,
    index: ImageIndex,
    plan: ViewPlan,
    *,
    batch_size: int,
    start_step: int = 0,
    stop_step: int | None = None,
    epochs: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    prefetch: int | None = None,
    decoding: GpuDecoding | None = None,
    label_cache: LabelCache | None = None,
    live_epochs: range = range(0),
    timeout: float = TIMEOUT,
    stopping: Callable[[], bool] | None = None,
) -> PrefetchLoader[Any]:
    """A Loader of the plan's steps start_step to stop_step - 1, images uint8 [batch_size / world_size, size, size, 3].

    In place of `stop_step`, `epochs` ends after so many from the plan's beginning (neither: after one). `len` counts
    the loader's steps, `loader.epochs()` yields (epoch, its batches).

    `backend` is "dali" or "pillow". `batch_size` is the global batch: rank r shows its r-th part. Step s belongs to
    epoch s // (N // batch_size); the remainder of each epoch's order is dropped, and no step waits at its start.
    `threads` decode (default: this process's share of the cores), `prefetch` batches are kept ready; `decoding` tunes
    DALI on a GPU. With `label_cache` every batch brings its targets, but in `live_epochs` and while its view is not
    complete. Raises DataError for options that do not fit.

    Of all three kinds of loader: `next` raises LoaderTimeoutError where no image comes for `timeout` seconds, and
    LoaderStopped where `stopping()`, asked five times a second of waiting in the thread that waits, is true.
    """
    if stop_step is not None and epochs is not None:
        raise DataError("train_loader: takes stop_step or epochs, not both")
    steps = TrainSteps(
        index,
        plan,
        batch_size=batch_size,
        start_step=start_step,
        stop_step=(1 if epochs is None else epochs) * (len(index) // max(batch_size, 1))
        if stop_step is None
        else stop_step,
        rank=rank,
        world_size=world_size,
        label_cache=label_cache,
        live_epochs=live_epochs,
    )
    return _loader(backend, index, steps, device, threads, prefetch, timeout, stopping, decoding)


def label_loader(
    backend: str,
    index: ImageIndex,
    plan: ViewPlan,
    batches: Sequence[tuple[int, int | np.ndarray]],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    timeout: float = TIMEOUT,
    stopping: Callable[[], bool] | None = None,
) -> PrefetchLoader[Any]:
    """A Loader of the batches (view, first row) of a plan, images in the index's order, as a label cache is made.

    Each holds `batch_size` images, the last of a view fewer; (view, rows int64 [B]) stands for just these. A broken
    file raises DataError: its target would be that of another image.
    """
    steps = LabelSteps(index, plan, batches, batch_size=batch_size)
    return _loader(backend, index, steps, device, threads, None, timeout, stopping)


def eval_loader(
    backend: str,
    index: ImageIndex,
    views: EvalViews,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    timeout: float = TIMEOUT,
    stopping: Callable[[], bool] | None = None,
) -> PrefetchLoader[Any]:
    """A Loader of every image once over all ranks, in the index's order; `batch_size` is each rank's, the last smaller.

    A rank for which no image is left yields nothing. A broken file raises DataError: it cannot be replaced honestly.
    """
    steps = EvalSteps(index, views, batch_size=batch_size, rank=rank, world_size=world_size)
    return _loader(backend, index, steps, device, threads, None, timeout, stopping)


def _loader(
    backend: str,
    index: ImageIndex,
    steps: Steps,
    device: torch.device | str,
    threads: int | None,
    prefetch: int | None,
    timeout: float,
    stopping: Callable[[], bool] | None,
    decoding: GpuDecoding | None = None,
) -> PrefetchLoader[Any]:
    threads = core_share() if threads is None else threads
    prefetch = PREFETCH if prefetch is None else prefetch
    if threads < 1 or prefetch < 1:
        raise DataError(f"loader threads {threads} and prefetch {prefetch}: both must be at least 1")
    if not timeout > 0:
        raise DataError(f"--loader-timeout {timeout:g}: must be more than 0 seconds")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    options = LoaderOptions(device, threads, prefetch, timeout, stopping)
    if backend == "pillow":
        return PillowLoader(index, steps, options)
    if backend == "dali":
        try:
            from .dali import DaliLoader
        except ImportError as error:
            raise DataError(
                f"--loader dali: NVIDIA DALI cannot be imported ({error}); pip install nvidia-dali-cuda120, "
                "or use --loader pillow"
            ) from None
        return DaliLoader(index, steps, options, decoding)
    raise DataError(f"--loader {backend}: must be {' or '.join(BACKENDS)}")
