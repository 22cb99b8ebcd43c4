"""`mealfast predict`: the most probable classes of image files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mealfast.cli.options import Parser
from mealfast.cli.view_options import (
    add_device_option,
    add_view_options,
    check_positive,
    check_view_options,
    eval_views,
    size_notes,
)
from mealfast.errors import UsageError
from mealfast.machine.files import printable
from mealfast.machine.terminal import say
from mealfast.machine.wording import counted

if TYPE_CHECKING:  # torch takes seconds to import
    from mealfast.models.normalised import NormalizedModel


def make_parser() -> Parser:
    """The options of `mealfast predict`."""
    parser = Parser(
        prog="mealfast predict",
        usage="mealfast predict MODEL FILE [FILE ...] [OPTIONS]",
        description="Prints the most probable classes of images, with their probabilities. MODEL is a model spec, for "
        "instance runs/resnet50-224, a run directory. By default images are cropped as the paper evaluates.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model spec")
    add("files", nargs="+", metavar="FILE", help="image files, of any format that Pillow reads")
    add("--top", type=int, default=5, metavar="K", help="number of classes to print (default: 5)")
    add(
        "--class-map", metavar="FILE",
        help="text file with one class name per line, in the order of the model's outputs (default: those that its "
        "file has, ImageNet's for a model with 1000 classes, numbers otherwise)",
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

    runtime = runtimes.start(options.device)
    model = models.build(options.model, options.size)
    if models.is_random(options.model):
        raise UsageError(
            f"model spec {options.model!r}: has no weights; give a tag or a checkpoint, for instance "
            f"{options.model}@FILE"
        )
    views = eval_views(options, model)
    models.probe(model, options.model, views.size)
    names = _names(options.class_map, model)
    for note in size_notes(options, [model]):
        say(note)
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


def _names(class_map: str | None, model: NormalizedModel) -> list[str]:
    """A name for every output of the model. Raises UsageError for a file of another number of names."""
    from mealfast.models.class_names import imagenet, read_class_map, readable

    classes = model.num_classes
    if class_map is None:
        return readable(model.classes or (imagenet() if classes == len(imagenet()) else None), classes)
    names = read_class_map(class_map)
    if len(names) != classes:
        raise UsageError(
            f"--class-map {class_map}: holds {counted(len(names), 'name')}, the model has {classes} classes"
        )
    return list(names)


def _text(file: str, classes: Sequence[dict[str, Any]]) -> str:
    lines = [f"{100 * one['probability']:6.2f} %  {printable(one['name'])}" for one in classes]
    return "\n".join([printable(file), *lines])
