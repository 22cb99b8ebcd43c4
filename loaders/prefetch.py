"""What both backends share: batches made ahead in the order of the steps, and a consumer that never waits for ever."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as NotYet
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import torch

from .batch import Batch, DataError
from .broken_files import BrokenFiles
from .files import printable
from .index import ImageIndex
from .open_files import ReadingLog, StallCheck
from .pillow_render import RowRenderer
from .steps import BatchViews, Steps
from .threads import WorkerThreads

TIMEOUT = 300.0  # seconds without one image, by default
_SLICE = 0.2  # seconds between two looks at `stopping`
_PATIENCE = 5.0  # seconds at most, without one image before a stall check, and of `close` for blocked threads
_CLOSING = "mealfast-closing"  # name of the threads that close loaders


class LoaderStopped(Exception):  # noqa: N818 (no error: it was asked for)
    """The loader's `stopping` was true while a batch was waited for. Close the loader; no batch was handed over."""


class LoaderTimeoutError(DataError):
    """No image came for the loader's `timeout`: one line that names the files waited for. Close the loader."""


def threads_are_blocked() -> bool:
    """Whether a loader was closed whose threads still wait for a file, or for a decoder that does.

    They are daemons, but the decoder's own threads are not Python's: end such a process by `os._exit`.
    """
    return any(thread.name == _CLOSING for thread in threading.enumerate())


@dataclass(frozen=True)
class LoaderOptions:
    """What both backends are told, beside the index and the steps."""

    device: torch.device
    threads: int  # that decode
    prefetch: int  # batches in flight
    timeout: float = TIMEOUT  # seconds without one image, after which LoaderTimeoutError is raised
    stopping: Callable[[], bool] | None = None  # asked every 0.2 s of waiting; true: LoaderStopped is raised


@dataclass
class InFlight:
    """A batch that is being made."""

    step: int
    views: BatchViews


Flight = TypeVar("Flight", bound=InFlight)


class PrefetchLoader(ABC, Generic[Flight]):
    """A Loader that keeps batches in flight ahead of its consumer. Each `iter` starts at the first step.

    A thread of the loader's own calls the backend, one call at a time and only while the consumer waits in `next`; the
    consumer's thread waits in slices, so that Python's signal handlers run. CUDA work is enqueued on the stream that
    is current for the consumer.
    """

    def __init__(self, index: ImageIndex, steps: Steps, options: LoaderOptions) -> None:
        self._index, self._steps, self._options = index, steps, options
        self._device = options.device
        self._labels = torch.from_numpy(index.labels)
        self._broken = BrokenFiles(index)
        self._log = ReadingLog()
        self._render = RowRenderer(index, steps, self._broken, self._log)
        self._pool = WorkerThreads(options.threads, "mealfast-decode")
        self._caller = WorkerThreads(1, "mealfast-batches")
        self._pending: deque[Flight] = deque()  # of the iteration that runs
        self._closing: threading.Thread | None = None

    @property
    def replaced(self) -> dict[str, str]:
        """Relative path -> reason of the files that broke or vanished after the scan; other views stand in for them."""
        return self._broken.reasons

    @property
    def replaced_count(self) -> int:
        """Views replaced so far."""
        return self._broken.views

    @property
    def stuck(self) -> bool:
        """Whether a thread is blocked that `close` could not wait for; see `threads_are_blocked`."""
        return self._closing is not None and self._closing.is_alive()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError where the data cannot be used; LoaderTimeoutError, LoaderStopped as the options say."""
        if self._pending:  # an earlier iteration was left half-way and still lives
            self._caller.submit(self._forget, self._pending)
        pending: deque[Flight] = deque()
        self._pending = pending
        todo = iter(range(len(self._steps)))
        finished = False
        try:
            while (batch := self._wait(pending, todo)) is not None:
                yield batch
                if self._pending is not pending:
                    raise RuntimeError("the loader was started again: it serves one iteration at a time")
            finished = True
        finally:
            if not finished and self._pending is pending:
                with suppress(RuntimeError):  # closed, which has forgotten them
                    self._caller.submit(self._forget, pending)

    def epochs(self) -> Iterator[tuple[int, Iterator[Batch]]]:
        """(epoch, its batches) of a training loader, one after the other, with nothing waited for in between.

        Of an epoch that is left half-way, the other batches are made and dropped.
        """
        batches = iter(self)
        for epoch, count in self._steps.epochs():
            of_epoch = islice(batches, count)
            yield epoch, of_epoch
            deque(of_epoch, maxlen=0)

    def _wait(self, pending: deque[Flight], todo: Iterator[int]) -> Batch | None:
        """`_advance` in the loader's own thread."""
        if self._closing is not None:
            raise RuntimeError("the loader is closed")
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        call = self._caller.submit(self._advance, pending, todo, stream)
        began = time.monotonic()
        check: StallCheck | None = None
        suspects: list[bytes] = []
        while True:
            with suppress(NotYet):
                return call.result(_SLICE)
            if call.done():  # in the meantime; or its own error is one that means "not yet", too
                return call.result()
            if self._options.stopping is not None and self._options.stopping():
                raise LoaderStopped
            waited = time.monotonic() - max(began, self._log.latest)
            if check is not None:
                suspects = check.suspects() or suspects
            if waited > min(_PATIENCE, self._options.timeout / 10) and (check is None or not check.is_alive()):
                check = StallCheck(self._awaited(pending))
            if waited > self._options.timeout:
                raise LoaderTimeoutError(self._stalled(suspects, self._awaited(pending), waited))

    def _advance(self, pending: deque[Flight], todo: Iterator[int], stream: torch.cuda.Stream | None) -> Batch | None:
        """The next batch, None after the last one, with `prefetch` in flight behind it."""
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for step in islice(todo, self._options.prefetch - len(pending)):
                pending.append(self._submit(step))
            if not pending:
                return None
            batch = self._collect(pending)
            for step in islice(todo, 1):
                pending.append(self._submit(step))
            return batch

    def _forget(self, pending: deque[Flight]) -> None:
        with nullcontext() if self._device.type != "cuda" else torch.cuda.device(self._device):
            self._abandon(pending)
        pending.clear()

    def _awaited(self, pending: deque[Flight]) -> list[bytes]:
        """The files that are being read; where only the decoder knows, those of all batches in flight."""
        images = self._log.images() or [i for flight in pending.copy() for i in flight.views.indices.tolist()]
        return [self._index.file_of(i) for i in images]

    def _stalled(self, suspects: list[bytes], awaited: list[bytes], waited: float) -> str:
        path = printable(os.fsdecode((suspects or awaited or [os.fsencode(self._index.root)])[0]))
        others = "" if suspects or len(awaited) < 2 else f" or one of {len(awaited) - 1} other files"
        return (
            f"{path}{others}: cannot be read: no image has come for {waited:.0f} s; mend the file or its disk and "
            "start again, or allow for more with --loader-timeout SECONDS"
        )

    @abstractmethod
    def _submit(self, step: int) -> Flight:
        """Start work on the batch of a step."""

    @abstractmethod
    def _collect(self, pending: deque[Flight]) -> Batch:
        """Take the first submitted batch off `pending` and finish it."""

    @abstractmethod
    def _abandon(self, pending: deque[Flight]) -> None:
        """Give up what is in flight: the consumer left early, or something failed."""

    def _batch(self, images: torch.Tensor, shown: np.ndarray, views: BatchViews) -> Batch:
        """`shown`: the images in it, which differ from the planned `views` where one was replaced."""
        self._broken.views += int((shown != views.indices).sum())
        indices = torch.from_numpy(shown)
        targets = self._steps.targets(views, shown)
        if targets is not None:
            ids, probabilities = (self._to_device(torch.from_numpy(part)) for part in targets)
        return Batch(
            images,
            self._to_device(self._labels[indices]),
            self._to_device(indices),
            None if targets is None else (ids, probabilities),
        )

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def close(self) -> None:
        """Stops the loader's threads. Returns within a few seconds even where one is blocked: `stuck` says so then."""
        if self._closing is not None:
            return
        self._closing = threading.Thread(target=self._close, name=_CLOSING, daemon=True)
        self._closing.start()
        deadline = time.monotonic() + min(_PATIENCE, self._options.timeout)
        while self._closing.is_alive() and time.monotonic() < deadline:
            self._closing.join(0.5)
            if self._closing.is_alive():  # DALI, say, at a pipe of a batch that no one waits for any more
                StallCheck(self._awaited(self._pending))

    def _close(self) -> None:
        """Waits for the threads and the decoder, for ever where one is blocked."""
        self._pool.cancel()
        self._caller.close()
        self._pool.close()
        self._forget(self._pending)
        self._steps.close()
