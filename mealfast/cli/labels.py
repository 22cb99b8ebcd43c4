"""`mealfast labels build|import-fkd|info|verify`: run the teachers once, train as many students as you like."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mealfast.cli.options import Parser, add_recipe_options, given_fields
from mealfast.errors import UsageError
from mealfast.recipe import Recipe, make_recipe
from mealfast.record.console import size_text

# What `build` takes of a recipe: the teachers and all that decides what they see.
_FIELDS = (
    "teachers", "data", "size", "crop_scale", "crop_ratio", "flip", "interpolation", "loader", "loader_threads",
    "device", "amp", "compile", "cuda_graphs", "tune_teachers", "seed",
)  # fmt: skip
_PRECISIONS = {"float32": "off", "bfloat16": "bf16", "float16": "fp16"}
_SIDE_BY_SIDE = "mealfast labels build|import-fkd|info|verify ... (each has --help)"
# fkd_files.FLAVOURS, which --help should not import torch for.
_FLAVOURS = ("hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm_k5")


def labels_command(argv: list[str]) -> int:
    """Runs one of the four; exit status 0. Raises UsageError or DataError."""
    jobs = {"build": _build, "import-fkd": _import_fkd, "info": _info, "verify": _verify}
    if argv and argv[0] in jobs:
        return jobs[argv[0]](argv[1:])
    print(f"usage: {_SIDE_BY_SIDE}", file=sys.stdout if argv[:1] in (["-h"], ["--help"]) else sys.stderr)
    return 0 if argv[:1] in (["-h"], ["--help"]) else 2


def build_parser() -> Parser:
    parser = Parser(
        prog="mealfast labels build",
        usage="mealfast labels build --data DIR --teachers SPEC ... --views V --out CACHE [OPTIONS]",
        description="Runs the teachers over V planned views of every training image and keeps each target's k largest "
        "probabilities, for `mealfast train --label-cache CACHE`. Stop it at any moment: the same command goes on, "
        "and the finished cache is the same. With more --views a finished cache is extended.",
    )
    cache = parser.add_argument_group("cache")
    cache.add_argument("--out", required=True, metavar="CACHE", help="folder of the cache")
    cache.add_argument(
        "--views", type=int, required=True, metavar="V", help="views of each image; epoch e uses e mod V"
    )
    cache.add_argument("--top-k", type=int, default=10, metavar="K", help="probabilities kept (default: 10)")
    cache.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per process (default: 64)")
    add_recipe_options(parser, _FIELDS)
    return parser


def import_parser() -> Parser:
    parser = Parser(
        prog="mealfast labels import-fkd",
        usage="mealfast labels import-fkd DIR --data DIR --out CACHE [OPTIONS]",
        description="Makes a label cache of the label files that FKD publishes (github.com/szq0214/FKD: coordinates, "
        "flips and top-k labels, one file an image). Stop it at any moment: the same command goes on.",
    )
    add = parser.add_argument
    add("labels", metavar="DIR", help="folder of the label files, or one that holds train/ or imagenet/train/")
    add("--data", required=True, metavar="DIR", help="the images that they are of")
    add("--out", required=True, metavar="CACHE", help="folder of the cache")
    add("--views", type=int, metavar="V", help="crops taken of each image (default: as many as the first file has)")
    add(
        "--label-type", choices=_FLAVOURS, metavar="|".join(_FLAVOURS),
        help="FKD's name of the labels (default: told by the first file's shape; renorm never is)",
    )  # fmt: skip
    add("--classes", type=int, default=1000, metavar="C", help="classes of the teachers (default: 1000)")
    add("--loader-threads", type=int, metavar="N", help="processes that index the images (default: all cores)")
    return parser


def info_parser() -> Parser:
    parser = Parser(
        prog="mealfast labels info",
        usage="mealfast labels info CACHE [--json]",
        description="What a label cache holds and what it was made of.",
    )
    parser.add_argument("cache", metavar="CACHE", help="folder that `labels build` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def verify_parser() -> Parser:
    parser = Parser(
        prog="mealfast labels verify",
        usage="mealfast labels verify CACHE [--data DIR [--teachers SPEC ...]] [OPTIONS]",
        description="Checks every file's SHA-256; with --data also labels a sample anew and compares.",
    )
    add = parser.add_argument
    add("cache", metavar="CACHE", help="folder that `labels build` wrote")
    add("--data", metavar="DIR", help="the images; without them only the checksums are checked")
    add("--teachers", nargs="+", metavar="SPEC", help="model specs (default: those in the cache's header)")
    add("--sample", type=int, default=4, metavar="N", help="batches that are labelled anew (default: 4)")
    add("--loader", choices=("dali", "pillow"), help="decoder backend (default: the one that the cache was made with)")
    add("--loader-threads", type=int, metavar="N", help="decoding threads (default: all cores)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(default: auto)")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), help="mixed precision (default: the cache's)")
    add("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def _build(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    for name in ("views", "top_k", "batch_size"):
        _at_least_one(options, name)
    if options.views > 1_000_000:
        raise UsageError(f"--views {options.views}: must be at most 1,000,000")
    if options.top_k > 4096:
        raise UsageError(f"--top-k {options.top_k}: must be at most 4096")
    recipe = _recipe(options.recipe, given_fields(options))

    from mealfast.labels.build import build
    from mealfast.machine import processes as runtimes  # torch and timm take seconds to import: not for --help

    runtime = runtimes.start(recipe.device)
    try:
        header = build(
            recipe, runtime, Path(options.out), views=options.views, top_k=options.top_k, batch_size=options.batch_size
        )
    finally:
        runtimes.stop()
    if header is not None:
        print(_text(_facts(options.out, header)))
    return 0


def _import_fkd(argv: list[str]) -> int:
    options = import_parser().parse_args(argv)
    _at_least_one(options, "classes")
    if options.views is not None:
        _at_least_one(options, "views")
    from mealfast.labels.build import training_images
    from mealfast.labels.fkd_import import import_fkd
    from mealfast.machine import processes as runtimes

    index = training_images(options.data, runtimes.start("cpu"), options.loader_threads)
    header = import_fkd(
        Path(options.labels), index, Path(options.out), views=options.views, flavour=options.label_type,
        classes=options.classes,
    )  # fmt: skip
    print(_text(_facts(options.out, header)))
    return 0


def _info(argv: list[str]) -> int:
    options = info_parser().parse_args(argv)
    from mealfast.loaders import LabelCache

    facts = _facts(options.cache, LabelCache(options.cache).header)
    print(json.dumps(facts) if options.json else _text(facts))
    return 0


def _verify(argv: list[str]) -> int:
    options = verify_parser().parse_args(argv)
    _at_least_one(options, "sample")
    if options.teachers and not options.data:
        raise UsageError("--teachers: give --data too, the images that they are to label")
    from mealfast.labels import verify as labels_verify
    from mealfast.labels.build import training_images
    from mealfast.loaders import LabelCache
    from mealfast.machine import processes as runtimes
    from mealfast.machine.precision import name_of, precision

    cache = LabelCache(options.cache)
    result: dict[str, Any] = {"views": cache.header.views, "checked": labels_verify.check_files(cache)}
    if options.data and cache.header.explicit:
        if options.teachers:
            raise UsageError(f"--teachers: the targets of {options.cache} were imported; there is nothing to compare")
        runtime = runtimes.start("cpu")
        labels_verify.check_images(cache, training_images(options.data, runtime, options.loader_threads), options.data)
    elif options.data:
        header = cache.header
        recipe = _recipe(
            None,
            {
                "data": options.data,
                "teachers": tuple(options.teachers or [teacher["spec"] for teacher in header.teachers]),
                "size": header.plan.get("size"),
                "loader": options.loader or header.made_with.get("loader"),
                "loader_threads": options.loader_threads,
                "device": options.device,
                "amp": options.amp or _PRECISIONS.get(header.made_with.get("precision"), "off"),
                "compile": header.made_with.get("compiled") is True,
            },
        )
        runtime = runtimes.start(recipe.device)
        try:
            index = training_images(recipe.data, runtime, recipe.loader_threads)
            dtype = name_of(precision(recipe.amp, runtime.device))
            dtypes = None if options.amp else labels_verify.dtypes_of(header, dtype)
            result["recomputed"] = labels_verify.recompute(cache, recipe, runtime, index, options.sample, dtypes)
        finally:
            runtimes.stop()
    print(json.dumps(result) if options.json else _verified(options.cache, result))
    return 0


def _recipe(name: str | None, given: dict[str, Any]) -> Recipe:
    """A recipe for its checked fields alone: a cache has no student, so its first teacher stands there."""
    teachers = given.get("teachers") or (make_recipe(name).teachers if name else ())
    if not teachers:
        raise UsageError("--teachers names no model: name one or more, or a --recipe that has some")
    return make_recipe(name, **given, student=teachers[0])


def _at_least_one(options: Any, name: str) -> None:
    if getattr(options, name) < 1:
        raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 1 or more")


def _facts(folder: str, header: Any) -> dict[str, Any]:
    """The content of `info --json`."""
    complete = header.complete
    count = max(len(complete), 1)
    return {
        "cache": str(folder),
        "images": header.images,
        "views": header.views,
        "complete_views": len(complete),
        "complete": header.is_complete,
        "top_k": header.top_k,
        "classes": header.classes,
        "temperature": header.temperature,
        "bytes": len(complete) * header.bytes_per_view,
        "bytes_when_complete": header.views * header.bytes_per_view,
        "bytes_per_view_and_image": header.row.itemsize,
        "mean_kept": sum(view.mean_kept for view in complete) / count if complete else None,
        "mean_entropy": sum(view.mean_entropy for view in complete) / count if complete else None,
        "teachers": [dict(teacher) for teacher in header.teachers],
        "plan": header.plan,
        "images_digest": header.images_digest,
        "made_with": header.made_with,
    }


def _text(facts: dict[str, Any]) -> str:
    plan = facts["plan"]
    lines = [
        f"{facts['cache']}: {facts['complete_views']} of {facts['views']} views of {facts['images']:,} images, top "
        f"{facts['top_k']} of {facts['classes']} classes",
        f"  {size_text(facts['bytes'])} of {size_text(facts['bytes_when_complete'])}, "
        f"{facts['bytes_per_view_and_image']} bytes a view and image",
        *(f"  teacher {teacher['spec']}  sha256 {teacher['digest'][:16]}" for teacher in facts["teachers"]),
        "  views " + "  ".join(f"{name} {plan[name]}" for name in ("seed", "size", "scale", "ratio", "flip"))
        if "seed" in plan
        else "  views of its own crop boxes and flips, which any --size fits",
    ]
    if facts["mean_kept"] is not None:
        lines.append(
            f"  kept by the top {facts['top_k']}: {100 * facts['mean_kept']:.2f}% of the probability; mean entropy "
            f"{facts['mean_entropy']:.3f} nats"
        )
    return "\n".join(lines)


def _verified(folder: str, result: dict[str, Any]) -> str:
    lines = [f"{folder}: {result['checked']} of {result['views']} views complete and as they were written"]
    if "recomputed" in result:
        found = result["recomputed"]
        lines.append(
            f"  {found['images']} targets recomputed: mean total variation {found['mean_total_variation']:.2g}, "
            f"largest {found['largest_total_variation']:.2g}"
        )
    return "\n".join(lines)
