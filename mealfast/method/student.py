"""The student: a model, what it minimises, and how its gradients meet those of other processes.

Shape legend: B images of this process, H and W pixels, C classes.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mealfast.machine.cuda_graphs import on_side_stream
from mealfast.machine.precision import autocast, name_of
from mealfast.machine.processes import Runtime
from mealfast.method.discriminator import Discriminator
from mealfast.method.inputs import Inputs
from mealfast.method.objective import Objective
from mealfast.method.targets import Target
from mealfast.models.normalised import NormalizedModel, precision_of
from mealfast.recipe import Recipe


class _Trained(nn.Module):
    """All that is trained, as one module: the model and, in the objective, the discriminator. One module is one DDP."""

    def __init__(self, student: NormalizedModel, objective: Objective, dtype: torch.dtype) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.dtype = dtype

    def forward(self, part: Inputs, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        loss, terms = self.objective(self.logits(part.images), target, part)
        return loss, terms

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(images.device, self.dtype):
            logits: torch.Tensor = self.student(images)
            return logits


class Student:
    """A model on its device in training mode, with its objective; behind DDP where there are several processes."""

    def __init__(self, recipe: Recipe, runtime: Runtime, model: NormalizedModel, *, compile: bool) -> None:
        """Takes the model over. Its random numbers, those of the discriminator's weights, are torch's of now."""
        mode = recipe.discriminator_mode
        discriminator = None if mode == "off" else Discriminator(model.num_classes, mode)
        objective = Objective(recipe.hard_label_weight, discriminator)
        self._trained = _Trained(model, objective, precision_of(model, recipe.amp, runtime.device))
        self._trained.to(runtime.device).to(memory_format=torch.channels_last)
        self._keeps_statistics = recipe.student_bn == "eval"
        self.train()
        if compile:
            model.compile(dynamic=False)  # in place: the state dict keeps timm's keys
        self._wrapped = _distributed(self._trained, recipe, runtime)

    def __call__(self, part: Inputs, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and terms, as `Objective` gives them, of a part of the batch."""
        loss, terms = self._wrapped(part, target)
        return loss, terms

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of uint8 images [B, H, W, 3], in its precision."""
        return self._trained.logits(images)

    def train(self) -> None:
        """Training mode, all but BatchNorms that keep their running statistics (--student-bn eval)."""
        self._trained.train()
        for module in self.model.modules() if self._keeps_statistics else ():
            if isinstance(module, _BatchNorm):
                module.eval()

    def eval(self) -> None:
        """Evaluation mode."""
        self._trained.eval()

    def reducing_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Within it a backward pass adds the processes' gradients up only if it is the step's last."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()

    @property
    def normalised(self) -> NormalizedModel:
        """The model behind its preprocessing."""
        return self._trained.student

    @property
    def model(self) -> nn.Module:
        """timm's model, whose state dict has timm's keys."""
        return self.normalised.model

    @property
    def objective(self) -> Objective:
        return self._trained.objective

    @property
    def discriminator(self) -> nn.Module | None:
        return self.objective.discriminator

    @property
    def num_classes(self) -> int:
        return self.normalised.num_classes

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; float32: no autocast."""
        return self._trained.dtype

    @property
    def precision(self) -> str:
        """The same in words: "float32", "bfloat16" or "float16"."""
        return name_of(self.dtype)

    def parameters(self) -> list[nn.Parameter]:
        """Of the model, then of the discriminator."""
        return [*self.normalised.parameters(), *self.objective.parameters()]

    def statistics(self) -> list[torch.Tensor]:
        """BatchNorm's running statistics: all that a forward pass in training mode changes and evaluation reads."""
        return [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]


def _distributed(trained: _Trained, recipe: Recipe, runtime: Runtime) -> nn.Module:
    if runtime.world_size == 1:
        return trained
    signature = inspect.signature(DistributedDataParallel).parameters  # renamed in torch 2.15
    # DDP lays its buckets out anew after its first step, by the order of the gradients it saw, and with another layout
    # sums over three or more processes round differently: a resumed run's first step would not be what it would have
    # been. Looking for unused parameters keeps the first layout; on a GPU, where nothing is bit-identical, speed wins.
    on_cpu = runtime.device.type == "cpu"
    if on_cpu:  # one that is unused, in no optimiser and no state dict: DDP warns where it finds none
        trained.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature else "broadcast_buffers"
    unsynced: dict[str, Any] = {sync_buffers: False}
    wrap = partial(
        DistributedDataParallel,
        trained,
        device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None,
        # Running statistics are never read in training mode: they are broadcast where they are (evaluation), not here.
        **unsynced,
        gradient_as_bucket_view=True,
        static_graph=recipe.accumulate == 1 and not on_cpu,
        find_unused_parameters=on_cpu,
    )
    # DDP keeps the AccumulateGrad nodes on the stream where it was made, and the default one cannot be captured.
    wrapped: nn.Module = on_side_stream(wrap) if recipe.cuda_graphs == "step" else wrap()
    return wrapped
