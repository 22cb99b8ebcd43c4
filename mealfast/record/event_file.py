"""TensorBoard's event files, written by the hand that writes the metrics.

torch's SummaryWriter writes from a thread of its own that dies of a full disk, with all that it held.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from mealfast.machine.append_log import AppendLog

_EDGES = 1e-12 * 1.1 ** np.arange(775)  # to 1e20, as torch's SummaryWriter has them
_BINS = np.concatenate((-_EDGES[::-1], [0.0], _EDGES))
_numbers = itertools.count()  # two runs of one process in one second need two names


class Board:
    """An event file in a folder. Scalars, histograms and images of optimiser steps."""

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], None]) -> None:
        """Starts at `first_step`: TensorBoard forgets what an earlier process wrote of it and of later ones."""
        folder.mkdir(parents=True, exist_ok=True)
        resumed = any(folder.iterdir())
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._log = AppendLog(folder / name, say)
        self._records = RecordWriter(self._log)
        self._add(file_version="brain.Event:2")
        if resumed:
            self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        self._add(step=step, summary=summary.scalar(name, value))

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """Of a tensor on the CPU, of any shape; one that is not finite has none."""
        if torch.isfinite(values).all():
            within = np.clip(values.numpy(), _BINS[0], _BINS[-1])  # with none there torch refuses to make one
            self._add(step=step, summary=summary.histogram(name, within, _BINS))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """uint8 [H, W, 3]."""
        self._add(step=step, summary=summary.image(name, pixels, dataformats="HWC"))

    def close(self) -> int:
        """Returns how many bytes could not be written."""
        return self._log.close()

    def _add(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
