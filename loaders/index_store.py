"""The stored image index: one .npz file of plain arrays, written in one piece, believed only where the tree agrees."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .files import replacing

NAME = ".mealfast-index.npz"
VERSION = 2
# Array name -> dtype, bytes a file. `paths` and `reasons` are UTF-8 or raw path bytes, each ended by a NUL.
_COLUMNS = {
    "bytes": np.int64,
    "mtimes": np.int64,
    "widths": np.int32,
    "heights": np.int32,
    "bits": np.uint8,
    "shards": np.int32,
    "offsets": np.int64,
}
_TEXTS = ("paths", "reasons")


@dataclass(frozen=True)
class Stored:
    """What probing found, a row for each file listed, the unusable ones included."""

    paths: list[bytes]
    reasons: list[str]  # empty for a usable file
    bytes: np.ndarray  # int64 [N]
    mtimes: np.ndarray  # int64 [N], nanoseconds
    widths: np.ndarray  # int32 [N], 0 where unusable
    heights: np.ndarray  # int32 [N]
    bits: np.ndarray  # uint8 [N], of probe.py
    shards: np.ndarray  # int32 [N], of packed data: the number of the file that holds the image
    offsets: np.ndarray  # int64 [N], of packed data: where the image begins in it


def store_paths(root: Path, cache_dir: Path | None) -> list[Path]:
    """Where the index of `root` may lie, in the order to try."""
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    if cache_dir is not None:
        return [Path(cache_dir) / f"index-{key}.npz"]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [root / NAME, Path(home) / "mealfast" / f"index-{key}.npz"]


def load(path: Path) -> Stored | None:
    """The stored index, or None where there is none that can be used."""
    try:
        return _load(path)
    except Exception:  # NumPy and zipfile raise anything of a damaged file: TokenError, struct.error, RuntimeError, ...
        return None  # absent, of another version or damaged: a new scan replaces it


def _load(path: Path) -> Stored | None:
    arrays = _read_arrays(path)
    if arrays is None:
        return None
    paths = arrays["paths"].tobytes().split(b"\0")[:-1]
    reasons = arrays["reasons"].tobytes().decode().split("\0")[:-1]
    if {len(reasons), *(len(arrays[name]) for name in _COLUMNS)} != {len(paths)}:
        return None
    usable = np.array([not reason for reason in reasons], bool)
    if min(arrays["widths"][usable].min(initial=1), arrays["heights"][usable].min(initial=1)) < 1:
        return None
    return Stored(paths, reasons, **{name: arrays[name] for name in _COLUMNS})


def _read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    length = os.path.getsize(path)
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for name, dtype in {"version": np.int64, **_COLUMNS, **dict.fromkeys(_TEXTS, np.uint8)}.items():
            info = archive.getinfo(name + ".npy")
            # Stored uncompressed, so an array can be no longer than the file: checked before memory is taken.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > length:
                return None
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):
                    return None
                shape, fortran, found = np.lib.format.read_array_header_1_0(member)
                if found != dtype or fortran or len(shape) != 1 or shape[0] * found.itemsize > info.file_size:
                    return None
                data = member.read(shape[0] * found.itemsize)
            arrays[name] = np.frombuffer(data, dtype)
            if len(arrays[name]) != shape[0]:
                return None
    return arrays if arrays["version"].tolist() == [VERSION] else None


def save(stored: Stored, path: Path) -> bool:
    """Write the index in one piece (a reader sees the old or the new one); False where the place is not writable."""
    try:
        columns: dict[str, Any] = {name: np.asarray(getattr(stored, name), dtype) for name, dtype in _COLUMNS.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                version=np.array([VERSION], np.int64),
                paths=_text(stored.paths),
                reasons=_text([reason.encode() for reason in stored.reasons]),
                **columns,
            )
        return True
    except OSError:
        return False


def _text(parts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(part + b"\0" for part in parts), np.uint8)
