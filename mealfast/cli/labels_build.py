"""`mealfast labels build`: the teachers' targets of planned views of every training image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mealfast.cli.labels_info import facts, text
from mealfast.cli.options import Parser, add_recipe_options, settings
from mealfast.cli.view_options import check_positive
from mealfast.errors import UsageError
from mealfast.recipe import Recipe, make_recipe

# What `build` takes of a recipe: the teachers and all that decides what they see.
_FIELDS = (
    "teachers", "data", "val", "val_share", "class_map", "size", "crop_scale", "crop_ratio", "flip", "interpolation",
    "loader",
    "loader_threads", "loader_timeout", "device", "amp", "compile", "cuda_graphs", "tune_teachers", "seed",
)  # fmt: skip


def make_parser() -> Parser:
    """The options of `mealfast labels build`."""
    parser = Parser(
        prog="mealfast labels build",
        usage="mealfast labels build --data DIR --teachers SPEC ... --views V --out CACHE [OPTIONS]",
        description="Runs the teachers over V planned views of every training image and keeps the K largest "
        "probabilities of each target, for `mealfast train --label-cache CACHE`. It can be stopped at any moment: the "
        "same command continues it, and the finished cache is the same. With more --views it extends a finished cache.",
    )
    cache = parser.add_argument_group("cache")
    cache.add_argument("--out", required=True, metavar="CACHE", help="folder of the cache")
    cache.add_argument(
        "--views", type=int, required=True, metavar="V", help="views of each image; epoch e uses view e mod V"
    )
    cache.add_argument(
        "--top-k", type=int, metavar="K", help="probabilities of each target (default: 10, or all of fewer classes)"
    )
    cache.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images per batch and process (default: 64)"
    )
    helps = {
        "teachers": "model specs of the ensemble (required, unless --recipe names them)",
        "data": "folder of images, or one that holds them as train/, as for `mealfast train` (required)",
    }
    add_recipe_options(parser, _FIELDS, helps)
    return parser


def build_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError, DataError or RunError."""
    options = make_parser().parse_args(argv)
    check_sizes(options)
    name, values = settings(options)
    recipe = cache_recipe(name, {field: value for field, value in values.items() if field in _FIELDS})

    from mealfast.labels.build import build
    from mealfast.machine import memory  # torch and timm take seconds to import: not for --help
    from mealfast.machine import processes as runtimes

    runtime = runtimes.start(recipe.device)
    try:
        with memory.enough(runtime.device, "lower --batch-size"):
            header = build(
                recipe, runtime, Path(options.out), views=options.views, top_k=options.top_k,
                batch_size=options.batch_size,
            )  # fmt: skip
    finally:
        runtimes.stop()
    if header is not None:
        print(text(facts(options.out, header)))
    return 0


def check_sizes(options: argparse.Namespace) -> None:
    """Raises UsageError for sizes that no cache has."""
    check_positive(options, "views", "top_k", "batch_size")
    if options.views > 1_000_000:
        raise UsageError(f"--views {options.views}: must be at most 1,000,000")
    if options.top_k is not None and options.top_k > 4096:
        raise UsageError(f"--top-k {options.top_k}: must be at most 4096")


def cache_recipe(name: str | None, given: dict[str, Any]) -> Recipe:
    """A recipe for its checked fields alone: a cache has no student, so its first teacher stands there."""
    teachers = given.get("teachers") or (make_recipe(name).teachers if name else ())
    if not teachers:
        raise UsageError("--teachers names no model: name one or more, or a --recipe that has some")
    return make_recipe(name, **given, student=teachers[0])
