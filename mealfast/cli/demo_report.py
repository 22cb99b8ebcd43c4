"""What the demo shows: demo.json, a figure of the curves, a picture of digits with guesses, a table, what to do next.

Shape legend: N validation images, C classes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mealfast.cli.demo_data import FEW_LABELS, TRAIN_IMAGES
from mealfast.cli.demo_runs import RUNS, STUDENT, TEACHERS, weights_of
from mealfast.machine.files import replacing, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch

CURVES, PICTURE, RESULT = "curves.png", "digits.png", "demo.json"
FILES = (CURVES, PICTURE, RESULT)
SHOWN = 8  # digits in the picture

Summaries = dict[str, dict[str, Any]]


def result(summaries: Summaries, seconds: float) -> dict[str, Any]:
    """The content of demo.json: top-1 in percent on the validation images, and how long all of it took."""
    distilled = summaries["distilled"]
    return {
        "teachers": [score["top1"] for score in distilled["teachers"]],
        "ensemble": distilled["ensemble"]["top1"],
        "start": distilled["start"]["top1"],
        "distilled": distilled["final"]["top1"],
        "same_labels_longer": summaries["same-labels-longer"]["final"]["top1"],
        "all_labels": summaries["all-labels"]["final"]["top1"],
        "seconds": seconds,
    }


def write(folder: Path, content: dict[str, Any]) -> None:
    """Writes demo.json."""
    write_json(folder / RESULT, content)


def draw(folder: Path, summaries: Summaries) -> None:
    """Draws the curves of the runs that start from the same student, and the picture of digits."""
    from mealfast.figures.curves import draw_curves, read_evaluations

    names = {
        "distilled": "distilled, no labels",
        "same-labels-longer": f"control: same {FEW_LABELS} labels",
        "all-labels": f"control: all {TRAIN_IMAGES} labels",
    }
    levels = {
        f"teacher {_short(spec)}": score["top1"]
        for spec, score in zip(TEACHERS, summaries["distilled"]["teachers"], strict=True)
    }
    levels |= {"ensemble": summaries["distilled"]["ensemble"]["top1"], "start": summaries["distilled"]["start"]["top1"]}
    draw_curves({name: read_evaluations(folder / run) for run, name in names.items()}, folder / CURVES, levels)
    draw_digits(folder)


def draw_digits(folder: Path) -> None:
    """Draws validation digits, those that the start misreads first, each with its label and three guesses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from mealfast.downstream.images import view_of
    from mealfast.loaders import EvalViews
    from mealfast.recipe import RECIPES

    recipe = RECIPES["demo"]
    views = EvalViews.from_crop_pct(recipe["size"], recipe["eval_crop_pct"])
    paths = sorted((folder / "data" / "all" / "val").glob("*/*.jpg"))
    labels = [int(path.parent.name) for path in paths]
    pixels = [view_of(path, views) for path in paths]
    start = _probabilities(weights_of(folder, "start", STUDENT), pixels, views.size).argmax(dim=1).tolist()
    wrong = [number for number, label in enumerate(labels) if start[number] != label]
    right = [number for number, label in enumerate(labels) if start[number] == label]
    # Evenly over the classes, in whose order the images are.
    shown = (wrong[:: max(1, len(wrong) // SHOWN)] + right[:: max(1, len(right) // SHOWN)])[:SHOWN]
    some = [pixels[number] for number in shown]
    distilled = _probabilities(weights_of(folder, "distilled", STUDENT), some, views.size).argmax(dim=1).tolist()
    teachers = [
        _probabilities(weights_of(folder, run, spec), some, views.size)
        for run, spec in zip(RUNS, TEACHERS, strict=False)
    ]
    ensemble = (sum(teachers[1:], start=teachers[0]) / len(teachers)).argmax(dim=1).tolist()

    figure, axes = pyplot.subplots(2, SHOWN // 2, figsize=(8, 6.4))
    for axis in axes.flat:
        axis.axis("off")
    for place, (axis, number) in enumerate(zip(axes.flat, shown, strict=False)):
        axis.imshow(pixels[number])
        axis.set_title(f"label {labels[number]}", fontsize=10)
        guesses = {"start": start[number], "distilled": distilled[place], "ensemble": ensemble[place]}
        for row, (name, guess) in enumerate(guesses.items()):
            colour = "#2a7a2a" if guess == labels[number] else "#c1440e"
            axis.text(
                0.5, -0.12 - 0.13 * row, f"{name}: {guess}", color=colour, fontsize=9, ha="center",
                transform=axis.transAxes,
            )  # fmt: skip
    figure.suptitle(f"Validation digits, those that the start misreads ({len(wrong)} of {len(paths)}) first")
    figure.subplots_adjust(left=0.03, right=0.97, top=0.88, bottom=0.15, hspace=0.62)
    with replacing(folder / PICTURE) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


def _probabilities(spec: str, pixels: list[np.ndarray], size: int) -> torch.Tensor:
    """Softmax [N, C] of a model on N views, uint8 [size, size, 3]."""
    import numpy as np
    import torch

    from mealfast.models.normalised import build

    model = build(spec, size).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.from_numpy(np.stack(pixels)))
    return logits.softmax(dim=1)


def table(content: dict[str, Any]) -> str:
    """The result for people."""
    rows = [
        (f"teacher {_short(spec)}, {TRAIN_IMAGES} labels", top1)
        for spec, top1 in zip(TEACHERS, content["teachers"], strict=True)
    ]
    rows += [
        ("ensemble of both", content["ensemble"]),
        (f"student at its start, {FEW_LABELS} labels", content["start"]),
        (f"distilled on {TRAIN_IMAGES} images without labels", content["distilled"]),
        (f"control: longer on the same {FEW_LABELS} labels", content["same_labels_longer"]),
        (f"control: on all {TRAIN_IMAGES} labels", content["all_labels"]),
    ]
    lines = ["", f"{'handwritten digits, 597 validation images':<52} top-1 %", "-" * 60]
    lines += [f"{name:<52} {top1:7.2f}" for name, top1 in rows]
    return "\n".join([*lines, "-" * 60, f"{content['seconds']:.0f} seconds"])


def what_next(folder: Path) -> str:
    """Where everything lies, and the commands to go on with."""
    program = Path(sys.argv[0])
    folder_of_programs = f"{program.parent}/" if program.name == "mealfast" and program.parent != Path() else ""
    student = folder / "distilled" / "student.safetensors"
    return "\n".join(
        [
            "",
            f"student      {student}  (loads with plain timm)",
            f"figures      {folder / CURVES}  {folder / PICTURE}",
            f"as JSON      {folder / RESULT}",
            "",
            "What to do next:",
            f"  {folder_of_programs}tensorboard --logdir {folder}",
            f"  {folder_of_programs}mealfast predict {student.parent} --crop-pct 1 "
            f"{folder / 'data' / 'all' / 'val' / '7'}/*.jpg",
            f"  {folder_of_programs}mealfast export {student.parent} --to onnx digits-onnx",
            f"  {folder_of_programs}mealfast train --data DIR --student SPEC --teachers SPEC SPEC   # your own images",
        ]
    )


def _short(spec: str) -> str:
    """A model spec's architecture."""
    return spec.partition("?")[0]
