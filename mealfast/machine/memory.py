"""Memory of this process's device: the peak, and how large a batch would fill it."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from mealfast.errors import RunError


class Peak:
    """Bytes in use at the peak since this was made: of the GPU's allocator, or of the process on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError):  # Linux: the high-water mark falls to what is in use now
                Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS") or 0

    def bytes(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def capacity(device: torch.device) -> int | None:
    """Bytes that this process may use in all, of the GPU or of the machine; None where that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    available = _kibibytes("/proc/meminfo", "MemAvailable")
    return None if available is None else available + (_status("VmRSS") or 0)


def largest_batch(peak: int, fixed: int, batch: int, capacity: int) -> int | None:
    """Images that fit, where `batch` images need `peak` bytes, `fixed` of them for no image: nine tenths of the rest.

    None where the batch is too small to tell (images took less than the measurement's error).
    """
    each = (peak - fixed) / batch
    return int(0.9 * (capacity - fixed) / each) if each * batch > 0.02 * peak else None


@contextmanager
def enough(device: torch.device, advice: str) -> Iterator[None]:
    """Within it a device's full memory is one line, with the peak, the capacity and `advice`: what to change. Raises
    RunError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        figures = ""
        if device.type == "cuda":
            peak, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
            figures = f" ({peak / 2**30:.1f} GiB at the peak, of {whole / 2**30:.1f} GiB)"
        raise RunError(f"the memory of {device} is too small for this{figures}: {advice}") from error


def _status(name: str) -> int | None:
    return _kibibytes("/proc/self/status", name)


def _kibibytes(path: str, name: str) -> int | None:
    """Bytes behind a name in one of Linux's tables; None where there is none."""
    with suppress(OSError):
        if found := re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return None
