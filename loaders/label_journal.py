"""Which parts of a label cache are on disk while it is built: text files that only ever grow, one a process.

A line is `view part crc32`, written after the part's bytes are: a killed build loses only parts without a line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_LINE = re.compile(rb"(\d{1,9}) (\d{1,9}) ([0-9a-f]{8})\n")


class Journals:
    """The parts that all processes have noted so far in `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._offsets: dict[Path, int] = {}
        self._descriptor: int | None = None
        self.parts: dict[tuple[int, int], int] = {}  # (view, part) -> CRC-32

    def refresh(self) -> None:
        """Reads what was added since the last time; the half line of a process that was killed counts for nothing."""
        for path in self.paths():
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                added = file.read()
            whole = added[: added.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            for line in whole.splitlines(keepends=True):
                if match := _LINE.fullmatch(line):
                    self.parts[int(match[1]), int(match[2])] = int(match[3], 16)

    def add(self, rank: int, view: int, part: int, crc: int) -> None:
        """Notes a part whose bytes are on disk. Raises OSError."""
        if self._descriptor is None:
            path = self._folder / f"journal-{rank}.txt"
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.parts[view, part] = crc
        os.write(self._descriptor, _line(view, part, crc))
        os.fsync(self._descriptor)

    def rewrite(self, parts: dict[tuple[int, int], int]) -> None:
        """Leaves one journal that holds `parts`, and none where there are no parts. Before any process adds to one."""
        first = self._folder / "journal-0.txt"
        if parts:
            temporary = self._folder / ".journal.tmp"
            temporary.write_bytes(b"".join(_line(view, part, crc) for (view, part), crc in sorted(parts.items())))
            os.replace(temporary, first)
        for path in self.paths():
            if path != first or not parts:
                path.unlink()

    def paths(self) -> list[Path]:
        """The journals there are."""
        return sorted(self._folder.glob("journal-*.txt"))

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _line(view: int, part: int, crc: int) -> bytes:
    return b"%d %d %08x\n" % (view, part, crc)
