"""Looks into one image file: its size in pixels, whether DALI decodes it as Pillow does, or why it is unusable.

Also runs as a script, which `probe_pool` starts in several processes: NUL-ended paths in, one JSON line each out. It
imports nothing of mealfast, so that a process starts in a tenth of a second.
"""

from __future__ import annotations

import importlib
import json
import os
import stat
import sys
import warnings
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

# What a probe found, as bits of one byte.
PLAIN = 1  # DALI decodes it to the same pixels as Pillow, within the bounds of the tests
DECODED = 2  # every pixel was decoded once; otherwise its headers and its end were read

# Pillow's readers that may see a file from elsewhere. Not all it has: the one for PostScript starts Ghostscript.
_READERS = ["Jpeg", "Mpo", "Png", "WebP", "Bmp", "Gif", "Tiff", "Ppm", "Jpeg2K", "Avif"]
for _reader in _READERS:
    try:
        importlib.import_module(f"PIL.{_reader}ImagePlugin")
    except ImportError:  # AVIF came with Pillow 11.3
        continue
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)

_TAIL = 4096  # bytes at the end of a JPEG in which its end marker is looked for, before whatever was appended


def open_image(file: BinaryIO) -> Image.Image:
    """Pillow's image of an open file; raises OSError and others for what Pillow cannot open."""
    return Image.open(file, formats=FORMATS)


def probe(path: bytes, decode: bool) -> tuple[int, int, int] | str:
    """(width, height, bits) as Pillow sees the file, EXIF orientation not applied, or the reason it is unusable.

    A JPEG that begins and ends as it should is believed after its headers, a PNG after its checksums; anything else
    is decoded, and so is everything with `decode`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _probe(path, decode)
    except Exception as error:  # hostile files raise anything: ValueError, struct.error, RecursionError, ...
        return reason(error)


def _probe(path: bytes, decode: bool) -> tuple[int, int, int] | str:
    if not stat.S_ISREG(os.stat(path).st_mode):
        return "not a regular file"  # opening a pipe would wait for ever
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return "the file is empty"
        file.seek(max(size - _TAIL, 0))
        end = file.read(_TAIL)
        file.seek(0)
        image = open_image(file)
        width, height = image.size
        if width < 1 or height < 1:
            return f"the image has no pixels ({width} x {height})"
        plain = _is_plain_jpeg(image, file) and b"\xff\xd9" in end
        if not decode and image.format == "PNG":
            image.verify()
            return width, height, 0
        if not decode and plain and end.endswith(b"\xff\xd9"):
            return width, height, PLAIN
        image.load()
        image.convert("RGB")
        return width, height, DECODED | (PLAIN if plain else 0)


def _is_plain_jpeg(image: Image.Image, file: BinaryIO) -> bool:
    """Whether every decoder agrees on the file: 8 bits, gray or YCbCr, Huffman-coded, one picture, no junk."""
    if not isinstance(image, JpegImageFile) or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    if image.info.get("adobe_transform") != (1 if "adobe" in image.info else None) or "mp" in image.info:
        return False
    if max((max(table) for table in image.quantization.values()), default=0) > 255:
        return False
    place = file.tell()
    try:
        return _frame_marker(file) in (0xC0, 0xC1, 0xC2)
    finally:
        file.seek(place)


def _frame_marker(file: BinaryIO) -> int | None:
    """The JPEG marker that begins the frame (it tells the coding), or None where segments do not follow each other."""
    file.seek(0)
    if file.read(2) != b"\xff\xd8":
        return None
    frame = None
    while True:
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or not 0xC0 <= head[1] <= 0xFE:
            return None
        if head[1] == 0xDA:  # the scan: pixels follow
            return frame
        if 0xC0 <= head[1] <= 0xCF and head[1] not in (0xC4, 0xC8, 0xCC):
            frame = head[1]
        length = int.from_bytes(head[2:], "big")
        if length < 2:
            return None
        file.seek(length - 2, os.SEEK_CUR)


def reason(error: Exception) -> str:
    """Why Pillow refuses a file, in at most 200 characters: its own words, to be escaped before they are shown."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can identify"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def main() -> None:
    """Serve probes on stdin and stdout until stdin closes."""
    decode = sys.argv[1] == "decode"
    tail = b""
    while chunk := os.read(0, 1 << 16):
        *paths, tail = (tail + chunk).split(b"\0")
        for path in paths:
            os.write(1, json.dumps(probe(path, decode)).encode() + b"\n")


if __name__ == "__main__":
    main()
