"""Weights files of others: read without running code, checked against the architecture, written for plain timm."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from torch import nn

from mealfast.errors import UsageError
from mealfast.machine.files import brief, replacing
from mealfast.models.description import KEY, Description
from mealfast.models.spec import ModelSpec
from mealfast.models.torch_files import torch_load, why_unreadable

# Where the state dict lies in files that hold more: mealfast's checkpoints, timm's (EMA first, as timm does), others'.
_NESTED_KEYS = ("student", "state_dict_ema", "model_ema", "state_dict", "model")


def read(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The state dict in a `.pth`, `.pt`, `.bin` or `.safetensors` file, with wrappers' prefixes removed.

    Never runs code from the file, and takes no more memory than the file is worth. Raises UsageError where it is
    missing, damaged or something else, and for tensors that are not plain (sparse, quantised, without values).
    """
    return read_described(path)[0]


def read_described(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], Description | None]:
    """`read`, and what the file says of itself, as mealfast's do. Raises UsageError, also where that is damaged."""
    path = Path(path)
    what = f"checkpoint {brief(str(path))}"
    described: object = None
    content: Any
    try:
        if not path.is_file():
            raise UsageError(f"{what}: no such file")
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
            with safetensors.safe_open(path, "pt") as file:
                described = (file.metadata() or {}).get(KEY)
        else:
            content = torch_load(path)
            if isinstance(content, dict) and str(content.get("format")).startswith("mealfast-checkpoint"):
                described = content.get("model")
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{what}: cannot be read ({error.strerror or why_unreadable(error)})") from error
    except Exception as error:  # a file that only looks like one of these formats can raise anything
        raise UsageError(f"{what}: cannot be read ({why_unreadable(error)})") from error
    for key in _NESTED_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    )
    if not tensors or not content:
        raise UsageError(f"{what}: holds no state dict; expected one, or one under 'state_dict' or 'model'")
    for key, tensor in content.items():
        if kind := _not_plain(tensor):
            raise UsageError(f"{what}: {brief(key)} is a {kind} tensor; save plain ones")
    return _without_shared_prefix(clean_state_dict(content)), _description(described, what)


def _description(content: object, what: str) -> Description | None:
    if content is None:
        return None
    try:
        return Description.loads(content) if isinstance(content, str) else Description.of(content)
    except ValueError as error:
        raise UsageError(f"{what}: what it says of itself is damaged ({error}); copy it again") from error


def _not_plain(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantised"
    return "" if tensor.layout == torch.strided else "sparse"


def _without_shared_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what all keys begin with, up to a dot: `model.`, `backbone.`, `student.` of a module around the model."""
    while len(state) > 1:
        prefix, dot, _ = next(iter(state)).partition(".")
        if not dot or not all(key.startswith(prefix + dot) for key in state):
            break
        state = {key.removeprefix(prefix + dot): tensor for key, tensor in state.items()}
    return state


def num_classes(spec: ModelSpec, state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """`{"num_classes": N}` as the checkpoint's classifier has it, or {} where that cannot be told."""
    config = timm.models.get_pretrained_cfg(spec.timm_name)
    classifier = config.classifier if config else None
    weight = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
    return {} if weight is None or weight.ndim == 0 else {"num_classes": weight.shape[0]}


def load(model: nn.Module, state: Mapping[str, torch.Tensor], spec: ModelSpec) -> None:
    """Loads a state dict, every key, into a model on the CPU. Floating-point weights may be of any precision.

    Raises UsageError that names the first difference: a key, a shape, or a kind of number (integers and complex numbers
    are no weights, and torch would cast them without a word).
    """
    names = model.state_dict()
    own = _without_shared_prefix(names)  # as `read` does to the file's
    # Files from before BatchNorm counted its batches lack the counters, and nothing but momentum=None reads them.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    shared = [key for key in own if key in state]
    shapes = [key for key in shared if own[key].shape != state[key].shape]
    kinds = [key for key in shared if not _casts(state[key], own[key])]
    if shapes:
        key = shapes[0]
        difference = f"{key} has shape {brief(str(list(state[key].shape)))}, not {list(own[key].shape)}"
    elif missing:
        difference = f"it lacks {missing[0]} and {len(missing) - 1} more of {len(own)} tensors"
    elif extra:
        difference = f"it has {brief(extra[0])} and {len(extra) - 1} more tensors that {spec.architecture} has not"
    elif kinds:
        key = kinds[0]
        difference = f"{key} holds {_dtype(state[key])}, not {_dtype(own[key])}"
    else:
        renamed = dict(zip(own, names, strict=True))
        model.load_state_dict({renamed[key]: tensor for key, tensor in state.items()}, strict=False)
        return
    raise UsageError(f"checkpoint {brief(spec.checkpoint)} is not one of {spec.architecture}: {difference}")


def _casts(stored: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a stored tensor's numbers are weights of the model's kind; 8-bit floats are not without their scales."""
    if own.is_floating_point():
        return stored.is_floating_point() and stored.dtype.itemsize > 1
    return not stored.is_floating_point() and not stored.is_complex()


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def save(model: nn.Module, path: Path, description: Description | None = None) -> None:
    """A model's weights under timm's keys in a safetensors file that says what they are, atomically. Raises OSError.

    Equal weights and descriptions are equal files.
    """
    state = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in model.state_dict().items()}
    metadata = {"format": "pt"} | ({} if description is None else {KEY: description.dumps()})
    # In memory first: what safetensors raises of a full disk is no OSError.
    content = _ordered(safetensors.torch.save(state, metadata=metadata))
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _ordered(content: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes several keys of them in random order.

    Eight bytes of length, that much JSON, then the tensors, whose places count from there; the JSON may end in spaces.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
