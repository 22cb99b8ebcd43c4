"""The image index: what a folder tree holds, and what of it is unusable."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from . import index_store, packed
from .batch import DataError
from .cores import core_share
from .files import printable
from .index_store import Stored
from .open_files import open_regular
from .packed import PackedFiles
from .probe import DECODED, PLAIN
from .probe_pool import CRASHED, Found, probe_all
from .walk import Listing, list_images

log = logging.getLogger("mealfast.loaders")

_LONGEST_REASON = 1000  # characters of what a stored index says of a file


@dataclasses.dataclass(frozen=True, eq=False)
class ImageIndex:
    """The usable images of a folder tree, in the order of their relative paths' bytes.

    Made by `ImageIndex.scan`. Row numbers are the image indices of plans and batches.
    """

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray  # int64 [N], -1 for an image without a class
    widths: np.ndarray  # int32 [N], pixels, as stored: EXIF orientation is not applied
    heights: np.ndarray  # int32 [N]
    file_sizes: np.ndarray  # int64 [N], bytes
    plain: np.ndarray  # bool [N], DALI decodes the file as Pillow does
    quarantined: list[tuple[str, str]]  # (relative path, reason)
    _names: bytes  # all relative paths, joined: a list of a million objects would take 100 MB
    _ends: np.ndarray  # int64 [N], end of each path in _names
    _packed: PackedFiles | None = None

    @classmethod
    def scan(
        cls,
        root: str | os.PathLike[str],
        *,
        classes: Sequence[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        workers: int | None = None,
        progress: bool = False,
        decode: bool = False,
    ) -> ImageIndex:
        """Index the images below `root`: class = first folder of the path, -1 for images in `root` itself.

        Files are looked into once, by `workers` processes (default: this process's share of the cores); the result
        is stored in `cache_dir` (default: a hidden file in `root`, or the user's cache folder where that is
        read-only), and only new or changed files are looked into again. `classes` fixes the label of each class name,
        by position. `decode` decodes every image once instead of reading headers. A folder that `pack` wrote is
        opened without looking into its files. Raises DataError: no such folder, no usable image, a folder that is not
        among `classes`.
        """
        root = Path(root)
        if (root / packed.INDEX).is_file():
            stored, files = packed.open_pack(root)
            return _build(root, stored, classes, files)
        if (root / packed.UNFINISHED).is_file():
            raise DataError(f"{root}: packing was interrupted; pack the images again")
        listing = list_images(root)
        places = index_store.store_paths(root, None if cache_dir is None else Path(cache_dir))
        found = [one for place in places if (one := index_store.load(place)) is not None]
        # More than one where the first place is read-only: the newer knows more of the files.
        old = max(found, key=lambda one: len(_matches(listing, one)[0]), default=None)
        new, changed = _probe_new(root, listing, old, decode, workers or core_share(), progress)
        if changed and not any(index_store.save(new, place) for place in places) and cache_dir is not None:
            raise DataError(f"{cache_dir}: the image index cannot be written there; give a folder that is writable")
        return _build(root, new, classes)

    def __len__(self) -> int:
        return len(self.labels)

    def relative_path(self, i: int) -> str:
        """Path of image `i` below the root."""
        return os.fsdecode(self._name(i))

    def path(self, i: int) -> str:
        """Path of image `i`, absolute; of a packed one, where it would lie if it were unpacked."""
        return os.fsdecode(self.path_bytes(i))

    def path_bytes(self, i: int) -> bytes:
        """Path of image `i`, absolute, as the file system's bytes."""
        return self._root_bytes + self._name(i)

    @property
    def packed(self) -> bool:
        """Whether the images lie in the few large files of a pack, and not in files of their own."""
        return self._packed is not None

    def encoded(self, i: int) -> np.ndarray:
        """Image `i` of a pack as stored, uint8 [L]. Raises OSError where it cannot be read any more."""
        if self._packed is None:
            raise TypeError(f"{self.root}: is no pack")
        return self._packed.encoded(i, int(self.file_sizes[i]))

    def open(self, i: int) -> BinaryIO:
        """The file of image `i`, or its bytes where it is packed. Raises OSError, of a pipe too: none waits for ever.

        Pillow is given this and never a path: of uncompressed formats it would make a memory map, and a file that
        shrinks would end the process.
        """
        return io.BytesIO(self.encoded(i).tobytes()) if self.packed else open_regular(self.path_bytes(i))

    def file_of(self, i: int) -> bytes:
        """The path of the file that is read for image `i`: its own, or the shard that it is packed in."""
        if self._packed is None:
            return self.path_bytes(i)
        return os.fsencode(os.path.abspath(self._packed.path(int(self._packed.shards[i]))))

    def display_path(self, i: int) -> str:
        """Path of image `i` below the root, safe to print whatever its bytes."""
        return _printable_path(self._name(i))

    def relabel(self, name_to_label: Mapping[str, int]) -> ImageIndex:
        """The same images with the label of each class taken from `name_to_label`; unlabelled ones stay so."""
        missing = [name for name in self.classes if name not in name_to_label]
        if missing:
            raise DataError(f"{self.root}: no label is known for class '{printable(missing[0])}'")
        table = np.array([name_to_label[name] for name in self.classes] + [-1], np.int64)
        by_label = sorted(name_to_label, key=name_to_label.__getitem__)
        return dataclasses.replace(self, classes=tuple(by_label), labels=table[self.labels])

    def select(self, rows: np.ndarray) -> ImageIndex:
        """The images of `rows` (integers [M], ascending) alone, with the same classes and labels.

        Its digests are those of a tree that holds nothing else. The quarantined files stay with it.
        """
        names = [self._name(i) for i in rows.tolist()]
        return dataclasses.replace(
            self,
            labels=self.labels[rows],
            widths=self.widths[rows],
            heights=self.heights[rows],
            file_sizes=self.file_sizes[rows],
            plain=self.plain[rows],
            _names=b"".join(names),
            _ends=np.cumsum([len(name) for name in names], dtype=np.int64),
            _packed=None if self._packed is None else self._packed.select(rows.tolist()),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of paths, file sizes, labels, widths and heights: the same wherever the tree lies."""
        return self._digest(b"mealfast image index 1\0", self.labels)

    @cached_property
    def images_digest(self) -> str:
        """SHA-256 (hex) of paths, file sizes, widths and heights: what views are made of, however it is labelled."""
        return self._digest(b"mealfast images 1\0")

    def _digest(self, domain: bytes, *more: np.ndarray) -> str:
        sha = hashlib.sha256(domain)
        for part in (self._ends, self.file_sizes, *more, self.widths, self.heights):
            sha.update(np.ascontiguousarray(part, "<i8").tobytes())
        sha.update(self._names)
        return sha.hexdigest()

    @cached_property
    def _root_bytes(self) -> bytes:
        return os.path.join(os.fsencode(os.path.abspath(self.root)), b"")

    def _name(self, i: int) -> bytes:
        i = range(len(self))[i]
        return self._names[int(self._ends[i - 1]) if i else 0 : int(self._ends[i])]


def _probe_new(
    root: Path, listing: Listing, old: Stored | None, decode: bool, workers: int, progress: bool
) -> tuple[Stored, bool]:
    """The listing with what is known of each file, and whether that differs from `old`."""
    n = len(listing)
    widths, heights = np.zeros(n, np.int32), np.zeros(n, np.int32)
    bits, reasons = np.zeros(n, np.uint8), [""] * n
    known = np.zeros(n, bool)
    refused: dict[int, str] = {}  # what the stored index says of files that are looked into again
    if old is not None:
        rows, old_rows = _matches(listing, old)
        for row, old_row in zip(rows.tolist(), old_rows.tolist(), strict=True):
            if old.reasons[old_row]:
                refused[row] = reasons[row] = old.reasons[old_row]
        widths[rows], heights[rows], bits[rows] = old.widths[old_rows], old.heights[old_rows], old.bits[old_rows]
        # A file that was refused is tried again: its disk, its permissions or the image library may have been mended.
        known[rows] = [row not in refused for row in rows.tolist()]
        if decode:
            known &= (bits & DECODED).astype(bool)
    unknown = np.flatnonzero(~known).tolist()
    top = os.path.join(os.fsencode(os.path.abspath(root)), b"")
    paths = [top + listing.paths[row] for row in unknown]
    isolated = any(refused.get(row) == CRASHED for row in unknown)
    for row, found in zip(unknown, _probe(root, paths, decode, workers, isolated, progress), strict=True):
        if isinstance(found, str):
            reasons[row] = found
        else:
            widths[row], heights[row], bits[row] = found
            reasons[row] = ""
    nowhere = np.zeros(n, np.int32)
    stored = Stored(listing.paths, reasons, listing.bytes, listing.mtimes, widths, heights, bits, nowhere, nowhere)
    changed = old is None or len(old.paths) != n or any(refused.get(row) != reasons[row] for row in unknown)
    return stored, changed


def _matches(listing: Listing, old: Stored) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the listing that the stored index knows, and its rows for them: same path, size and time."""
    if listing.paths == old.paths:
        rows = old_rows = np.arange(len(listing))
    else:
        place = {path: j for j, path in enumerate(old.paths)}
        pairs = [(i, j) for i, path in enumerate(listing.paths) if (j := place.get(path)) is not None]
        rows, old_rows = np.array(pairs, np.int64).reshape(-1, 2).T
    same = (listing.bytes[rows] == old.bytes[old_rows]) & (listing.mtimes[rows] == old.mtimes[old_rows])
    return rows[same], old_rows[same]


def _probe(root: Path, paths: list[bytes], decode: bool, workers: int, isolated: bool, progress: bool) -> list[Found]:
    if not progress or not paths:
        return probe_all(paths, decode=decode, workers=workers, isolated=isolated)
    from tqdm import tqdm

    with tqdm(total=len(paths), desc=f"indexing {root.absolute()}", unit=" images", mininterval=0.5) as bar:
        return probe_all(paths, decode=decode, workers=workers, isolated=isolated, done=bar.update)


def _build(root: Path, stored: Stored, classes: Sequence[str] | None, files: PackedFiles | None = None) -> ImageIndex:
    usable = [row for row, reason in enumerate(stored.reasons) if not reason]
    quarantined = [
        (_printable_path(stored.paths[row]), printable(reason[:_LONGEST_REASON]))
        for row, reason in enumerate(stored.reasons)
        if reason
    ]
    if not usable:
        why = f"; {len(quarantined)} cannot be opened, e.g. {': '.join(quarantined[0])}" if quarantined else ""
        raise DataError(f"{root}: holds no usable image{why}; give a folder that holds one folder of images a class")
    names = [stored.paths[row] for row in usable]
    folders = [name.partition(b"/")[0] if b"/" in name else None for name in names]
    present = sorted({folder for folder in folders if folder is not None})
    if classes is None:
        classes = [os.fsdecode(folder) for folder in present]
    label: dict[bytes | None, int] = {os.fsencode(name): i for i, name in enumerate(classes)}
    unknown = [folder for folder in present if folder not in label]
    if unknown:
        raise DataError(
            f"{root}: class '{_printable_path(unknown[0])}' is not among the {len(label)} classes of the training "
            "data; remove that folder or train on a tree that has it"
        )
    label[None] = -1
    index = ImageIndex(
        root=root,
        classes=tuple(classes),
        labels=np.array([label[folder] for folder in folders], np.int64),
        widths=stored.widths[usable],
        heights=stored.heights[usable],
        file_sizes=stored.bytes[usable],
        plain=(stored.bits[usable] & PLAIN).astype(bool),
        quarantined=quarantined,
        _names=b"".join(names),
        _ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        _packed=None if files is None else files.select(usable),
    )
    _warn_of_large(index)
    return index


def _printable_path(path: bytes) -> str:
    return printable(path.decode("utf-8", "backslashreplace"))


def _warn_of_large(index: ImageIndex) -> None:
    """One line instead of two of Pillow's for each place that opens them, of the job's first process only."""
    if Image.MAX_IMAGE_PIXELS is None or int(os.environ.get("RANK") or 0) > 0:
        return
    large = np.flatnonzero(index.widths.astype(np.int64) * index.heights > Image.MAX_IMAGE_PIXELS)
    if len(large):
        i = int(large[0])
        log.warning(
            "%s: %d images have more than %d million pixels, e.g. %s (%d x %d); each view decodes all of them: "
            "`mealfast pack --shorter-side` makes them smaller",
            index.root, len(large), Image.MAX_IMAGE_PIXELS // 1_000_000, index.display_path(i), index.widths[i],
            index.heights[i],
        )  # fmt: skip
