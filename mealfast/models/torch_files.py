"""Files of `torch.save`, read without running their code, and not before what they claim has been weighed.

`weights_only=True` keeps code from running. It does not keep a file of a few kilobytes from taking minutes or all the
memory: compressed parts, a tensor that claims more values than there are, a hundred thousand calls that each copy a
long string. So the pickle within is first followed step by step, with its calls only looked at.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mealfast.machine.files import reason
from mealfast.models.pickle_check import (
    CLAIMS,
    CODE,
    DAMAGED,
    FOREIGN,
    LARGE,
    LARGEST_PICKLE,
    MOST_ELEMENTS,
    PickleCheck,
    UnreadableError,
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def torch_load(path: str | os.PathLike[str]) -> Any:
    """The content of a file of `torch.save`, old (pickles) or new (zip): tensors on the CPU and plain values.

    timm's training files hold an argparse.Namespace too, and what `torch.serialization.safe_globals` allows is allowed.
    Raises UnreadableError, OSError and whatever torch raises: see
    `why_unreadable`.
    """
    _check(Path(path), _safe_globals())
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    _check_elements(content)
    return content


def why_unreadable(error: Exception) -> str:
    """One line for what reading a weights file has raised; torch's own speaks of its options."""
    said = str(error)
    if isinstance(error, UnreadableError):
        return said
    if "GLOBAL" in said:
        return CODE
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in said:
        return FOREIGN
    if "PytorchStreamReader" in said or isinstance(error, zipfile.BadZipFile):  # a paragraph on the zip library within
        return DAMAGED
    return reason(error)


def is_whole(path: Path) -> bool:
    """Whether every part of a zip file of `torch.save` has the checksum that stands beside it. torch does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError):
        return False


def _safe_globals() -> frozenset[str]:
    """What the caller has let torch's reader call besides, each as "module name"."""
    named = [one if isinstance(one, tuple) else (one, "") for one in torch.serialization.get_safe_globals()]
    names = [name or f"{function.__module__}.{function.__qualname__}" for function, name in named]
    return frozenset(" ".join(name.rsplit(".", 1)) for name in names)


def _check(path: Path, allowed: Collection[str] = ()) -> None:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        try:
            _check_zip(file, allowed) if is_zip else _check_pickles(file, allowed)
        except (UnreadableError, OSError, MemoryError):
            raise
        except Exception as error:  # bytes that only look like one of these formats can raise anything
            raise UnreadableError(DAMAGED if is_zip else FOREIGN) from error


def _check_zip(file: BinaryIO, allowed: Collection[str]) -> None:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        parts = {part.filename: part for part in archive.infolist()}
        if len(parts) < len(archive.infolist()):
            raise UnreadableError(DAMAGED)
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts.values()):
            raise UnreadableError("its parts are compressed, which torch.save's never are")
        if sum(part.file_size for part in parts.values()) > size:
            raise UnreadableError(CLAIMS)
        pickles = [name for name in parts if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnreadableError(FOREIGN)
        if parts[pickles[0]].file_size > LARGEST_PICKLE:
            raise UnreadableError(LARGE)
        data = pickles[0].removesuffix(".pkl") + "/"
        storages = {name.removeprefix(data): part.file_size for name, part in parts.items() if name.startswith(data)}
        PickleCheck(storages, allowed).follow(io.BytesIO(archive.read(pickles[0])))


def _check_pickles(file: BinaryIO, allowed: Collection[str]) -> None:
    """The format before torch 1.6: a magic number, a version, the machine, the content, keys; then the storages."""
    start = io.BytesIO(file.read(LARGEST_PICKLE + 1))
    followed = PickleCheck(None, allowed)
    try:
        for number in range(5):
            value = followed.follow(start)
            if number == 0 and value != _LEGACY_MAGIC:
                raise UnreadableError(FOREIGN)
    except Exception as error:
        if start.tell() > LARGEST_PICKLE:
            raise UnreadableError(LARGE) from error
        raise
    if sum(followed.claimed.values()) > os.fstat(file.fileno()).st_size:
        raise UnreadableError(CLAIMS)


def _check_elements(content: object) -> None:
    """Refuses containers that hold one another so often that whoever goes through them does not come to an end."""
    left, todo = MOST_ELEMENTS, [content]
    while todo:
        one = todo.pop()
        if isinstance(one, argparse.Namespace):
            one = vars(one)
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple, set)) else ()
        left -= len(inner)
        if left < 0:
            raise UnreadableError(LARGE)
        todo.extend(inner)
