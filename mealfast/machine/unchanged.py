"""Leaves a caller's process as it was: for work that is a part of somebody's program."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch


@contextmanager
def unchanged() -> Iterator[None]:
    """Within the block random numbers, arithmetic on GPUs, the current GPU, the number of threads and the warnings that
    are shown may be set; afterwards they are as before: Python's, NumPy's and torch's, whatever ended the block."""
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    # A GPU that nobody has used yet has no state to keep, and looking would start it.
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    current = torch.cuda.current_device() if gpus else None
    flags = _flags()
    try:
        with torch.random.fork_rng(devices=gpus), warnings.catch_warnings():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for module, name, value in flags:
            setattr(module, name, value)
        if current is not None:
            torch.cuda.set_device(current)


def _flags() -> list[tuple[Any, str, bool]]:
    """What `mealfast.machine.processes` sets on a machine with GPUs, as it is now."""
    found = []
    for module, name in (
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "benchmark"),
    ):
        with suppress(RuntimeError):  # torch refuses to say where its newer settings were used
            found.append((module, name, getattr(module, name)))
    return found
