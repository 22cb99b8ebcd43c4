"""What two runs are compared by: their last checkpoints and metrics, bit for bit."""

import json
import threading
from pathlib import Path
from typing import NoReturn

import torch

from mealfast.record import checkpoint

SPEEDS = ("images_per_second", "data_wait_fraction")  # all of a line that may differ between equal runs


def die() -> NoReturn:
    """Ends a run as SIGKILL would between two checkpoints: what is being written is done, and nothing more is saved."""
    for thread in threading.enumerate():
        if thread.name == "mealfast-checkpoint":
            thread.join()
    raise KeyboardInterrupt


def last(run_dir: str | Path) -> dict:
    """The newest checkpoint's content."""
    return checkpoint.newest(Path(run_dir) / "checkpoints")[1]


def lines(run_dir: str | Path) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def lines_but_speeds(run_dir: str | Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines(run_dir)]


def differences(ours, theirs, place: str = "") -> list[str]:
    """Where two checkpoints differ, to the bit."""
    if isinstance(ours, torch.Tensor):
        same = isinstance(theirs, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(ours, dict) and isinstance(theirs, dict):
        missing = [f"{place}/{key}" for key in ours.keys() ^ theirs.keys()]
        return missing + [
            d for key in ours.keys() & theirs.keys() for d in differences(ours[key], theirs[key], f"{place}/{key}")
        ]
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        return [d for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) for d in differences(a, b, f"{place}/{n}")]
    else:
        same = ours == theirs
    return [] if same else [place]


def assert_same_run(ours: str | Path, theirs: str | Path) -> None:
    a, b = last(ours), last(theirs)
    for content in (a, b):
        del content["recipe"]  # where the run lies, and how far it was told to go
    assert differences(a, b) == []
    assert lines_but_speeds(ours) == lines_but_speeds(theirs)
    student = "student.safetensors"
    assert (Path(ours) / student).read_bytes() == (Path(theirs) / student).read_bytes()
    best = [checkpoint.read(Path(run) / "checkpoints" / "best.pt") for run in (ours, theirs)]
    assert best[0]["step"] == best[1]["step"]
    assert differences(best[0]["student"], best[1]["student"]) == []
