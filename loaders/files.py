"""Files written whole or not at all, and words for what files say. Imports only the standard library.

They live here since loaders may import nothing of mealfast; `mealfast.machine.files` hands them on.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, synced to disk, if the block succeeds; else it goes.

    Raises OSError, and then leaves what was there before.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's 0600 would keep a group's members from each other's files
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """An indented JSON file, written by `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Has a rename in `folder` reach the disk, where the file system lets a folder be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def printable(text: str) -> str:
    """`text` on one line: line breaks and control characters, escape sequences among them, as backslash escapes.

    For every line that quotes a file: its name, its content, or an error that repeats them.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def words(value: object) -> str:
    """A value of a recipe or a header as a user would type it: lists and tuples with spaces, "none" where empty."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return str(value)
