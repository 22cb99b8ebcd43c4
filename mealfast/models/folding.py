"""BatchNorm folded into the convolution before it: arithmetic of inference that can be done once, ahead of time.

Which convolution a BatchNorm follows is seen in one forward pass, not read from names or from a traced graph: timm's
models branch on shapes and settings, and a pass over the real modules needs no help to get through them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Exact types: a subclass may compute on its weights (weight standardisation) or do more than normalise.
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)


def fold_batch_norms(model: nn.Module, sample: torch.Tensor) -> int:
    """Folds every BatchNorm that directly follows a convolution, in place; returns how many.

    `model` is in eval mode and takes `sample`. A pair is folded where the BatchNorm is the only reader of the
    convolution's output, and each of the two runs once in a forward pass. What a BatchNorm does besides (timm's
    BatchNormAct2d: dropout and activation) stays in its place. Raises ValueError in training mode.
    """
    if model.training:
        raise ValueError("fold_batch_norms: the model must be in eval mode")
    pairs = _pairs(model, sample)
    for convolution, norm in pairs:
        _fold(convolution, norm)
    rests = {norm: _rest(norm) for _, norm in pairs}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in rests:
                setattr(parent, name, rests[child])
    return len(pairs)


def _pairs(model: nn.Module, sample: torch.Tensor) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    watch = _Watch()
    handles = []
    for module in model.modules():
        if type(module) in _CONVOLUTIONS:
            handles.append(module.register_forward_hook(watch.convolved))
        elif type(module) in _NORMS and isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(watch.normalizing))
            handles.append(module.register_forward_hook(watch.normalized))
    try:
        with torch.no_grad(), watch:
            model(sample)
    finally:
        for handle in handles:
            handle.remove()
    return watch.pairs()


class _Watch(TorchFunctionMode):
    """Notes the output of every convolution, and everything that reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[nn.Module] = Counter()
        self.outputs: dict[int, tuple[torch.Tensor, nn.Conv2d]] = {}  # holds the tensors, so that ids stay theirs
        self.readers: dict[int, list[_BatchNorm | None]] = {}  # None: something other than a BatchNorm
        self.norm: _BatchNorm | None = None  # the one that is running

    def convolved(self, module: nn.Conv2d, inputs: object, output: torch.Tensor) -> None:
        """Forward hook of a convolution."""
        self.runs[module] += 1
        self.outputs[id(output)] = (output, module)
        self.readers[id(output)] = []

    def normalizing(self, module: _BatchNorm, inputs: tuple[object, ...]) -> None:
        """Forward pre-hook of a BatchNorm."""
        self.runs[module] += 1
        self.norm = module
        if inputs and id(inputs[0]) in self.readers:
            self.readers[id(inputs[0])].append(module)

    def normalized(self, module: _BatchNorm, inputs: object, output: object) -> None:
        """Forward hook of a BatchNorm."""
        self.norm = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        # Within a BatchNorm only its own work reads its input; a look at a shape elsewhere reads no values.
        if self.norm is None and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(output)):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and id(leaf) in self.readers:
                    self.readers[id(leaf)].append(None)
        return output

    def pairs(self) -> list[tuple[nn.Conv2d, _BatchNorm]]:
        """Convolutions, each with the BatchNorm that alone reads it."""
        found = []
        for key, (_, convolution) in self.outputs.items():
            (norm,) = self.readers[key] if len(self.readers[key]) == 1 else (None,)
            if norm is not None and self.runs[norm] == self.runs[convolution] == 1:
                found.append((convolution, norm))
        return found


def _fold(convolution: nn.Conv2d, norm: _BatchNorm) -> None:
    """conv(x, W, b) normalised = conv(x, W s, (b - mean) s + beta), s = gamma / sqrt(var + eps); in float64 here."""
    dtype = convolution.weight.dtype

    def double(one: torch.Tensor | None) -> Any:
        return None if one is None else one.detach().double()

    weight, bias = fuse_conv_bn_weights(
        double(convolution.weight),
        double(convolution.bias),
        double(norm.running_mean),
        double(norm.running_var),
        norm.eps,
        double(norm.weight),
        double(norm.bias),
    )
    layout = torch.channels_last if convolution.weight.is_contiguous(memory_format=torch.channels_last) else None
    stored = weight.detach().to(dtype) if layout is None else weight.detach().to(dtype, memory_format=layout)
    convolution.weight = nn.Parameter(stored, requires_grad=False)
    convolution.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)


def _rest(norm: _BatchNorm) -> nn.Module:
    """What remains of a BatchNorm once its arithmetic is folded away."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
