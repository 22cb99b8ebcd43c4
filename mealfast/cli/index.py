"""`mealfast index`: what a folder of images holds, and what in it cannot be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mealfast.cli.options import Parser
from mealfast.cli.view_options import check_positive
from mealfast.loaders import ImageIndex
from mealfast.machine.terminal import is_terminal
from mealfast.machine.wording import counted
from mealfast.method.folders import kept, parts_of


def make_parser() -> Parser:
    """The options of `mealfast index`."""
    parser = Parser(
        prog="mealfast index",
        usage="mealfast index DIR [OPTIONS]",
        description="Scans a folder of images, where the first folder of a path is the class, stores the index beside "
        "the data and prints what it holds: images, classes, sizes, and each unreadable file with the reason.",
    )
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="folder of class folders, or one with train/ and val/",
    )
    parser.add_argument(
        "--decode", action="store_true", help="decode every image once instead of reading only the headers"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="parallel readers (default: one for each core)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def index_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises DataError for a folder that is missing or has no usable image."""
    options = make_parser().parse_args(argv)
    check_positive(options, "workers")
    root = Path(options.folder)
    parts = parts_of(root)
    bar = is_terminal(sys.stderr)
    found = []
    for part in parts:
        index = ImageIndex.scan(part, workers=options.workers, progress=bar, decode=options.decode)
        found.append(describe(index, "" if part == root else part.name))
        if len(parts) == 1 and (held_out := kept(root, index)):
            found[0]["kept_for_validation"] = held_out
    whole = found[0] if parts == [root] else together(found, str(root))
    if options.json:
        print(json.dumps(whole))
    else:
        print("\n".join(_text(facts) for facts in found))
    return 0


def describe(index: ImageIndex, part: str = "") -> dict[str, Any]:
    """The content of `--json` for one tree; `part` is its place below the folder that the user named."""
    short = np.minimum(index.widths, index.heights)
    return {
        "root": str(index.root),
        "images": len(index),
        "classes": len(index.classes),
        "unlabelled": int((index.labels < 0).sum()),
        "shorter_side": {"min": int(short.min()), "median": float(np.median(short)), "max": int(short.max())},
        "digest": index.digest,
        "quarantined": [{"path": str(Path(part) / path), "reason": reason} for path, reason in index.quarantined],
    }


def together(parts: list[dict[str, Any]], root: str) -> dict[str, Any]:
    """The content of `--json` for a folder with train/ and val/: the sums, and each part below its name."""
    return {
        "root": root,
        "images": sum(part["images"] for part in parts),
        "classes": max(part["classes"] for part in parts),
        "unlabelled": sum(part["unlabelled"] for part in parts),
        "quarantined": [entry for part in parts for entry in part["quarantined"]],
        **{Path(part["root"]).name: part for part in parts},
    }


def _text(facts: dict[str, Any]) -> str:
    side = facts["shorter_side"]
    lines = [
        f"{facts['root']}: {counted(facts['images'], 'image')} of {counted(facts['classes'], 'class')}, shorter side "
        f"{side['min']} to {side['max']} px (median {side['median']:.0f})"
    ]
    if "kept_for_validation" in facts:
        lines.append(
            f"  of them `mealfast train` keeps for validation: {counted(facts['kept_for_validation'], 'image')} "
            "(--val-share)"
        )
    if facts["unlabelled"]:
        lines.append(f"  outside class folders, without a label: {counted(facts['unlabelled'], 'image')}")
    if facts["quarantined"]:
        lines.append(f"  unreadable, and left out: {counted(len(facts['quarantined']), 'file')}")
        lines += [f"    {entry['path']}: {entry['reason']}" for entry in facts["quarantined"]]
    return "\n".join(lines)
