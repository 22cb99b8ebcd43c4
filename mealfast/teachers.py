"""The teacher ensemble: K frozen models run as one module, without autograd.

Shape legend: B images of this process, H and W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import Conv2dSame
from torch import nn

from mealfast import models
from mealfast.runtime import Runtime


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
    """The ensemble on a device, ready to be called: eval mode, no gradients, channels-last, autocast, compiled.

    Not an `nn.Module`, so that it can never slip into the student's state dict or into DDP.
    """

    def __init__(self, teachers: Sequence[models.NormalizedModel], runtime: Runtime, *, compile: bool) -> None:
        self.runtime = runtime
        module = Ensemble(teachers).eval().requires_grad_(False)
        self.module = module.to(runtime.device, memory_format=torch.channels_last)
        if runtime.amp_dtype is not None:
            # The rounding that autocast would do to these weights, once instead of in every step: it caches casts only
            # of weights that need a gradient. Exact types: subclasses may compute on their weights in float32.
            for layer in self.module.modules():
                if type(layer) in (nn.Conv2d, Conv2dSame, nn.Linear):
                    layer.to(runtime.amp_dtype)
        if compile:
            self.module.compile()  # one graph for all K, so that their small kernels fuse and launch together

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        # no_grad, not inference_mode: the loss saves these logits for backward where it runs as plain PyTorch.
        with torch.no_grad(), self.runtime.autocast():
            return self.module(images)
