"""`mealfast pack`: an image tree as a few large tar shards, for network disks and slow file systems."""

from __future__ import annotations

import sys
from pathlib import Path

from mealfast.cli.options import Parser
from mealfast.cli.view_options import check_positive
from mealfast.errors import UsageError
from mealfast.loaders import ImageIndex, pack
from mealfast.machine.terminal import is_terminal
from mealfast.machine.wording import counted
from mealfast.method.folders import parts_of


def make_parser() -> Parser:
    """The options of `mealfast pack`."""
    parser = Parser(
        prog="mealfast pack",
        usage="mealfast pack DIR --out DIR [OPTIONS]",
        description="Packs a folder of images into a few large tar files (WebDataset shards), which both loaders read "
        "with the same views. A folder with train/ and val/ becomes one with the same, for --data.",
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder of class folders, or one with train/ and val/")
    add("--out", required=True, metavar="DIR", help="new folder to write the shards into")
    add("--shard-mib", type=int, default=1024, metavar="N", help="size of a shard, in MiB (default: 1024)")
    add(
        "--shorter-side",
        type=int,
        metavar="N",
        help="shrink images whose shorter side is longer, in pixels (default: keep the files as they are)",
    )
    add("--quality", type=int, default=90, metavar="Q", help="JPEG quality of the images that are shrunk (default: 90)")
    add("--workers", type=int, metavar="N", help="number of parallel readers (default: one for each core)")
    return parser


def pack_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError or DataError."""
    options = make_parser().parse_args(argv)
    check_positive(options, "shard_mib", "workers")
    root, out = Path(options.folder), Path(options.out)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"--out {out}: lies within {root}; name a folder outside it")
    for part in parts_of(root):
        name = "" if part == root else part.name
        progress = is_terminal(sys.stderr)
        index = ImageIndex.scan(part, workers=options.workers, progress=progress)
        pack(
            index,
            out / name,
            shard_bytes=options.shard_mib << 20,
            shorter_side=options.shorter_side,
            quality=options.quality,
            workers=options.workers,
            progress=progress,
        )
        print(f"{out / name}: {counted(len(index), 'image')}, {counted(len(index.quarantined), 'file')} left out")
    return 0
