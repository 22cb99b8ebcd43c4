"""TorchScript, which C++ loads without Python: a trace of the model."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from mealfast.downstream.agreement_check import compare, sample
from mealfast.downstream.plain import plain_model
from mealfast.downstream.sources import Source
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


def write(source: Source, folder: Path, *, with_preprocessing: bool = False) -> str:
    """Writes the trace, loads it again and compares; returns what was found. Raises UsageError where it cannot be
    traced."""
    plain_model(source)
    model: nn.Module = source.model if with_preprocessing else source.model.model
    example = sample(source.model, source.views.size, 2)[0 if with_preprocessing else 1]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # deprecation, and what a trace holds fixed: the comparison shows if it matters
        try:
            torch.jit.save(torch.jit.trace(model, example), str(folder / FILE))
        except OSError:
            raise
        except Exception as error:
            raise UsageError(f"{brief(source.name)}: PyTorch cannot trace it: {reason(error)}") from error
        again = torch.jit.load(str(folder / FILE))
        found = compare(
            source.model, source.views.size, again, with_preprocessing=with_preprocessing,
            what=f"{brief(source.name)}: as TorchScript it",
        )  # fmt: skip
    return f"TorchScript: {found}\n{NOTE}"
