"""A state dict for torchvision's model of the same name, where its keys are timm's: ResNets."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

from mealfast.downstream.agreement_check import compare
from mealfast.downstream.plain import plain_model
from mealfast.downstream.sources import Source
from mealfast.errors import UsageError
from mealfast.machine.files import brief

FILE = "model.pth"
USAGE = """\
```python
import torch, torchvision

model = torchvision.models.get_model("ARCHITECTURE", weights=None, num_classes=CLASSES)
model.load_state_dict(torch.load("DIR/model.pth", weights_only=True))
model.eval()  # takes normalised float32 [B, 3, S, S]
```"""
_EQUAL = "resnet18, 34, 50, 101 and 152, resnext50_32x4d and wide_resnet50_2 are the same in both"


def write(source: Source, folder: Path, *, with_preprocessing: bool = False) -> str:
    """Writes model.pth, as torchvision's own module has loaded and run it; returns what was found. Raises UsageError:
    torchvision has no such architecture, or not with these keys."""
    if with_preprocessing:
        raise UsageError(
            "--with-preprocessing is for onnx and torchscript: torchvision's models take normalised images"
        )
    name, what = source.spec.architecture, f"{brief(source.name)}, a {source.spec.architecture}"
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UsageError(f"{what}: torchvision has no model of that name; {_EQUAL}; others: --to timm or onnx")
    model = plain_model(source)
    other = torchvision.models.get_model(name, weights=None, num_classes=source.model.num_classes).eval()
    ours, theirs = model.state_dict(), other.state_dict()
    if {key: one.shape for key, one in ours.items()} != {key: one.shape for key, one in theirs.items()}:
        raise UsageError(f"{what}: torchvision's keys or shapes are others; {_EQUAL}; others: --to timm or onnx")
    other.load_state_dict(ours)
    found = compare(source.model, source.views.size, other, with_preprocessing=False, what=f"{what}: in torchvision it")
    torch.save({key: tensor.contiguous() for key, tensor in ours.items()}, folder / FILE)
    return f"torchvision's {name}: {found}"
