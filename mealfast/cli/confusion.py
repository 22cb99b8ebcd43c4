"""Which classes are taken for which: counted while models are evaluated, in words, and as a figure.

Shape legend: B images of this process, C classes, M models and, of two or more, their ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mealfast.errors import UsageError
from mealfast.kernels import ensemble_target
from mealfast.loaders import Batch
from mealfast.machine.files import printable, replacing
from mealfast.machine.processes import Runtime
from mealfast.models.class_names import Names, imagenet, readable

_PAIRS = 10  # confused pairs that are listed
_NAMED = 40  # classes whose names the figure's axes have room for


class Confusion:
    """Counts, int64 [M, C, C]: how often each model takes an image of one class (row) for one of another (column)."""

    def __init__(self, models: int, classes: int, device: torch.device) -> None:
        self.models, self.classes = models, classes
        self._counts = torch.zeros(models + (models > 1), classes * classes, dtype=torch.int64, device=device)

    def __call__(self, batch: Batch, logits: list[torch.Tensor]) -> None:
        """Counts a batch; `logits` are M of [B, C]."""
        scores = [*logits, ensemble_target(logits)] if self.models > 1 else logits
        for counts, one in zip(self._counts, scores, strict=True):
            cells = batch.labels * self.classes + one.argmax(dim=1)
            counts += torch.bincount(cells, minlength=len(counts))

    def counts(self, runtime: Runtime) -> torch.Tensor:
        """Over all processes, which must call it together; on the CPU."""
        return runtime.sum(self._counts).reshape(-1, self.classes, self.classes).cpu()

    @staticmethod
    def describe(matrix: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
        """`--json`'s lines on one matrix [C, C]: every class that has images, and the pairs confused most often."""
        outputs, wrong = len(matrix), matrix.clone().fill_diagonal_(0)
        images, right = matrix.sum(dim=1).tolist(), matrix.diagonal().tolist()
        classes = [
            {"class": c, "name": names[c], "images": images[c], "top1": 100 * right[c] / images[c]}
            for c in range(outputs)
            if images[c]
        ]
        most = wrong.flatten().topk(min(_PAIRS, wrong.numel()))
        pairs = [
            {"label": names[cell // outputs], "guess": names[cell % outputs], "images": count}
            for count, cell in zip(most.values.tolist(), most.indices.tolist(), strict=True)
            if count
        ]
        return {"classes": classes, "confused": pairs}


def output_names(names: Names | None, classes: int) -> list[str]:
    """A name for each of the model's outputs, of which ImageNet's are wnids and words."""
    if names is None or names != imagenet():
        return readable(names, classes)
    return [f"{wnid} {words}" for wnid, words in zip(names, readable(names, classes), strict=True)]


def lines_of(name: str, row: Mapping[str, Any]) -> list[str]:
    """What `Confusion.describe` found of a model, for people; the worst classes first."""
    classes = sorted(row["classes"], key=lambda one: (one["top1"], one["name"]))
    width = max(len("class"), *(len(printable(one["name"])) for one in classes))
    lines = [f"{name}, class by class, the worst first", f"{'class':{width}}   top-1 %   images"]
    lines += [f"{printable(one['name']):{width}}  {one['top1']:8.2f}  {one['images']:7,}" for one in classes]
    if row["confused"]:
        lines += ["", "confused most often"]
        lines += [
            f"{one['images']:7,}  {printable(one['label'])} taken for {printable(one['guess'])}"
            for one in row["confused"]
        ]
    return lines


def draw(matrix: torch.Tensor, names: Sequence[str], who: str, out: Path) -> None:
    """Draws counts [C, C] as shares of each row into `out`. Raises UsageError where it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    present = matrix.sum(dim=1).nonzero().flatten().tolist()
    shown = matrix[present][:, present].double()
    shares = 100 * shown / matrix[present].sum(dim=1, keepdim=True)
    side = min(4.5 + 0.22 * min(len(present), _NAMED), 13)
    figure, axis = pyplot.subplots(figsize=(side + 1, side))
    image = axis.imshow(shares.numpy(), vmin=0, vmax=100, cmap="Blues")
    if len(present) <= _NAMED:
        ticks = [printable(names[number]) for number in present]
        axis.set_xticks(range(len(present)), ticks, rotation=90)
        axis.set_yticks(range(len(present)), ticks)
    axis.set_xlabel("guess")
    axis.set_ylabel("label")
    axis.set_title(who if len(who) < 60 else f"...{who[-56:]}", fontsize=10)
    figure.colorbar(image, label="% of the label's images", fraction=0.046)
    figure.tight_layout()
    try:
        with replacing(out) as temporary:
            figure.savefig(temporary, dpi=150, format=out.suffix[1:])
    except OSError as error:
        raise UsageError(f"--confusion {out}: cannot be written ({error.strerror or error})") from error
    finally:
        pyplot.close(figure)
