"""How each teacher runs fastest on this device: memory format, dtype, compiled or not, found by measuring.

No rule of thumb holds: channels-last is slower for EfficientNet-B4 on some GPUs and faster for ResNets on all, bfloat16
is slower than float32 on CPUs without instructions for it. What was found is remembered in the user's cache folder.

Shape legend: B images of this process's part of a step, H and W pixels.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch

from mealfast.machine.files import read_object, write_json

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORTHWHILE = 1.03  # a layout must be this much faster than the default: differences below are noise
_LONG = 10.0  # seconds of measuring after which one layout's time is taken as known
ENOUGH = 300.0  # seconds, compiling included, after which no further layout of a teacher is tried


@dataclass(frozen=True)
class Layout:
    """What one teacher computes in."""

    memory_format: str  # of FORMATS
    dtype: str  # of DTYPES
    compiled: bool

    def __str__(self) -> str:
        return f"{self.memory_format}, {self.dtype}, {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Choice:
    """The layout that a teacher runs in, and images/s of this process for every layout that was tried."""

    layout: Layout
    images_per_second: dict[str, float]
    remembered: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"layout": asdict(self.layout), "images_per_second": self.images_per_second}


def is_layout(content: Any) -> bool:
    """Whether what a file holds is a Layout's fields."""
    if not isinstance(content, dict) or content.keys() != {"memory_format", "dtype", "compiled"}:
        return False
    known = str(content["memory_format"]) in FORMATS and str(content["dtype"]) in DTYPES
    return known and isinstance(content["compiled"], bool)


def default_layout(dtype: str, compile: bool) -> Layout:
    return Layout("channels_last", dtype, compile)


def choose(measure: Callable[[Layout], float], default: Layout, device: torch.device, batch: int) -> Choice:
    """The fastest layout, changing one thing at a time from the default; `measure` gives a layout's seconds."""
    began = time.perf_counter()
    best = default
    seconds = {best: measure(best)}
    for changes in _alternatives(default, device):
        if time.perf_counter() - began > ENOUGH:
            break
        layout = replace(best, **changes)
        seconds[layout] = measure(layout)
        if seconds[layout] * WORTHWHILE < seconds[best]:
            best = layout
    return Choice(best, {str(layout): round(batch / value, 2) for layout, value in seconds.items()})


def _alternatives(default: Layout, device: torch.device) -> Iterator[dict[str, Any]]:
    yield {"memory_format": "contiguous"}
    # A GPU that has the dtype is never faster in float32, and trying costs another compilation.
    if default.dtype != "float32" and device.type == "cpu":
        yield {"dtype": "float32"}
    if default.compiled:
        yield {"compiled": False}


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, warmed up; the device's work included."""

    def once() -> float:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    times = [once()]  # compiles, picks algorithms
    began = time.perf_counter()
    while len(times) < 6 and time.perf_counter() - began < _LONG:
        times.append(once())
    return statistics.median(times[1:] or times)


class LayoutStore:
    """Remembered choices: one JSON file for all runs of a user. A damaged one is made anew."""

    def __init__(self, path: Path | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = path or Path(home) / "mealfast" / "teacher-layouts.json"

    def get(self, key: str, compile: bool) -> Choice | None:
        """What is known for a key; None where nothing is, or nothing that can be used."""
        entry = self._read().get(key)
        with suppress(TypeError, KeyError, ValueError, AttributeError):
            layout = Layout(**entry["layout"]) if is_layout(entry["layout"]) else None
            rates = {str(name): float(rate) for name, rate in entry["images_per_second"].items()}
            if layout is not None and layout.compiled in (False, compile):
                return Choice(layout, rates, remembered=True)
        return None

    def put(self, key: str, choice: Choice) -> None:
        """Remembers; a folder that cannot be written costs only the memory."""
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self._read(), key: choice.to_json()})

    def _read(self) -> dict[str, Any]:
        try:
            return read_object(self.path)
        except (OSError, ValueError):
            return {}


def key_of(spec: str, images: torch.Tensor, device: torch.device, default: Layout) -> str:
    """What a choice depends on: device, model, images [B, H, W, 3], the layout it starts from, versions."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    )
    model = spec.partition("@")[0]  # the weights decide nothing here
    shape = "x".join(map(str, images.shape[:3]))
    versions = f"torch {torch.__version__} timm {timm.__version__}"
    return " | ".join((name, model, shape, default.dtype, "compile" if default.compiled else "eager", versions))
