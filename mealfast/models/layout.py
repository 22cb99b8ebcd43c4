"""How each teacher runs fastest on this device: memory format, compiled or not, found by measuring.

No rule of thumb holds: channels-last is slower for EfficientNet-B4 on some GPUs and faster for ResNets on all. What was
found is remembered in the user's cache folder. The dtype is not measured, so that no passing load of the machine
decides what targets are made of: device and accuracy do (see tuning.py).

Shape legend: B images of this process's part of a step, H and W pixels.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch

from mealfast.machine.files import read_object, write_json

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORTHWHILE = 1.03  # so much faster must a layout be than the one before it, in a round that counts for it
ROUNDS = 8  # in each both are timed, one right after the other: what else the machine does hits both
_LEAST_ROUNDS = 3
_LONG = 20.0  # seconds of rounds after which those that there are must do
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
    """The layout that a teacher runs in, and what was measured of those that were tried."""

    layout: Layout
    images_per_second: dict[str, float]  # of this process, medians
    # Of each layout but the default: in how many rounds it was WORTHWHILE faster than the best before it, of how many.
    faster_in: dict[str, tuple[int, int]] = field(default_factory=dict)
    remembered: bool = False

    def to_json(self) -> dict[str, Any]:
        """For config.json and the memory of layouts."""
        return {
            "layout": asdict(self.layout),
            "images_per_second": self.images_per_second,
            "faster_in": {name: list(rounds) for name, rounds in self.faster_in.items()},
        }


def is_layout(content: object) -> bool:
    """Whether what a file holds is a Layout's fields."""
    if not isinstance(content, dict) or content.keys() != {"memory_format", "dtype", "compiled"}:
        return False
    known = str(content["memory_format"]) in FORMATS and str(content["dtype"]) in DTYPES
    return known and isinstance(content["compiled"], bool)


def default_layout(dtype: str, compile: bool) -> Layout:
    """Channels-last, in a dtype of DTYPES."""
    return Layout("channels_last", dtype, compile)


Timed = Callable[[], float]  # runs a teacher once; seconds


def choose(prepare: Callable[[Layout], Timed], default: Layout, batch: int) -> Choice:
    """The default, or a layout that is faster beyond the noise seen, changing one thing at a time.

    `prepare` gives a layout's timed call, warmed up, on `batch` images. In each round the two that are compared are
    timed one after the other, in changing order. The default stays unless the other is WORTHWHILE faster in all rounds
    but one of eight: by chance alone that happens once in 28.
    """
    began = time.perf_counter()
    best, timed = default, prepare(default)
    seconds = {default: [timed()]}
    faster: dict[str, tuple[int, int]] = {}
    for changes in _alternatives(default):
        if time.perf_counter() - began > ENOUGH:
            break
        layout = replace(best, **changes)
        other = prepare(layout)
        pairs = _rounds(timed, other)
        seconds[best] += [before for before, _ in pairs]
        seconds[layout] = [after for _, after in pairs]
        won = sum(after * WORTHWHILE < before for before, after in pairs)
        faster[str(layout)] = won, len(pairs)
        if won >= len(pairs) - len(pairs) // ROUNDS:
            best, timed = layout, other
    rates = {str(layout): round(batch / statistics.median(times), 2) for layout, times in seconds.items()}
    return Choice(best, rates, faster)


def _rounds(one: Timed, other: Timed) -> list[tuple[float, float]]:
    pairs: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(pairs) < ROUNDS and (len(pairs) < _LEAST_ROUNDS or time.perf_counter() - began < _LONG):
        if len(pairs) % 2 == 0:
            before = one()
            pairs.append((before, other()))
        else:
            after = other()
            pairs.append((one(), after))
    return pairs


def _alternatives(default: Layout) -> Iterator[dict[str, Any]]:
    yield {"memory_format": "contiguous"}
    if default.compiled:
        yield {"compiled": False}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


class LayoutStore:
    """Remembered choices: one JSON file for all runs of a user. A damaged one is made anew."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: None: in the user's cache folder ($XDG_CACHE_HOME)."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = path or Path(home) / "mealfast" / "teacher-layouts.json"

    def get(self, key: str, default: Layout) -> Choice | None:
        """What is known for a key; None where nothing is, or nothing that could come of `default`."""
        entry: Any = self._read().get(key)
        with suppress(TypeError, KeyError, ValueError, AttributeError):
            layout = Layout(**entry["layout"]) if is_layout(entry["layout"]) else None
            rates = {str(name): float(rate) for name, rate in entry["images_per_second"].items()}
            # Not in what versions wrote that measured each layout once: it can be wrong.
            faster = {str(name): (int(won), int(rounds)) for name, (won, rounds) in entry["faster_in"].items()}
            if layout is not None and layout.dtype == default.dtype and layout.compiled in (False, default.compiled):
                return Choice(layout, rates, faster, remembered=True)
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
