"""Checkpoints written beside the training: the loop pays for a copy of the state, a thread does the rest."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mealfast.record import checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread. Only the main process has one.

    A checkpoint that the disk does not take costs a warning: the run goes on, and the next one tries again.
    """

    def __init__(
        self, folder: Path, keep: int, say: Callable[[str], None], before: Callable[[], None] = lambda: None
    ) -> None:
        """`say` is given warnings, in the thread; `before` is called there before each checkpoint is published."""
        self.failure: str | None = None  # why the latest checkpoint is not on the disk
        self._folder, self._keep, self._say, self._before = folder, keep, say, before
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._owed_best: tuple[int, dict[str, Any]] | None = None  # what best.pt should hold and does not yet
        self._abandoned = False

    def save(self, step: int, state: dict[str, Any], *, best: bool) -> None:
        """Copies `state`, and has it written. Waits first for the checkpoint before, where that is not done yet."""
        self.wait()
        copied, ready = snapshot(state)
        self._thread = threading.Thread(
            target=self._work, args=(step, copied, ready, best), name="mealfast-checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Returns when nothing is left to write. Raises what the thread met, a disk's refusal apart."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def abandon(self, seconds: float) -> None:
        """Has the thread drop what it writes, and waits as long for that at most."""
        self._abandoned = True
        if self._thread is not None:
            self._thread.join(seconds)

    def _work(self, step: int, state: dict[str, Any], ready: torch.cuda.Event | None, best: bool) -> None:
        try:
            self._write(step, to_cpu(state, ready), best)
        except BaseException as error:  # for the main thread to raise
            self._error = error

    def _write(self, step: int, state: dict[str, Any], best: bool) -> None:
        content = checkpoint.encode(step, state)
        if best:
            self._owed_best = (step, state)
        self._before()
        try:
            if self._owed_best is not None and not best:  # first: the checkpoint will say that it is there
                checkpoint.write_best(self._folder, checkpoint.encode(*self._owed_best), lambda: self._abandoned)
                self._owed_best = None
            checkpoint.write(self._folder, step, content, self._keep, best=best, abandoned=lambda: self._abandoned)
        except InterruptedError:
            return
        except OSError as error:
            known, self.failure = self.failure, f"{self._folder}: {error.strerror or error}"
            if known is None:
                self._say(
                    f"warning: the checkpoint of step {step} is not written: {self.failure}; needs {len(content):,} "
                    f"bytes{_free(self._folder)}; the run goes on, and the next checkpoint tries again"
                )
            return
        self._owed_best = None
        if self.failure is not None:
            self._say(f"the checkpoint of step {step} is written: {self._folder}")
        self.failure = None


def snapshot(state: Any) -> tuple[Any, torch.cuda.Event | None]:
    """A copy of a state, each tensor where it is, that later steps do not change; on a GPU it is ready at the event.

    The device copies 200 MB (ResNet-50 and its momentum) in less than a millisecond and the host does not wait.
    """
    on_gpu: list[torch.device] = []

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_cuda:
            return tensor.detach().clone()
        on_gpu.append(tensor.device)
        try:
            return tensor.detach().clone()
        except torch.cuda.OutOfMemoryError:
            return tensor.detach().cpu()

    copied = _map(copy, state)
    if not on_gpu:
        return copied, None
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(on_gpu[0]))
    return copied, ready


def to_cpu(state: Any, ready: torch.cuda.Event | None) -> Any:
    """A snapshot's tensors on the CPU, brought there beside the training, on a stream of their own."""
    if ready is None:
        return state
    device = next(tensor.device for tensor in _tensors(state) if tensor.is_cuda)
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            state = _map(torch.Tensor.cpu, state)
        stream.synchronize()
    return state


def _map(function: Callable[[torch.Tensor], torch.Tensor], state: Any) -> Any:
    """The same containers with `function` of every tensor."""
    if isinstance(state, torch.Tensor):
        return function(state)
    if isinstance(state, dict):
        mapped = type(state)((key, _map(function, value)) for key, value in state.items())
        if hasattr(state, "_metadata"):  # of a module's state dict: the versions of its layers
            setattr(mapped, "_metadata", state._metadata)  # noqa: B010  (a dictionary that has attributes)
        return mapped
    if isinstance(state, (list, tuple)):
        return type(state)(_map(function, value) for value in state)
    return state


def _tensors(state: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _map(note, state)
    return found


def _free(folder: Path) -> str:
    try:
        return f", {shutil.disk_usage(folder).free:,} are free"
    except OSError:
        return ""
