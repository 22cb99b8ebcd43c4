"""The demo's six runs, each through the engine that ImageNet runs go through.

Two teachers learn from all labels, a student starts from few; then it is distilled on images without labels, and beside
it trained longer on its few labels and on all labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mealfast.cli.demo_data import FEW_LABELS, TRAIN_IMAGES
from mealfast.cli.signals import Interrupted, noticed
from mealfast.recipe import RECIPES, make_recipe

STUDENT = "test_efficientnet?num_classes=10"
TEACHERS = ("resnet10t?num_classes=10", "test_resnet?num_classes=10")
RUNS = ("teacher-1", "teacher-2", "start", "distilled", "same-labels-longer", "all-labels")
_RATIO = TRAIN_IMAGES // FEW_LABELS  # epochs of the few labels that take as many steps as one of all images


def weights_of(folder: Path, run: str, spec: str) -> str:
    """The model spec of what a run of the demo in `folder` has made of the architecture of `spec`."""
    return f"{spec}@{folder / run / 'student.safetensors'}"


def run_all(folder: Path, seed: int, loader: str, device: str) -> dict[str, dict[str, Any]]:
    """Runs the six, below `folder`, and returns each one's summary by its name. Raises Interrupted after a signal."""
    from mealfast.training.loop import train

    labels = {"hard_label_weight": 1.0}
    # The controls take as many steps as the distillation; an epoch of few labels has fewer.
    whole = RECIPES["demo"]
    few = {name: whole[name] * _RATIO for name in ("epochs", "eval_every")}
    few |= {"lr_decay_epochs": tuple(epoch * _RATIO for epoch in whole["lr_decay_epochs"]), **labels}
    start = weights_of(folder, "start", STUDENT)
    teachers = tuple(weights_of(folder, name, spec) for name, spec in zip(RUNS, TEACHERS, strict=False))
    # Name: (tree of images, what differs from the recipe "demo").
    jobs: dict[str, tuple[str, dict[str, Any]]] = {
        "teacher-1": ("all", {"student": TEACHERS[0], "epochs": 7, "lr_decay_epochs": (5,), **labels}),
        "teacher-2": ("all", {"student": TEACHERS[1], **labels}),
        "start": ("few", {"student": STUDENT, **few, "epochs": 40, "lr_decay_epochs": (30,)}),
        "distilled": ("unlabelled", {"student": start, "teachers": teachers}),
        "same-labels-longer": ("few", {"student": start, **few}),
        "all-labels": ("all", {"student": start, **labels}),
    }
    summaries = {}
    with noticed() as last_signal:
        for number, (name, (data, changes)) in enumerate(jobs.items(), start=1):
            print(f"\n[{number}/{len(jobs)}] {name}", flush=True)
            recipe = make_recipe(
                "demo", data=str(folder / "data" / data), run_dir=str(folder / name), seed=seed, loader=loader,
                device=device, **changes,
            )  # fmt: skip
            summaries[name] = train(recipe)
            if (signal := last_signal()) is not None:  # which the run may have been too near its end to act on
                raise Interrupted(signal)
            if not summaries[name]["finished"]:
                raise KeyboardInterrupt
    return summaries
