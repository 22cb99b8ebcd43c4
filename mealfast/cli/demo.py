"""`mealfast demo`: the whole job on real handwritten digits, with the controls that show what distillation adds.

Two teachers learn from all labels, a student starts from few; then it is distilled on images without labels, and beside
it trained longer on its few labels and on all labels. Every run goes through the engine that ImageNet runs go through.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from mealfast.cli.demo_data import FEW_LABELS, TRAIN_IMAGES, write_digits
from mealfast.cli.options import Parser
from mealfast.errors import UsageError
from mealfast.recipe import RECIPES, make_recipe

STUDENT = "test_efficientnet?num_classes=10"
TEACHERS = ("resnet10t?num_classes=10", "test_resnet?num_classes=10")
FIGURE = "curves.png"
_RUNS = ("teacher-1", "teacher-2", "start", "distilled", "same-labels-longer", "all-labels")
_RATIO = TRAIN_IMAGES // FEW_LABELS  # epochs of the few labels that take as many steps as one of all images


def make_parser() -> Parser:
    parser = Parser(
        prog="mealfast demo",
        usage="mealfast demo [OPTIONS]",
        description="Distils two teachers into a student on scikit-learn's handwritten digits in about three minutes "
        "on two CPU cores, and shows the student's start and controls beside it.",
    )
    parser.add_argument(
        "--run-dir", default="runs/demo", metavar="DIR", help="made anew each time (default: runs/demo)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the split and of every run (default: 0)")
    parser.add_argument("--loader", choices=("dali", "pillow"), default="dali", help="decoder backend (default: dali)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def demo_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError."""
    options = make_parser().parse_args(argv)
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed}: must be 0 or more")
    began = time.perf_counter()
    folder = Path(options.run_dir)
    _make_room(folder)
    write_digits(folder / "data", options.seed)

    import torch

    from mealfast.figures.curves import draw_curves, read_evaluations

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at 32 pixels a second thread costs more than it brings
    try:
        summaries = _run_all(folder, options)
    finally:
        torch.set_num_threads(threads)
    distilled = summaries["distilled"]
    result = {
        "teachers": [score["top1"] for score in distilled["teachers"]],
        "ensemble": distilled["ensemble"]["top1"],
        "start": distilled["start"]["top1"],
        "distilled": distilled["final"]["top1"],
        "same_labels_longer": summaries["same-labels-longer"]["final"]["top1"],
        "all_labels": summaries["all-labels"]["final"]["top1"],
        "seconds": time.perf_counter() - began,
    }
    curves = {name: read_evaluations(folder / name) for name in ("distilled", "same-labels-longer", "all-labels")}
    levels = {"ensemble": result["ensemble"], "start": result["start"]}
    draw_curves(curves, folder / FIGURE, levels)
    print(_table(result, folder))
    if options.json:
        print(json.dumps(result))
    return 0


def _run_all(folder: Path, options: Any) -> dict[str, dict[str, Any]]:
    from mealfast.training.loop import train

    def run(name: str, data: str, number: int, **changes: Any) -> dict[str, Any]:
        print(f"\n[{number}/{len(_RUNS)}] {name}", flush=True)
        recipe = make_recipe(
            "demo", data=str(folder / "data" / data), run_dir=str(folder / name), seed=options.seed,
            loader=options.loader, device=options.device, **changes,
        )  # fmt: skip
        summary = train(recipe)
        if not summary["finished"]:
            raise KeyboardInterrupt
        return summary

    labels = {"hard_label_weight": 1.0}
    # The controls take as many steps as the distillation; an epoch of few labels has fewer.
    whole = RECIPES["demo"]
    few = {name: whole[name] * _RATIO for name in ("epochs", "eval_every")}
    few |= {"lr_decay_epochs": tuple(epoch * _RATIO for epoch in whole["lr_decay_epochs"]), **labels}
    start = f"{STUDENT}@{folder / 'start' / 'student.safetensors'}"
    teachers = [f"{spec}@{folder / name / 'student.safetensors'}" for spec, name in zip(TEACHERS, _RUNS, strict=False)]
    return {
        "teacher-1": run("teacher-1", "all", 1, student=TEACHERS[0], epochs=7, lr_decay_epochs=(5,), **labels),
        "teacher-2": run("teacher-2", "all", 2, student=TEACHERS[1], **labels),
        "start": run("start", "few", 3, student=STUDENT, **{**few, "epochs": 40, "lr_decay_epochs": (30,)}),
        "distilled": run("distilled", "unlabelled", 4, student=start, teachers=tuple(teachers)),
        "same-labels-longer": run("same-labels-longer", "few", 5, student=start, **few),
        "all-labels": run("all-labels", "all", 6, student=start, **labels),
    }


def _make_room(folder: Path) -> None:
    """Removes what an earlier demo wrote there, and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--run-dir {folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "data").is_dir():
        raise UsageError(f"--run-dir {folder}: holds something other than a demo; name a new or an empty folder")
    for name in ("data", *_RUNS):
        shutil.rmtree(folder / name, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run-dir {folder}: cannot be made ({error.strerror})") from error


def _table(result: dict[str, Any], folder: Path) -> str:
    rows = [
        (f"teacher {spec.partition('?')[0]}, {TRAIN_IMAGES} labels", top1)
        for spec, top1 in zip(TEACHERS, result["teachers"], strict=True)
    ]
    rows += [
        ("ensemble of both", result["ensemble"]),
        (f"student at its start, {FEW_LABELS} labels", result["start"]),
        (f"distilled on {TRAIN_IMAGES} images without labels", result["distilled"]),
        (f"control: longer on the same {FEW_LABELS} labels", result["same_labels_longer"]),
        (f"control: on all {TRAIN_IMAGES} labels", result["all_labels"]),
    ]
    lines = ["", f"{'handwritten digits, 597 validation images':<52} top-1 %", "-" * 60]
    lines += [f"{name:<52} {top1:7.2f}" for name, top1 in rows]
    lines += [
        "-" * 60,
        f"{result['seconds']:.0f} seconds",
        "",
        f"student       {folder / 'distilled' / 'student.safetensors'}  (loads with plain timm)",
        f"run directory {folder / 'distilled'}",
        f"figure        {folder / FIGURE}",
        f"TensorBoard   tensorboard --logdir {folder}",
    ]
    return "\n".join(lines)
