"""Looks into one image file: its size in pixels, whether DALI decodes it as Pillow does, or why it is unusable.

Also runs as a script, which `probe_pool` starts in several processes: NUL-ended paths in, one JSON line each out. It
imports nothing of mealfast, so that a process starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

from PIL import Image

# What a probe found, as bits of one byte.
PLAIN = 1  # DALI decodes it to the same pixels as Pillow, within the bounds of the tests
DECODED = 2  # every pixel was decoded once; otherwise its headers and its end were read


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
    with open(path, "rb") as file:
        start = file.read(3)
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return "the file is empty"
        file.seek(max(size - 2, 0))
        end = file.read(2)
        file.seek(0)
        image = Image.open(file)
        width, height = image.size
        if width < 1 or height < 1:
            return f"the image has no pixels ({width} x {height})"
        bits = 0
        if start == b"\xff\xd8\xff" and end == b"\xff\xd9" and _is_plain_jpeg(image):
            bits |= PLAIN
        elif image.format == "PNG" and not decode:
            image.verify()
            return width, height, bits
        else:
            decode = True
        if decode:
            image.load()
            image.convert("RGB")
            bits |= DECODED
        return width, height, bits


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Whether every decoder agrees on the file: 8 bits, gray or YCbCr, one picture."""
    return (
        image.format == "JPEG"
        and image.mode in ("RGB", "L")
        and image.info.get("adobe_transform", None) == (1 if "adobe" in image.info else None)
        and "mp" not in image.info
        and max((max(table) for table in image.quantization.values()), default=0) <= 255
    )


def reason(error: Exception) -> str:
    """One line on why Pillow refuses a file."""
    if isinstance(error, Image.UnidentifiedImageError):
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
