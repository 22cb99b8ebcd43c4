"""`mealfast predict`: the most probable classes of image files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mealfast.cli.options import Parser
from mealfast.cli.view_options import (
    add_device_option,
    add_view_options,
    check_positive,
    check_view_options,
    eval_views,
)
from mealfast.errors import UsageError
from mealfast.machine.files import printable
from mealfast.machine.terminal import say
from mealfast.machine.wording import counted


def make_parser() -> Parser:
    """The options of `mealfast predict`."""
    parser = Parser(
        prog="mealfast predict",
        usage="mealfast predict MODEL FILE [FILE ...] [OPTIONS]",
        description="Prints the most probable classes of images, with their probabilities. MODEL is a model spec, for "
        "instance resnet50@runs/resnet50-224/student.safetensors. By default images are cropped as the paper "
        "evaluates.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model spec")
    add("files", nargs="+", metavar="FILE", help="image files, of any format that Pillow reads")
    add("--top", type=int, default=5, metavar="K", help="number of classes to print (default: 5)")
    add(
        "--class-map", metavar="FILE",
        help="text file with one class name per line, in the order of the model's outputs (default: ImageNet's names "
        "for a model with 1000 classes, numbers otherwise)",
    )  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of the text")
    add_view_options(parser)
    add_device_option(parser.add_argument_group("machine"))
    return parser


def predict_command(argv: list[str]) -> int:
    """Runs the command; exit status 0, or 2 where a file could not be read. Raises UsageError or DataError."""
    options = make_parser().parse_args(argv)
    check_positive(options, "top")
    check_view_options(options)

    from mealfast.downstream.images import classify, in_batches
    from mealfast.machine import processes as runtimes
    from mealfast.models import normalised as models

    if models.is_random(options.model):
        raise UsageError(
            f"model spec {options.model!r}: has no weights; give a tag or a checkpoint, for instance "
            f"{options.model}@FILE"
        )
    runtime = runtimes.start(options.device)
    model = models.build(options.model, options.size)
    views = eval_views(options, model)
    models.probe(model, options.model, views.size)
    names = _names(options.class_map, model.num_classes)
    model.to(runtime.device).eval()
    found: list[dict[str, Any]] = []
    for files, outcomes in in_batches(options.files, views):
        pixels = [one for one in outcomes if not isinstance(one, str)]
        guesses = iter(classify(model, pixels, runtime.device, options.top) if pixels else ())
        for file, outcome in zip(files, outcomes, strict=True):
            if isinstance(outcome, str):
                say(f"mealfast: {printable(file)}: {outcome}")
                found.append({"file": file, "error": outcome})
                continue
            classes = [{"class": c, "name": names[c], "probability": p} for c, p in next(guesses)]
            found.append({"file": file, "classes": classes})
            if not options.json:
                print(_text(file, classes), flush=True)
    if options.json:
        print(json.dumps({"model": options.model, "images": found}))
    return 2 if any("error" in one for one in found) else 0


def _names(class_map: str | None, classes: int) -> list[str]:
    """A name for every output of the model. Raises UsageError for a file of another number of names."""
    from timm.data import ImageNetInfo

    if class_map is not None:
        try:
            names = [line.strip() for line in Path(class_map).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"--class-map {class_map}: cannot be read ({reason})") from error
        names = [name for name in names if name]
        if len(names) != classes:
            raise UsageError(
                f"--class-map {class_map}: holds {counted(len(names), 'name')}, the model has {classes} classes"
            )
        return names
    info = ImageNetInfo("imagenet-1k")
    if classes == info.num_classes():
        return [info.index_to_description(number).partition(",")[0] for number in range(classes)]
    return [str(number) for number in range(classes)]


def _text(file: str, classes: Sequence[dict[str, Any]]) -> str:
    lines = [f"{100 * one['probability']:6.2f} %  {printable(one['name'])}" for one in classes]
    return "\n".join([printable(file), *lines])
