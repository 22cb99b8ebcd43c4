"""`mealfast predict`: the most probable classes of image files.

Shape legend: B images, C classes, H and W pixels.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
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

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mealfast.loaders import EvalViews
    from mealfast.models.normalised import NormalizedModel

BATCH = 32  # images that go through the model at once
_LARGEST = 1 << 26  # pixels of a resized image: a strip of 1 x 5,000 would become a gigabyte


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
    for files, outcomes in _in_batches(options.files, views):
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


def classify(
    model: torch.nn.Module, pixels: Sequence[np.ndarray], device: torch.device, top: int
) -> list[list[tuple[int, float]]]:
    """For each of B images, uint8 [H, W, 3], its `top` most probable (class, probability), best first.

    `model` takes uint8 [B, H, W, 3] on `device` and returns logits [B, C].
    """
    import numpy as np
    import torch

    with torch.inference_mode():
        probabilities = model(torch.from_numpy(np.stack(pixels)).to(device)).float().softmax(dim=1)
        best = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
    return [
        list(zip(classes, values, strict=True))
        for classes, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def view_of(path: str | Path, views: EvalViews) -> np.ndarray:
    """The evaluation view of an image file, uint8 [size, size, 3]. Raises what Pillow raises, or ValueError."""
    import numpy as np
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    path = Path(path)
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError("no such file" if not path.exists() else "not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            image.load()
            shorter, longer = sorted(image.size)
            if views.resize * views.resize * longer > _LARGEST * shorter:
                raise ValueError(f"{image.width} x {image.height} pixels are too long and narrow")
            rgb = image.convert("RGB")
    resized = resize(rgb, views.resize, InterpolationMode(views.interpolation))
    return np.asarray(center_crop(resized, [views.size, views.size]))


def _in_batches(files: Sequence[str], views: EvalViews) -> Iterator[tuple[list[str], list[np.ndarray | str]]]:
    """Files and, for each, its view or why there is none."""
    from mealfast.loaders.probe import reason

    def outcome(file: str) -> np.ndarray | str:
        try:
            return view_of(file, views)
        except Exception as error:  # hostile files raise anything
            return reason(error)

    remaining = iter(files)
    while batch := list(islice(remaining, BATCH)):
        yield batch, [outcome(file) for file in batch]


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
