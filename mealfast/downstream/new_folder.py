"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mealfast.errors import UsageError
from mealfast.machine.files import brief, sync_folder


def check_new(path: Path) -> None:
    """Refuses a place where something is already: a file, or a folder that is not empty. Raises UsageError."""
    try:
        if path.is_dir():
            if any(path.iterdir()):
                raise UsageError(f"{brief(str(path))}: is a folder that holds something; name a new or an empty one")
        elif path.exists() or path.is_symlink():
            raise UsageError(f"{brief(str(path))}: is a file; name a folder")
    except OSError as error:
        raise UsageError(f"{brief(str(path))}: cannot be read ({error.strerror})") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place, synced to disk, if the block succeeds; else it goes.

    Raises UsageError where `path` holds something already or cannot be written.
    """
    check_new(path)
    path = Path(os.path.abspath(path))
    made = [folder for folder in path.parents if not folder.exists()]
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep others out
        for file in temporary.iterdir():
            file.chmod(0o644)
            with file.open("rb+") as content:
                os.fsync(content.fileno())
        sync_folder(temporary)
        temporary.rename(path)  # onto nothing, or onto an empty folder
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise UsageError(f"{brief(str(path))}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
