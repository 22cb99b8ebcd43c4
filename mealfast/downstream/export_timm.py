"""A folder as timm writes them for the Hugging Face hub: `timm.create_model("local-dir:DIR", pretrained=True)`."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from mealfast.downstream.agreement_check import sample
from mealfast.downstream.plain import constructor_arguments, plain_model
from mealfast.downstream.trained import Trained
from mealfast.errors import UsageError
from mealfast.machine.files import brief, reason

USAGE = """\
```python
import timm

model = timm.create_model("local-dir:DIR", pretrained=True).eval()  # or "hf-hub:NAME/REPOSITORY", once it is uploaded
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image)[None])  # image: RGB, of Pillow
```"""


def write(trained: Trained, folder: Path, *, with_preprocessing: bool = False) -> str:
    """Writes config.json and model.safetensors, and loads them again; returns what was found. Raises UsageError."""
    if with_preprocessing:
        raise UsageError("--with-preprocessing is for onnx and torchscript: timm's models take normalised images")
    model = plain_model(trained)
    labels = {"label_names": list(trained.model.classes)} if trained.model.classes is not None else {}
    try:
        timm.models.save_for_hf(
            model, str(folder), model_config=labels, model_args=constructor_arguments(trained), safe_serialization=True
        )
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except OSError:
        raise
    except Exception as error:  # of constructors' arguments, or of weights that share memory
        raise UsageError(f"{brief(trained.name)}: timm cannot keep it in a folder: {reason(error)}") from error
    _, images = sample(trained.model, trained.views.size, 2)
    with torch.inference_mode():
        if not torch.equal(again(images), model(images)):
            raise UsageError(f"{brief(trained.name)}: as timm loads it, its logits are others: nothing is written")
    return "loaded again by timm: the same logits, bit by bit"
