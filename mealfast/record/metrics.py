"""What a run tells: `metrics.jsonl` for programs, TensorBoard for people. Only the main process writes.

Shape legend: B images, H and W pixels, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from mealfast.errors import RunError
from mealfast.machine import terminal
from mealfast.machine.append_log import AppendLog
from mealfast.machine.files import parsed_object, replacing
from mealfast.record.event_file import Board

PERCENTILES = (10, 25, 50, 75, 90)  # of the paper's Fig. 8
_PICTURE_SIDE = 224  # pixels
_LINE_HEIGHT = 14  # pixels


@dataclass(frozen=True)
class Picture:
    """A validation image, and what is said of it."""

    image: torch.Tensor  # uint8 [H, W, 3]
    label: int
    student: torch.Tensor  # float32 [C]: probabilities
    target: torch.Tensor  # float32 [C]


class Telemetry:
    """Appends lines to `metrics.jsonl` and scalars to `tensorboard/` of a run directory.

    The ensemble's accuracy goes to `tensorboard/ensemble` under the student's names: both are drawn in one chart.

    A disk that is full for a while costs none of them: see AppendLog.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        keep_line: Callable[[dict[str, Any]], bool],
        say: Callable[[str], None] = terminal.say,
    ) -> None:
        """Starts at `first_step`: what an earlier process wrote and `keep_line` refuses is dropped, so that a resumed
        run's lines are those of one that never stopped. `say` is given warnings. Raises OSError."""
        path = run_dir / "metrics.jsonl"
        _keep_lines(path, keep_line)
        self._lines = AppendLog(path, say)
        self._board = Board(run_dir / "tensorboard", first_step, say)
        self._ensemble = Board(run_dir / "tensorboard" / "ensemble", first_step, say)

    def write(self, line: dict[str, Any]) -> None:
        """One object of design's two kinds, `train` or `eval`; what changes of it becomes TensorBoard scalars too."""
        self._lines.write((json.dumps(line) + "\n").encode())
        for name, value in line.items():
            if name not in ("kind", "step", "epoch", "images") and isinstance(value, (int, float)):
                self._board.scalar(f"{line['kind']}/{name}", value, line["step"])

    def weights(self, model: nn.Module, step: int) -> None:
        """Percentiles of a middle convolution's weights (the paper's Fig. 8) and histograms of every convolution and
        fully connected layer."""
        name, middle = middle_convolution(model)
        values = np.percentile(middle.weight.detach().float().cpu().numpy(), PERCENTILES)
        for percent, value in zip(PERCENTILES, values, strict=True):
            self._board.scalar(f"weights/{name}/percentile_{percent}", value, step)
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                self._board.histogram(f"weights/{name}", module.weight.detach().float().cpu(), step)

    def ensemble(self, score: dict[str, Any], step: int) -> None:
        """The ensemble's `top1` and `top5`, in percent, beside the student's of an evaluation after `step` steps."""
        for name in ("top1", "top5"):
            self._ensemble.scalar(f"eval/{name}", score[name], step)

    def pictures(self, pictures: Sequence[Picture], names: Sequence[str], step: int) -> None:
        """Images, each with its class, the student's guess and the five most probable classes of its target."""
        for number, one in enumerate(pictures):
            guess = int(one.student.argmax())
            top = one.target.topk(min(5, len(one.target)))
            lines = [names[one.label], f"{100 * float(one.student[guess]):5.1f}%  {names[guess]} (student)"]
            lines += [
                f"{100 * p:5.1f}%  {names[c]}" for p, c in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            self._board.image(f"target/{number}", _captioned(one.image.numpy(), lines), step)

    def sync(self) -> None:
        """Brings the lines to the disk. A checkpoint comes after them: what it says was logged must be there."""
        self._lines.sync()

    def close(self) -> None:
        """Raises RunError where the disk has not taken all lines to the end."""
        lost, lost_curves = self._lines.close(), self._board.close() + self._ensemble.close()
        if lost or lost_curves:
            raise RunError(
                f"{self._lines.path}: {lost:,} bytes of it and {lost_curves:,} of tensorboard/ could not be written; "
                "make room on the disk"
            )


def middle_convolution(model: nn.Module) -> tuple[str, nn.Conv2d | nn.Linear]:
    """Name and module of the convolution in the middle of a model; the middle linear layer where there is none.

    Raises ValueError where there is neither.
    """
    kinds: tuple[type[nn.Conv2d], type[nn.Linear]] = (nn.Conv2d, nn.Linear)
    for kind in kinds:
        found = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
        if found:
            return found[len(found) // 2]
    raise ValueError("the model has neither a convolution nor a linear layer")


def _captioned(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    canvas = Image.new("RGB", (_PICTURE_SIDE, _PICTURE_SIDE + _LINE_HEIGHT * len(lines) + 4), "white")
    canvas.paste(Image.fromarray(image).resize((_PICTURE_SIDE, _PICTURE_SIDE)))
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(lines):
        ascii_text = text.encode("ascii", "replace").decode()  # Pillow's built-in font may hold nothing else
        draw.text((4, _PICTURE_SIDE + 2 + _LINE_HEIGHT * row), ascii_text, fill="black")
    return np.asarray(canvas)


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = parsed_object(line)
        except ValueError:
            continue  # the half line of a process that was killed
        if type(content.get("step")) is int and keep(content):
            lines.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
