"""`mealfast labels verify`: a label cache's checksums, and a sample of its targets computed anew."""

from __future__ import annotations

import json
from typing import Any

from mealfast.cli.data_options import add_val_options, check_val_share
from mealfast.cli.labels_build import cache_recipe
from mealfast.cli.options import Parser
from mealfast.cli.view_options import add_device_option, check_positive
from mealfast.errors import UsageError
from mealfast.machine.wording import counted

_PRECISIONS = {"float32": "off", "bfloat16": "bf16", "float16": "fp16"}


def make_parser() -> Parser:
    """The options of `mealfast labels verify`."""
    parser = Parser(
        prog="mealfast labels verify",
        usage="mealfast labels verify CACHE [--data DIR [--teachers SPEC ...]] [OPTIONS]",
        description="Checks the SHA-256 of every file of a label cache. With --data it also computes a sample of the "
        "targets anew and compares them.",
    )
    add = parser.add_argument
    add("cache", metavar="CACHE", help="folder of the cache")
    add("--data", metavar="DIR", help="folder of the images (default: none, which checks the checksums alone)")
    add(
        "--teachers",
        nargs="+",
        metavar="SPEC",
        help="model specs of the teachers (default: those in the cache's header)",
    )
    add(
        "--class-map", metavar="FILE", help="as in `mealfast labels build`, for teachers that do not name their classes"
    )
    add("--sample", type=int, default=4, metavar="N", help="number of batches to compute anew (default: 4)")
    add("--loader", choices=("dali", "pillow"), help="what decodes the images (default: the one that made the cache)")
    add("--loader-threads", type=int, metavar="N", help="decoding threads (default: one for each core)")
    add(
        "--loader-timeout", type=int, default=300, metavar="SECONDS",
        help="seconds without one image after which the command ends (default: 300)",
    )  # fmt: skip
    add_val_options(parser)
    add_device_option(parser)
    add("--amp", choices=("auto", "bf16", "fp16", "off"), help="mixed precision (default: as the cache was made)")
    add("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def verify_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError or DataError."""
    options = make_parser().parse_args(argv)
    check_positive(options, "sample", "loader_threads", "loader_timeout")
    check_val_share(options)
    if options.teachers and not options.data:
        raise UsageError("--teachers: give --data too, the images that they are to label")
    from mealfast.labels import verify as labels_verify
    from mealfast.labels.fit import check_images
    from mealfast.loaders import LabelCache
    from mealfast.machine import processes as runtimes
    from mealfast.machine.precision import name_of, precision
    from mealfast.method.data import scan_images

    cache = LabelCache(options.cache)
    result: dict[str, Any] = {"views": cache.header.views, "checked": labels_verify.check_files(cache)}
    if options.data and cache.header.explicit:
        if options.teachers:
            raise UsageError(f"--teachers: the targets of {options.cache} were imported; there is nothing to compare")
        index = scan_images(
            options.data, "train", runtimes.start("cpu"), options.loader_threads, val=options.val,
            share=options.val_share,
        )  # fmt: skip
        check_images(cache.header, index, f"label cache {options.cache}")
    elif options.data:
        header = cache.header
        recipe = cache_recipe(
            None,
            {
                "data": options.data,
                "teachers": tuple(options.teachers or [teacher["spec"] for teacher in header.teachers]),
                "size": header.plan.get("size"),
                "loader": options.loader or header.made_with.get("loader"),
                "loader_threads": options.loader_threads,
                "loader_timeout": options.loader_timeout,
                "class_map": options.class_map or "",
                "device": options.device,
                "amp": options.amp or _PRECISIONS.get(str(header.made_with.get("precision")), "off"),
                "compile": header.made_with.get("compiled") is True,
            },
        )
        runtime = runtimes.start(recipe.device)
        try:
            index = scan_images(
                recipe.data, "train", runtime, recipe.loader_threads, val=options.val, share=options.val_share
            )
            dtype = name_of(precision(recipe.amp, runtime.device))
            dtypes = None if options.amp else labels_verify.dtypes_of(header, dtype)
            result["recomputed"] = labels_verify.recompute(cache, recipe, runtime, index, options.sample, dtypes)
        finally:
            runtimes.stop()
    print(json.dumps(result) if options.json else _text(options.cache, result))
    return 0


def _text(folder: str, result: dict[str, Any]) -> str:
    lines = [f"{folder}: {result['checked']} of {counted(result['views'], 'view')} complete and as they were written"]
    if "recomputed" in result:
        found = result["recomputed"]
        lines.append(
            f"  {counted(found['images'], 'target')} recomputed: mean total variation "
            f"{found['mean_total_variation']:.2g}, largest {found['largest_total_variation']:.2g}"
        )
    return "\n".join(lines)
