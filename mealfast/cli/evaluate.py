"""`mealfast evaluate`: top-1 and top-5 of models on a tree of class folders, each alone and as an ensemble."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mealfast.cli.options import Parser
from mealfast.errors import UsageError
from mealfast.loaders import EvalViews, ImageIndex, eval_loader
from mealfast.machine import processes as runtimes
from mealfast.machine.precision import name_of, precision
from mealfast.machine.processes import Runtime
from mealfast.method.data import label_map
from mealfast.models import normalised as models
from mealfast.models.ensemble import FrozenEnsemble
from mealfast.models.layout import default_layout
from mealfast.training.scoring import Evaluation, evaluate


def make_parser() -> Parser:
    parser = Parser(
        prog="mealfast evaluate",
        usage="mealfast evaluate --data DIR --model SPEC [SPEC ...] [OPTIONS]",
        description="Exact top-1 and top-5 of one or more models, each alone and as an ensemble (mean softmax). "
        "By default the paper's evaluation: shorter side to int(256 / 224 * size), centre crop, bilinear.",
    )
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="tree of class folders, or a folder that holds one as val/"
    )
    parser.add_argument(
        "--model", required=True, nargs="+", metavar="SPEC", help="model specs; two or more make an ensemble"
    )
    views = parser.add_argument_group("views")
    views.add_argument("--size", type=int, metavar="N", help="side of the crop, pixels (default: 224)")
    views.add_argument(
        "--crop-pct", type=float, metavar="P", help="shorter side is resized to floor(size / P) (default: the paper's)"
    )
    views.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="of the resize (default: bilinear)")
    views.add_argument(
        "--own-views", action="store_true",
        help="each model's own size, crop and interpolation (timm's evaluation) wherever an option above does not say",
    )  # fmt: skip
    machine = parser.add_argument_group("machine")
    machine.add_argument("--loader", choices=("dali", "pillow"), default="dali", help="decoder backend (default: dali)")
    machine.add_argument("--loader-threads", type=int, metavar="N", help="decoding threads (default: all cores)")
    machine.add_argument("--batch-size", type=int, default=64, metavar="N", help="per process (default: 64)")
    machine.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(default: auto)")
    machine.add_argument(
        "--amp", choices=("auto", "bf16", "fp16", "off"), default="off", help="mixed precision (default: off)"
    )
    machine.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def evaluate_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError or DataError."""
    options = make_parser().parse_args(argv)
    for name in ("size", "batch_size", "loader_threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if options.crop_pct is not None and not 0.1 <= options.crop_pct <= 2:
        raise UsageError(f"--crop-pct {options.crop_pct}: must be between 0.1 and 2")
    runtime = runtimes.start(options.device)
    try:
        result = run(options, runtime)
    finally:
        runtimes.stop()
    if runtime.is_main:
        print(json.dumps(result) if options.json else _table(result))
    return 0


def run(options: Any, runtime: Runtime) -> dict[str, Any]:
    """Scores the models that the options name; the content of `--json`."""
    layout = default_layout(name_of(precision(options.amp, runtime.device)), options.compile)
    with runtime.main_first():
        index = _scan(options.data, options.loader_threads, runtime)
    for spec in options.model:
        if runtime.is_main and models.is_random(spec):
            print(f"note: {spec} has random weights (no tag and no checkpoint)", file=sys.stderr)
    torch.manual_seed(0)  # random weights, where a spec has no others
    loaded = [models.build(spec, options.size) for spec in options.model]
    views = [_views(options, model) for model in loaded]
    for spec, model, view in zip(options.model, loaded, views, strict=True):
        models.probe(model, spec, view.size)
    classes = {model.num_classes for model in loaded}
    if len(classes) > 1:
        raise UsageError(f"--model: the models must have the same number of classes, not {sorted(classes)}")
    index = index.relabel(label_map(index.classes, classes.pop(), index.root, f"--model {options.model[0]}"))

    # One loader a kind of view: models that see the same views share one, and one decoding.
    kinds = list(dict.fromkeys(views))
    seen = [[model for model, view in zip(loaded, views, strict=True) if view == kind] for kind in kinds]
    ensembles = [FrozenEnsemble(some, runtime, compile=options.compile, layouts=[layout] * len(some)) for some in seen]
    order = [number for kind in kinds for number, view in enumerate(views) if view == kind]

    def predict(*images: torch.Tensor) -> list[torch.Tensor]:
        logits = [one for ensemble, batch in zip(ensembles, images, strict=True) for one in ensemble(batch)]
        return [logits[order.index(number)] for number in range(len(loaded))]

    loaders = [
        eval_loader(
            options.loader, index, kind, batch_size=options.batch_size, rank=runtime.rank,
            world_size=runtime.world_size, device=runtime.device, threads=options.loader_threads,
        )
        for kind in kinds
    ]  # fmt: skip
    members = range(len(loaded)) if len(loaded) > 1 else ()
    try:
        result = evaluate(
            predict, len(loaded), loaders, runtime, ensemble=members,
            pad_to=options.batch_size if options.compile else None,
        )  # fmt: skip
    finally:
        for loader in loaders:
            loader.close()
    return _to_json(result, options.model, index)


def _scan(data: str, workers: int | None, runtime: Runtime) -> ImageIndex:
    folder = Path(data)
    if not folder.is_dir():
        raise UsageError(f"--data {data}: no such folder")
    index = ImageIndex.scan(
        folder / "val" if (folder / "val").is_dir() else folder,
        workers=workers,
        progress=runtime.is_main and sys.stderr.isatty(),
    )
    if (index.labels < 0).any():
        raise UsageError(f"--data {data}: holds images outside class folders; put each in its class's folder")
    return index


def _views(options: Any, model: models.NormalizedModel) -> EvalViews:
    own = models.evaluation_config(model) if options.own_views else {}
    size = options.size or own.get("size", 224)
    crop_pct = options.crop_pct or own.get("crop_pct")
    interpolation = options.interpolation or own.get("interpolation", "bilinear")
    if interpolation not in ("bilinear", "bicubic"):
        interpolation = "bicubic"  # timm's "random" means either
    return EvalViews.from_crop_pct(size, crop_pct, interpolation)


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


def _table(result: dict[str, Any]) -> str:
    rows = [(row["model"], row) for row in result["models"]]
    if "ensemble" in result:
        rows.append(("ensemble", result["ensemble"]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}   top-1 %   top-5 %   images"]
    lines += [f"{name:{width}}  {row['top1']:8.2f}  {row['top5']:8.2f}  {row['images']:7,}" for name, row in rows]
    if "quarantined" in result:
        lines.append(f"{result['quarantined']} files could not be read and were left out: see `mealfast index`")
    return "\n".join(lines)
