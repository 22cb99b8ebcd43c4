"""Weights files of others: read without running code, checked against the architecture, written for plain timm."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from torch import nn

from mealfast.errors import UsageError
from mealfast.models.spec import ModelSpec

# Where the state dict lies in files that hold more: mealfast's checkpoints, timm's (EMA first, as timm does), others'.
_NESTED_KEYS = ("student", "state_dict_ema", "model_ema", "state_dict", "model")


def read(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The state dict in a `.pth`, `.pt`, `.bin` or `.safetensors` file, with wrappers' prefixes removed.

    Never runs code from the file (`weights_only=True`). Raises UsageError where it is missing, damaged or something
    else.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint {path}: no such file")
    try:
        content = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch_load(path)
    except Exception as error:  # a file that only looks like one of these formats can raise anything
        raise UsageError(f"checkpoint {path}: cannot be read ({why_unreadable(error)})") from error
    for key in _NESTED_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    )
    if not tensors or not content:
        raise UsageError(f"checkpoint {path}: holds no state dict; expected one, or one under 'state_dict' or 'model'")
    return clean_state_dict(content)


def torch_load(path: str | os.PathLike[str]) -> Any:
    """`torch.load` on the CPU, tensors and plain values only; timm's training files hold an argparse.Namespace."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def why_unreadable(error: Exception) -> str:
    """One line for what reading a weights file has raised; torch's own speaks of its options."""
    if isinstance(error, pickle.UnpicklingError):
        if "GLOBAL" in str(error):
            return (
                "it holds more than tensors and plain values, and loading it could run code; save its state dict alone"
            )
        return "it is no file of torch.save"
    if "PytorchStreamReader" in str(error):  # a paragraph on the zip library within
        return "it is cut off or damaged"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def num_classes(spec: ModelSpec, state: dict[str, torch.Tensor]) -> dict[str, int]:
    """`{"num_classes": N}` as the checkpoint's classifier has it, or {} where that cannot be told."""
    config = timm.models.get_pretrained_cfg(spec.timm_name)
    classifier = config.classifier if config else None
    if isinstance(classifier, str) and f"{classifier}.weight" in state:
        return {"num_classes": state[f"{classifier}.weight"].shape[0]}
    return {}


def load(model: nn.Module, state: dict[str, torch.Tensor], spec: ModelSpec) -> None:
    """Loads a state dict, every key. Raises UsageError that names the first difference."""
    own = model.state_dict()
    # Files from before BatchNorm counted its batches lack the counters, and nothing but momentum=None reads them.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or extra or shapes:
        if shapes:
            key = shapes[0]
            difference = f"{key} has shape {list(state[key].shape)}, not {list(own[key].shape)}"
        elif missing:
            difference = f"it lacks {missing[0]} and {len(missing) - 1} more of {len(own)} tensors"
        else:
            difference = f"it has {extra[0]} and {len(extra) - 1} more tensors that {spec.architecture} has not"
        raise UsageError(f"checkpoint {spec.checkpoint} is not one of {spec.architecture}: {difference}")
    model.load_state_dict(state, strict=False)


def save(model: nn.Module, path: Path) -> None:
    """A model's weights under timm's keys in a safetensors file, atomically."""
    from mealfast.machine.files import replacing

    state = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        # No more metadata than this: several keys would be written in random order; equal weights are equal files.
        # In memory first: what safetensors raises of a full disk is no OSError.
        temporary.write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
