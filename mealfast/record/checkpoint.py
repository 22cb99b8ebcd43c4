"""Checkpoints: written whole or not at all, checked when read, never run as code.

`step-00001000-3f2a9c1d5e6f7a8b.pt` carries the first 16 hex digits of its SHA-256 in its name: one rename publishes
file and checksum together.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mealfast.errors import UsageError
from mealfast.machine import terminal
from mealfast.machine.files import brief, replacing, shown, sync_folder
from mealfast.models.torch_files import is_whole, torch_load, why_unreadable

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")
BEST = "best.pt"  # the checkpoint of the best evaluation
FORMAT = "mealfast-checkpoint-1"
_BLOCK = 1 << 22  # bytes read or written at a time


def encode(step: int, state: dict[str, Any]) -> memoryview:
    """The bytes of the checkpoint of `step` optimiser steps: in memory, so that a full disk is met in one place."""
    content = io.BytesIO()
    torch.save({"format": FORMAT, "step": step, **state}, content)
    return content.getbuffer()


def write(
    folder: Path,
    step: int,
    content: memoryview,
    keep: int,
    *,
    best: bool = False,
    abandoned: Callable[[], bool] = lambda: False,
) -> Path:
    """Publishes what `encode` gave; then only the `keep` newest stay. `best` writes it as best.pt too.

    Those of later steps go: a run that went back, past a damaged file or by --resume PATH, has left them behind. So do
    others of this step: it was written before it was evaluated.
    Raises OSError, and then leaves nothing behind; InterruptedError if `abandoned` says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as scratch:
        temporary = Path(scratch) / "checkpoint.pt"
        _write(temporary, content, abandoned)
        if best:  # before the checkpoint that says so: a run killed between the two evaluates and marks again
            write_best(folder, content, abandoned)
        temporary.replace(path)
    sync_folder(folder)
    found = candidates(folder)
    gone = [other for other in found if step_of(other) > step or (step_of(other) == step and other != path)]
    for old in [*gone, *[other for other in found if other not in gone][keep:]]:
        old.unlink(missing_ok=True)
    return path


def write_best(folder: Path, content: memoryview, abandoned: Callable[[], bool] = lambda: False) -> None:
    """Makes best.pt of what `encode` gave: a file of its own, which no damage to another checkpoint reaches.

    Raises as `write` does.
    """
    with replacing(folder / BEST) as temporary:
        _write(temporary, content, abandoned)


def _write(path: Path, content: memoryview, abandoned: Callable[[], bool]) -> None:
    with path.open("wb") as file:
        for first in range(0, len(content), _BLOCK):
            if abandoned():
                raise InterruptedError("abandoned")
            file.write(content[first : first + _BLOCK])
        file.flush()
        os.fsync(file.fileno())


def save(folder: Path, step: int, state: dict[str, Any], keep: int, *, best: bool = False) -> Path:
    """`encode` and `write` in one."""
    return write(folder, step, encode(step, state), keep, best=best)


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)


def step_of(path: Path) -> int:
    """Optimiser steps before the checkpoint of that name. Raises ValueError where it is not one's."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(match[1])


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with its content; a damaged one is named on stderr and passed over.

    None where there is no checkpoint. Raises UsageError where all are damaged: it names best.pt if that is whole.
    """
    found = candidates(folder)
    for path in found:
        with suppress(OSError):  # a disk that does not give it
            if _is_sound(path):
                return path, _content(path)
        terminal.say(f"mealfast: warning: {brief(str(path))} is damaged (checksum): passing over it")
    if not found:
        return None
    best = folder / BEST
    try:
        step = read(best)["step"]
    except UsageError:
        raise UsageError(
            f"{brief(str(folder))}: every checkpoint is damaged; start anew in another --run-dir"
        ) from None
    raise UsageError(
        f"{brief(str(folder))}: every checkpoint is damaged but {BEST}, that of the best evaluation: go on from there, "
        f"after {step} steps, by --resume {best}"
    )


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors and plain values only. Raises UsageError if it is no mealfast checkpoint."""
    what = f"--resume {brief(str(path))}"
    try:
        if not path.is_file():
            raise UsageError(f"{what}: no such file")
        if not _is_sound(path):
            raise UsageError(f"{what}: is damaged (checksum); name another, or use --resume auto")
    except OSError as error:
        raise UsageError(f"{what}: cannot be read ({error.strerror})") from error
    return _content(path)


def _is_sound(path: Path) -> bool:
    """Whether the checksum is right: that of the name, or within best.pt; True for other names. Raises OSError."""
    match = _NAME.fullmatch(path.name)
    return _digest(path) == match[2] if match else path.name != BEST or is_whole(path)


def _content(path: Path) -> dict[str, Any]:
    what = f"--resume {brief(str(path))}"
    try:
        content = torch_load(path)
    except Exception as error:
        raise UsageError(f"{what}: cannot be read ({why_unreadable(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{what}: is no mealfast checkpoint (one lies in a run directory's checkpoints/)")
    step = content.get("step")
    if type(step) is not int or not 0 <= step < 2**53:
        raise UsageError(f"{what}: is damaged (its step is {shown(step)})")
    return content


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of a process that was killed while it wrote. Only the main process may call it."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".writing-"):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(".") and path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha.update(block)
    return sha.hexdigest()[:16]
