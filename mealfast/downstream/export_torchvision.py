"""A state dict for torchvision's model of the same name, where its keys are timm's: ResNets, DenseNets."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

from mealfast.downstream.agreement_check import compare
from mealfast.downstream.plain import plain_model
from mealfast.downstream.trained import Trained
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
_EQUAL = "the ResNets, ResNeXts and DenseNets of both have the same keys"


def write(trained: Trained, folder: Path, *, with_preprocessing: bool = False) -> str:
    """Writes model.pth, as torchvision's own module has loaded and run it; returns what was found. Raises UsageError:
    torchvision has no such architecture, or not with these keys."""
    if with_preprocessing:
        raise UsageError(
            "--with-preprocessing is for onnx and torchscript: torchvision's models take normalised images"
        )
    name, what = trained.model.architecture, f"{brief(trained.name)}, a {trained.model.architecture}"
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UsageError(f"{what}: torchvision has no model of that name; {_EQUAL}; others: --to timm or onnx")
    model = plain_model(trained)
    other = torchvision.models.get_model(name, weights=None, num_classes=trained.model.num_classes).eval()
    ours, theirs = model.state_dict(), other.state_dict()
    if {key: one.shape for key, one in ours.items()} != {key: one.shape for key, one in theirs.items()}:
        raise UsageError(f"{what}: torchvision's keys or shapes are others; {_EQUAL}; others: --to timm or onnx")
    other.load_state_dict(ours)
    found = compare(
        trained.model, trained.views.size, other, with_preprocessing=False, what=f"{what}: in torchvision it"
    )
    torch.save({key: tensor.contiguous() for key, tensor in ours.items()}, folder / FILE)
    return f"torchvision's {name}: {found}"
