"""The options that say how `evaluate` and `predict` cut their views, and on what they run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mealfast.errors import UsageError

if TYPE_CHECKING:  # both import torch: not for --help
    from mealfast.loaders import EvalViews
    from mealfast.models.normalised import NormalizedModel

PAPER_SIZE = 224  # pixels
CLASS_MAP = (
    "for models that do not name their classes: a text file with a class name a line, in the order of their outputs; "
    "or natural (timm's order of class folders) or byte (torchvision's) (default: found out)"
)


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """Adds --size, --crop-pct, --interpolation and --own-views."""
    add = parser.add_argument_group("views").add_argument
    add(
        "--size",
        type=int,
        metavar="N",
        help=f"side of the crop, in pixels (default: what the model's file says, or {PAPER_SIZE})",
    )
    add(
        "--crop-pct", type=float, metavar="P",
        help="resize the shorter side to size / P before the crop (default: to int(256 / 224 * size))",
    )  # fmt: skip
    add("--interpolation", choices=("bilinear", "bicubic"), help="how images are resized (default: bilinear)")
    add(
        "--own-views", action="store_true",
        help="evaluate each model as timm does, with its own size, crop and interpolation, unless an option above "
        "says otherwise",
    )  # fmt: skip


def add_device_option(parser: argparse._ActionsContainer) -> None:
    """Adds --device."""
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto",
        help="auto uses the GPU if there is one (default: auto)",
    )  # fmt: skip


def check_view_options(options: argparse.Namespace) -> None:
    """Raises UsageError for values that no view has."""
    check_positive(options, "size")
    if options.crop_pct is not None and not 0.1 <= options.crop_pct <= 2:
        raise UsageError(f"--crop-pct {options.crop_pct}: must be between 0.1 and 2")


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raises UsageError for the first of the named options that is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be 1 or more")


def eval_views(options: argparse.Namespace, model: NormalizedModel) -> EvalViews:
    """The evaluation views of `model` that the options ask for. Raises DataError for a size that none has."""
    from mealfast.loaders import EvalViews
    from mealfast.models.normalised import evaluation_config

    own = evaluation_config(model) if options.own_views else {}
    interpolation = options.interpolation or own.get("interpolation", "bilinear")
    if interpolation not in ("bilinear", "bicubic"):
        interpolation = "bicubic"  # timm's "random" means either
    return EvalViews.from_crop_pct(
        options.size or model.trained_size or own.get("size", PAPER_SIZE),
        options.crop_pct or own.get("crop_pct"),
        interpolation,
    )


def share_size(models: Sequence[NormalizedModel]) -> None:
    """Where all files that say a size say the same one, it is that of the other models too: they are compared."""
    sizes = {model.trained_size for model in models} - {None}
    for model in models if len(sizes) == 1 else ():
        model.trained_size = next(iter(sizes))


def size_notes(options: argparse.Namespace, models: Sequence[NormalizedModel]) -> list[str]:
    """A line where a model's file, and no option, decided a size that is not the paper's."""
    sizes = sorted({model.trained_size for model in models if model.trained_size})
    if options.size or not sizes or sizes == [PAPER_SIZE]:
        return []
    return [f"note: at {' and '.join(map(str, sizes))} px, as the model's file says (--size: another)"]
