"""`mealfast evaluate`: top-1 and top-5 of models on a tree of class folders, each alone and as an ensemble.

Shape legend: B images, H and W pixels, C classes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mealfast.cli.data_options import check_val_share
from mealfast.cli.options import Parser
from mealfast.cli.view_options import (
    CLASS_MAP,
    add_device_option,
    add_view_options,
    check_positive,
    check_view_options,
    eval_views,
    share_size,
    size_notes,
)
from mealfast.errors import UsageError
from mealfast.machine.terminal import say
from mealfast.machine.wording import counted

if TYPE_CHECKING:  # torch and timm take seconds to import: not for --help and typing errors
    import torch

    from mealfast.loaders import EvalViews, ImageIndex
    from mealfast.machine.processes import Runtime
    from mealfast.models.class_names import Names
    from mealfast.models.normalised import NormalizedModel
    from mealfast.training.scoring import Evaluation

FIGURES = (".png", ".svg", ".pdf")


def make_parser() -> Parser:
    """The options of `mealfast evaluate`."""
    parser = Parser(
        prog="mealfast evaluate",
        usage="mealfast evaluate --data DIR --model SPEC [SPEC ...] [OPTIONS]",
        description="Measures the exact top-1 and top-5 accuracy of one or more models, each alone and as an ensemble "
        "(the mean of their softmaxes). By default as the paper does: the shorter side is resized to "
        "int(256 / 224 * size), bilinear, and the centre is cropped.",
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="folder of class folders, or one that holds it as val/")
    add(
        "--val-share", type=float, metavar="S",
        help="evaluate only the share of DIR that `mealfast train` keeps for validation where there is no val/",
    )  # fmt: skip
    add("--model", required=True, nargs="+", metavar="SPEC", help="model specs; two or more make an ensemble")
    add("--per-class", action="store_true", help="also print the accuracy of each class and what it is confused with")
    add(
        "--confusion", metavar="FILE",
        help="draw the confusion matrix of the model, or of the ensemble, into FILE (.png, .svg or .pdf)",
    )  # fmt: skip
    add("--class-map", metavar="FILE|natural|byte", default="", help=CLASS_MAP)
    add("--json", action="store_true", help="print one JSON object instead of the text")
    add_view_options(parser)
    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--loader", choices=("dali", "pillow"), default="dali", help="what decodes the images (default: dali)")
    add("--loader-threads", type=int, metavar="N", help="decoding threads (default: one for each core)")
    add(
        "--loader-timeout", type=int, default=300, metavar="SECONDS",
        help="seconds without one image after which the command ends (default: 300)",
    )  # fmt: skip
    add("--batch-size", type=int, default=64, metavar="N", help="images per batch and process (default: 64)")
    add_device_option(machine)
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="off", help="mixed precision (default: off)")
    add("--compile", action="store_true", help="compile the models with torch.compile")
    return parser


def evaluate_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError, DataError or RunError."""
    options = make_parser().parse_args(argv)
    check_options(options)

    from mealfast.machine import memory
    from mealfast.machine import processes as runtimes

    runtime = runtimes.start(options.device)
    try:
        with memory.enough(runtime.device, "lower --batch-size"):
            result = run(options, runtime)
    finally:
        runtimes.stop()
    if runtime.is_main:
        print(json.dumps(result) if options.json else _text(result))
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Raises UsageError for values that cannot be."""
    check_positive(options, "batch_size", "loader_threads", "loader_timeout")
    check_view_options(options)
    check_val_share(options)
    _check_figure(options.confusion)


@dataclass(frozen=True)
class _Subjects:
    """The models to be scored, on the CPU, and the images, labelled by the first one's outputs."""

    index: ImageIndex
    models: list[NormalizedModel]  # their outputs in one order
    views: list[EvalViews]  # one a model
    classes: int
    names: Names | None  # of the outputs
    absent: list[str]  # classes without an image


def run(options: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """Scores the models that the options name, and draws what they ask for; the content of `--json`."""
    from mealfast.cli.confusion import Confusion
    from mealfast.loaders import eval_loader
    from mealfast.machine.precision import name_of, precision
    from mealfast.models.ensemble import FrozenEnsemble
    from mealfast.models.layout import default_layout
    from mealfast.training.scoring import evaluate

    layout = default_layout(name_of(precision(options.amp, runtime.device)), options.compile)
    found = _find(options, runtime)
    count = len(found.models)

    # One loader a kind of view: models that see the same views share one, and one decoding.
    kinds = list(dict.fromkeys(found.views))
    seen = [[model for model, view in zip(found.models, found.views, strict=True) if view == kind] for kind in kinds]
    ensembles = [FrozenEnsemble(some, runtime, compile=options.compile, layouts=[layout] * len(some)) for some in seen]
    order = [number for kind in kinds for number, view in enumerate(found.views) if view == kind]

    def predict(*images: torch.Tensor) -> list[torch.Tensor]:
        """uint8 [B, H, W, 3] of each kind -> logits [B, C] of each model."""
        logits = [one for ensemble, batch in zip(ensembles, images, strict=True) for one in ensemble(batch)]
        return [logits[order.index(number)] for number in range(count)]

    loaders = [
        eval_loader(
            options.loader, found.index, kind, batch_size=options.batch_size, rank=runtime.rank,
            world_size=runtime.world_size, device=runtime.device, threads=options.loader_threads,
            timeout=options.loader_timeout,
        )
        for kind in kinds
    ]  # fmt: skip
    asked = options.per_class or options.confusion
    confusion = Confusion(count, found.classes, runtime.device) if asked else None
    try:
        scores = evaluate(
            predict, count, loaders, runtime, ensemble=range(count) if count > 1 else (),
            pad_to=options.batch_size if options.compile else None, on_batch=confusion,
        )  # fmt: skip
    finally:
        for loader in loaders:
            loader.close()
    result = _to_json(scores, options.model, found.index)
    if found.absent:
        result["absent_classes"] = found.absent
    if confusion is not None:
        _add_classes(result, confusion.counts(runtime), found, options.confusion if runtime.is_main else None)
    return result


def _find(options: argparse.Namespace, runtime: Runtime) -> _Subjects:
    """Loads what is to be scored, and says how it goes together. Raises UsageError or DataError."""
    import torch

    from mealfast.method.classes import absent, absent_note
    from mealfast.method.data import scan_images
    from mealfast.models import normalised as models
    from mealfast.models.class_order import agree
    from mealfast.models.random_weights import require_weights

    index = scan_images(options.data, "val", runtime, options.loader_threads, share=options.val_share)
    if (index.labels < 0).any():
        raise UsageError(f"--data {options.data}: holds images outside class folders; put each in its class's folder")
    require_weights(options.model, "--model")
    torch.manual_seed(0)  # random weights, where a spec has no others
    loaded = [models.build(spec, options.size) for spec in options.model]
    share_size(loaded)
    views = [eval_views(options, model) for model in loaded]
    for spec, model, view in zip(options.model, loaded, views, strict=True):
        models.probe(model, spec, view.size)
    classes = models.check_classes(options.model, loaded, option="--model")
    known = [models.named(f"--model {spec}", model) for spec, model in zip(options.model, loaded, strict=True)]
    agreed = agree(known, classes, index.classes, index.root, options.class_map)
    for model, outputs in zip(loaded, agreed.orders, strict=True):
        model.take_order(outputs, agreed.names)
    index = index.relabel(agreed.labels)
    lacking = absent(index, agreed.names or ())
    notes = [*size_notes(options, loaded), *agreed.notes]
    notes += [absent_note(index.root, lacking, classes)] if lacking else []
    for note in notes if runtime.is_main else ():
        say(note)
    return _Subjects(index, loaded, views, classes, agreed.names, lacking)


def _add_classes(result: dict[str, Any], counts: torch.Tensor, found: _Subjects, figure: str | None) -> None:
    """Adds what each model takes which class for, from `counts` [M, C, C]; the last one's are drawn as `figure`."""
    from mealfast.cli.confusion import Confusion, draw, output_names

    names = output_names(found.names, found.classes)
    rows = [*result["models"], *([result["ensemble"]] if "ensemble" in result else [])]
    for row, matrix in zip(rows, counts, strict=True):
        row |= Confusion.describe(matrix, names)
    if figure:
        who = "the ensemble" if len(found.models) > 1 else result["models"][0]["model"]
        draw(counts[-1], names, who, Path(figure))
        result["figure"] = figure


def _check_figure(path: str | None) -> None:
    if path is None:
        return
    if Path(path).suffix not in FIGURES:
        raise UsageError(f"--confusion {path}: must end in {', '.join(FIGURES[:-1])} or {FIGURES[-1]}")
    if not Path(path).parent.is_dir():
        raise UsageError(f"--confusion {path}: no such folder")
    if find_spec("matplotlib") is None:
        raise UsageError("--confusion needs matplotlib: pip install 'mealfast[demo]'")


def _to_json(result: Evaluation, specs: list[str], index: ImageIndex) -> dict[str, Any]:
    found: dict[str, Any] = {
        "models": [
            {"model": spec, **score.to_json()} for spec, score in zip(specs, result.models, strict=True)
        ]
    }  # fmt: skip
    if result.ensemble:
        found["ensemble"] = result.ensemble.to_json()
    if index.quarantined:
        found["quarantined"] = len(index.quarantined)
    return found


def _text(result: dict[str, Any]) -> str:
    rows = [(row["model"], row) for row in result["models"]]
    if "ensemble" in result:
        rows.append(("ensemble", result["ensemble"]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}   top-1 %   top-5 %   images"]
    lines += [f"{name:{width}}  {row['top1']:8.2f}  {row['top5']:8.2f}  {row['images']:7,}" for name, row in rows]
    if "classes" in rows[-1][1]:
        from mealfast.cli.confusion import lines_of

        lines += ["", *lines_of(*rows[-1])]
    if "quarantined" in result:
        lines.append(f"unreadable, and left out (see `mealfast index`): {counted(result['quarantined'], 'file')}")
    if "figure" in result:
        lines.append(f"confusion matrix: {result['figure']}")
    return "\n".join(lines)
