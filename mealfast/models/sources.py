"""Where a spec's weights come from, and what is said of them there: a weights file, a run directory, a folder as timm
saves models, a repository of such on the hub. Weights and plain values only; no code of theirs is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mealfast.errors import UsageError
from mealfast.machine.files import brief, parsed_object
from mealfast.models import hub, weights
from mealfast.models.class_names import Names, check_names, imagenet
from mealfast.models.description import LARGEST, Description
from mealfast.models.spec import FOLDER, HUB, PATH, ModelSpec

STUDENT = "student.safetensors"  # of a run directory
CONFIG = "config.json"  # of a folder as timm saves models, and of a run directory
_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # in timm's order


@dataclass(frozen=True)
class Source:
    """A spec that names its architecture, with the weights from its file."""

    spec: ModelSpec
    state: dict[str, torch.Tensor] | None = None  # None: those of its tag, or random ones
    description: Description | None = None  # what the file says of itself, if it is of the spec's architecture


def find(spec: ModelSpec) -> Source:
    """Reads what a spec points to. Raises UsageError where it is missing or damaged, or says too little."""
    if spec.source in (FOLDER, HUB):
        return _timm(spec, *_files_of(spec))
    if not spec.checkpoint:
        return Source(spec)
    path = Path(spec.checkpoint)
    if os.path.isdir(path):  # a name that is too long is none
        if spec.source == PATH and not (path / STUDENT).is_file() and _is_timms(path / CONFIG):
            return _timm(spec, path / CONFIG, _weights_in(path))
        path = _of_run(path)
    state, description = weights.read_described(path)
    spec = replace(spec, checkpoint=str(path))
    if not spec.source:
        same = description is not None and description.architecture == spec.architecture
        return Source(spec, state, description if same else None)
    if description is None:
        raise UsageError(
            f"model spec '{brief(spec.text)}': is a file; say of which architecture: NAME@{brief(spec.text)}"
        )
    return Source(_of(spec, description), state, description)


def _of(spec: ModelSpec, description: Description) -> ModelSpec:
    """The spec with the architecture and arguments that are described; its own arguments go over them."""
    return replace(spec, architecture=description.architecture, kwargs={**description.kwargs, **spec.kwargs})


def _of_run(folder: Path) -> Path:
    if (folder / STUDENT).is_file():
        return folder / STUDENT
    found = sorted((folder / "checkpoints").glob("*.pt"))
    other = f"name one of its checkpoints: {brief(str(found[0]))}" if found else "name one that a run has finished in"
    raise UsageError(f"checkpoint {brief(str(folder))}: is a folder without {STUDENT}; {other}")


# -- folders and repositories as timm saves models ---------------------------------------------------------------------


def _files_of(spec: ModelSpec) -> tuple[Path, Path]:
    """config.json and the weights file."""
    if spec.source == FOLDER:
        folder = Path(spec.checkpoint)
        if not (folder / CONFIG).is_file():
            raise UsageError(
                f"model spec '{brief(spec.text)}': no {CONFIG} in {brief(str(folder))}; name a folder that timm or "
                "`mealfast export` has saved a model in"
            )
        return folder / CONFIG, _weights_in(folder)
    return hub.files(spec, CONFIG, _FILES)


def _weights_in(folder: Path) -> Path:
    named = [folder / name for name in _FILES if (folder / name).is_file()]
    others = [path for ending in ("safetensors", "pth", "bin") for path in sorted(folder.glob(f"*.{ending}"))]
    if not named and len(others) != 1:
        raise UsageError(f"{brief(str(folder))}: holds {len(others)} weights files; it must hold {_FILES[0]}")
    return (named or others)[0]


def _is_timms(config: Path) -> bool:
    try:
        return "architecture" in _object(config)
    except (OSError, ValueError):
        return False


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError, ValueError."""
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST} bytes")
    return parsed_object(data.decode())


def _timm(spec: ModelSpec, config: Path, file: Path) -> Source:
    try:
        description = described_by_timm(_object(config))
    except OSError as error:
        raise UsageError(f"{brief(str(config))}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"{brief(str(config))}: is no config.json of a timm model ({error})") from error
    return Source(replace(_of(spec, description), checkpoint=str(file)), weights.read(file), description)


def described_by_timm(config: Mapping[str, Any]) -> Description:
    """The description in timm's config.json (`timm.models.save_for_hf`). Raises ValueError: it may be a stranger's."""
    inner = config.get("pretrained_cfg", config)
    arguments = config.get("model_args", {})
    if not isinstance(inner, Mapping) or not isinstance(arguments, Mapping):
        raise ValueError("its pretrained_cfg and model_args must be objects")
    outputs = config.get("num_classes", inner.get("num_classes"))
    if type(outputs) is not int or outputs < 1:
        raise ValueError("its num_classes must be 1 or more")
    kwargs = {key: value for key, value in arguments.items() if value is not None and (key, value) != ("in_chans", 3)}
    size = inner.get("input_size")
    return Description.of(
        {
            "architecture": config.get("architecture"),
            "kwargs": {**kwargs, "num_classes": outputs},
            "mean": inner.get("mean"),
            "std": inner.get("std"),
            "size": size[-1] if isinstance(size, list) and size else None,
            "classes": _label_names(config, inner, outputs),
        }
    )


def _label_names(config: Mapping[str, Any], inner: Mapping[str, Any], outputs: int) -> Names | None:
    """The name of each output; None where there are none, or where they do not tell the outputs apart."""
    names = config.get("label_names") or inner.get("label_names") or config.get("labels")
    if isinstance(names, Mapping):  # number -> name
        names = [names.get(str(number)) for number in range(min(outputs, len(names) + 1))]
    try:
        return checked if len(checked := check_names(names)) == outputs else None
    except ValueError:
        in1k = str(inner.get("tag", config.get("tag"))).endswith("in1k")
        return imagenet() if in1k and outputs == len(imagenet()) and names is None else None
