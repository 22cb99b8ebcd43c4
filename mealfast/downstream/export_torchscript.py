"""TorchScript, which C++ loads without Python: a trace of the model."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from mealfast.downstream.agreement_check import compare, sample
from mealfast.downstream.plain import plain_model
from mealfast.downstream.trained import Trained
from mealfast.errors import UsageError
from mealfast.machine.files import brief, reason

FILE = "model.torchscript.pt"
USAGE = """\
```python
import torch

model = torch.jit.load("DIR/model.torchscript.pt")
logits = model(images)  # IMAGES
```"""
NOTE = "note: PyTorch calls TorchScript deprecated; --to onnx is the form that will stay"


def write(trained: Trained, folder: Path, *, with_preprocessing: bool = False) -> str:
    """Writes the trace, loads it again and compares; returns what was found. Raises UsageError where it cannot be
    traced."""
    plain_model(trained)
    model: nn.Module = trained.model if with_preprocessing else trained.model.model
    example = sample(trained.model, trained.views.size, 2)[0 if with_preprocessing else 1]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # deprecation, and what a trace holds fixed: the comparison shows if it matters
        try:
            torch.jit.save(torch.jit.trace(model, example), str(folder / FILE))
        except OSError:
            raise
        except Exception as error:
            raise UsageError(f"{brief(trained.name)}: PyTorch cannot trace it: {reason(error)}") from error
        again = torch.jit.load(str(folder / FILE))
        found = compare(
            trained.model, trained.views.size, again, with_preprocessing=with_preprocessing,
            what=f"{brief(trained.name)}: as TorchScript it",
        )  # fmt: skip
    return f"TorchScript: {found}\n{NOTE}"
