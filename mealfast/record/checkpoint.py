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
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mealfast.errors import UsageError
from mealfast.machine.files import replacing, sync_folder
from mealfast.models import weights

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")
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
    """Publishes what `encode` gave; then only the `keep` newest stay. `best` makes best.pt the same file.

    Those of later steps go: a run that went back, past a damaged file or by --resume PATH, has left them behind. So do
    others of this step: it was written before it was evaluated.
    Raises OSError, and then leaves nothing behind; InterruptedError if `abandoned` says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as scratch:
        temporary = Path(scratch) / "checkpoint.pt"
        with temporary.open("wb") as file:
            for first in range(0, len(content), _BLOCK):
                if abandoned():
                    raise InterruptedError("abandoned")
                file.write(content[first : first + _BLOCK])
            file.flush()
            os.fsync(file.fileno())
        if best:  # before the checkpoint that says so: a run killed between the two evaluates and marks again
            mark_best(temporary, folder)
        temporary.replace(path)
    sync_folder(folder)
    found = candidates(folder)
    gone = [other for other in found if step_of(other) > step or (step_of(other) == step and other != path)]
    for old in [*gone, *[other for other in found if other not in gone][keep:]]:
        old.unlink(missing_ok=True)
    return path


def save(folder: Path, step: int, state: dict[str, Any], keep: int, *, best: bool = False) -> Path:
    """`encode` and `write` in one."""
    return write(folder, step, encode(step, state), keep, best=best)


def mark_best(path: Path, folder: Path | None = None) -> None:
    """Makes `best.pt` in a folder, by default beside a checkpoint, the same file (a hard link; a copy where the file
    system has none)."""
    with replacing((folder or path.parent) / "best.pt") as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(match[1])


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with its content; a damaged one is named on stderr and passed over."""
    for path in candidates(folder):
        match = _NAME.fullmatch(path.name)
        if match and _digest(path) == match[2]:
            return path, _content(path)
        print(f"mealfast: warning: {path} is damaged (checksum): passing over it", file=sys.stderr)
    return None


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors and plain values only. Raises UsageError if it is no mealfast checkpoint."""
    if not path.is_file():
        raise UsageError(f"--resume {path}: no such file")
    if (match := _NAME.fullmatch(path.name)) and _digest(path) != match[2]:
        raise UsageError(f"--resume {path}: is damaged (checksum); name another, or use --resume auto")
    return _content(path)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = weights.torch_load(path)
    except Exception as error:
        raise UsageError(f"--resume {path}: cannot be read ({weights.why_unreadable(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"--resume {path}: is no mealfast checkpoint (one lies in a run directory's checkpoints/)")
    step = content.get("step")
    if type(step) is not int or not 0 <= step < 2**53:
        raise UsageError(f"--resume {path}: is damaged (its step is {step!r:.50})")
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
