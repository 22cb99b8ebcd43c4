"""`mealfast pack`: an image tree as a few large tar shards, for network disks and slow file systems."""

from __future__ import annotations

import sys
from pathlib import Path

from mealfast.cli.options import Parser
from mealfast.errors import UsageError
from mealfast.loaders import ImageIndex, pack


def make_parser() -> Parser:
    parser = Parser(
        prog="mealfast pack",
        usage="mealfast pack DIR --out DIR [OPTIONS]",
        description="Writes an image tree into WebDataset tar shards that both loaders read with the same views. A "
        "folder with train/ and val/ becomes one with the same, which --data takes.",
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="tree of class folders, or a folder with train/ and val/")
    add("--out", required=True, metavar="DIR", help="new folder for the shards")
    add("--shard-mib", type=int, default=1024, metavar="N", help="size of a shard, MiB (default: 1024)")
    add(
        "--shorter-side",
        type=int,
        metavar="N",
        help="shrink larger images to this, pixels (default: files as they are)",
    )
    add("--quality", type=int, default=90, metavar="Q", help="of the JPEGs that are written anew (default: 90)")
    add("--workers", type=int, metavar="N", help="parallel readers (default: all cores)")
    return parser


def pack_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError or DataError."""
    options = make_parser().parse_args(argv)
    if options.shard_mib < 1:
        raise UsageError(f"--shard-mib {options.shard_mib}: must be 1 or more")
    root, out = Path(options.folder), Path(options.out)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"--out {out}: lies within {root}; name a folder outside it")
    for name in [part for part in ("train", "val") if (root / part).is_dir()] or [""]:
        progress = sys.stderr.isatty()
        index = ImageIndex.scan(root / name, workers=options.workers, progress=progress)
        pack(
            index,
            out / name,
            shard_bytes=options.shard_mib << 20,
            shorter_side=options.shorter_side,
            quality=options.quality,
            workers=options.workers,
            progress=progress,
        )
        print(f"{out / name}: {len(index):,} images, {len(index.quarantined):,} files left out")
    return 0
