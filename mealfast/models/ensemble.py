"""The teacher ensemble: K frozen models run as one module, without autograd, at inference speed.

Shape legend: B images of this process, H and W pixels, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mealfast.machine.cuda_graphs import CapturedForward
from mealfast.machine.processes import Runtime
from mealfast.machine.waiting import waiting
from mealfast.models.folding import fold_batch_norms
from mealfast.models.layout import DTYPES, FORMATS, Choice, Layout, Timed, choose, seconds_of
from mealfast.models.normalised import NormalizedModel


class Teacher(nn.Module):
    """One frozen teacher, uint8 [B, H, W, 3] -> logits [B, C]: BatchNorm folded, in its layout. Keeps the model."""

    def __init__(self, model: NormalizedModel, layout: Layout, device: torch.device) -> None:
        super().__init__()
        self.model = model.to(device).to(memory_format=FORMATS[layout.memory_format]).eval().requires_grad_(False)
        self.channels_last = layout.memory_format == "channels_last"
        self.device_type, self.dtype = device.type, DTYPES[layout.dtype]
        if self.dtype != torch.float32:
            # The rounding that autocast would do to these weights, once instead of in every step: it caches casts only
            # of weights that need a gradient. Exact types: subclasses may compute on their weights in float32.
            for layer in self.model.modules():
                if type(layer) in (nn.Conv2d, Conv2dSame, nn.Linear):
                    layer.to(self.dtype)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.channels_last:  # of bytes, a quarter of what the copy would cost in float32
            images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(images)


class Ensemble(nn.Module):
    """uint8 images [B, H, W, 3] -> a list of K logits [B, C], one a teacher, each behind its own normalisation.

    The logits are not stacked: the loss kernel takes the list.
    """

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [teacher(images) for teacher in self.teachers]


class FrozenEnsemble:
    """The ensemble on a device, ready to be called: eval mode, no gradients, folded, laid out, compiled.

    Not an `nn.Module`, so that it can never slip into the student's state dict or into DDP.
    """

    def __init__(
        self,
        teachers: Sequence[NormalizedModel],
        runtime: Runtime,
        *,
        compile: bool,
        layouts: Sequence[Layout],
    ) -> None:
        """Takes the models over: they are folded, cast and moved. `layouts` are one a teacher."""
        members = []
        for model, layout in zip(teachers, layouts, strict=True):
            fold(model, runtime.device)
            teacher = Teacher(model, layout, runtime.device)
            if compile and not layout.compiled:
                teacher.forward = torch.compiler.disable(teacher.forward)  # type: ignore[method-assign]
            members.append(teacher)
        self.module = Ensemble(members)
        if compile:
            _let_all_compile()
            self.module.compile(dynamic=False)  # one graph for all K: their small kernels launch together
        self._captured: CapturedForward[list[torch.Tensor]] | None = None

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        if self._captured is not None and images.shape == self._captured.shape:
            return self._captured(images)
        return self.run(images)

    def run(self, images: torch.Tensor) -> list[torch.Tensor]:
        # no_grad, not inference_mode: the loss saves these logits for backward where it runs as plain PyTorch.
        with torch.no_grad():
            return self.module(images)

    @property
    def captured(self) -> bool:
        """Whether images of one shape replay a CUDA graph."""
        return self._captured is not None

    def capture(self, images: torch.Tensor) -> None:
        """From now on images of this shape replay a CUDA graph; its logits are overwritten by the next call."""
        self._captured = CapturedForward(self.run, images)


def _let_all_compile() -> None:
    """All ensembles of a process share one forward, of which torch compiles 8 and then runs the rest eagerly, without a
    word where nobody listens."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 64)


def fold(model: NormalizedModel, device: torch.device) -> int:
    """Folds a model's BatchNorms on `device`; returns how many. It stays in eval mode."""
    model.to(device).eval()
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return 0
    grey = torch.full((1, model.size, model.size, 3), 128, dtype=torch.uint8, device=device)
    return fold_batch_norms(model, grey)


def logits_in(model: NormalizedModel, layout: Layout, images: torch.Tensor) -> torch.Tensor:
    """Logits [B, C] of uint8 images [B, H, W, 3] by a copy of the folded model in that layout, not compiled."""
    with torch.no_grad():
        return Teacher(copy.deepcopy(model), layout, images.device)(images)


def measure_layouts(model: NormalizedModel, images: torch.Tensor, default: Layout) -> Choice:
    """Times copies of the folded model in `default` and in what differs from it, on uint8 images [B, H, W, 3]."""

    def prepare(layout: Layout) -> Timed:
        teacher = Teacher(copy.deepcopy(model), layout, images.device)
        if layout.compiled:
            teacher.compile(dynamic=False)

        def timed() -> float:
            with torch.no_grad():
                return seconds_of(lambda: teacher(images), images.device)

        with waiting(f"trying {layout}"):
            for _ in range(2):  # compiles, picks algorithms
                timed()
        return timed

    try:
        if default.compiled:
            torch.compiler.reset()  # all teachers share one forward, which recompiles only a few times
        return choose(prepare, default, len(images))
    finally:
        if default.compiled:
            torch.compiler.reset()


def padded(images: torch.Tensor, rows: int | None) -> torch.Tensor:
    """Images [B, H, W, 3] and below them black ones, `rows` in all; None adds none."""
    if rows is None or len(images) == rows:
        return images
    return F.pad(images, (0, 0, 0, 0, 0, 0, 0, rows - len(images)))
