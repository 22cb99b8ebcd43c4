"""`mealfast labels import-fkd`: a label cache made of the label files that FKD publishes."""

from __future__ import annotations

from pathlib import Path

from mealfast.cli.data_options import add_val_options, check_val_share
from mealfast.cli.labels_info import facts, text
from mealfast.cli.options import Parser
from mealfast.cli.view_options import check_positive

# fkd_files.FLAVOURS, which --help should not import torch for.
_FLAVOURS = ("hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm_k5")


def make_parser() -> Parser:
    """The options of `mealfast labels import-fkd`."""
    parser = Parser(
        prog="mealfast labels import-fkd",
        usage="mealfast labels import-fkd DIR --data DIR --out CACHE [OPTIONS]",
        description="Makes a label cache from the label files that FKD publishes (github.com/szq0214/FKD): one file "
        "per image, with crop boxes, flips and top-k labels. If it is stopped, the same command continues it.",
    )
    add = parser.add_argument
    add("labels", metavar="DIR", help="folder of the label files, or one with train/ or imagenet/train/")
    add("--data", required=True, metavar="DIR", help="folder of the images")
    add("--out", required=True, metavar="CACHE", help="folder of the cache")
    add("--views", type=int, metavar="V", help="crops to take of each image (default: as many as the first file has)")
    add(
        "--label-type", choices=_FLAVOURS, metavar="|".join(_FLAVOURS),
        help="FKD's name for the kind of labels (default: found from the first file; marginal_renorm_k5 must be given)",
    )  # fmt: skip
    add("--classes", type=int, default=1000, metavar="C", help="number of classes of the teachers (default: 1000)")
    add_val_options(parser)
    add("--loader-threads", type=int, metavar="N", help="processes that index the images (default: one for each core)")
    return parser


def import_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError or DataError."""
    options = make_parser().parse_args(argv)
    check_positive(options, "classes", "views", "loader_threads")
    check_val_share(options)

    from mealfast.labels.fkd_import import import_fkd
    from mealfast.machine import processes as runtimes
    from mealfast.method.data import scan_images

    index = scan_images(
        options.data, "train", runtimes.start("cpu"), options.loader_threads, val=options.val, share=options.val_share
    )
    header = import_fkd(
        Path(options.labels), index, Path(options.out), views=options.views, flavour=options.label_type,
        classes=options.classes,
    )  # fmt: skip
    print(text(facts(options.out, header)))
    return 0
