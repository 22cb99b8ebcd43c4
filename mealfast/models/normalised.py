"""From a model spec to a module that takes uint8 images and normalises them itself.

Shape legend: B images, H and W pixels, C classes.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from mealfast.errors import UsageError
from mealfast.machine.files import brief, reason
from mealfast.machine.precision import has_amx, precision
from mealfast.models import hub, weights
from mealfast.models.spec import ModelSpec, parse

# Arguments of timm.create_model that a spec has other words for, or that make something else than such a model.
_NOT_IN_SPECS = frozenset(
    {
        "cache_dir", "checkpoint_path", "features_only", "in_chans", "pretrained", "pretrained_cfg",
        "pretrained_cfg_overlay",
    }
)  # fmt: skip


class NormalizedModel(nn.Module):
    """A timm model behind its own preprocessing: uint8 [B, H, W, 3] -> logits [B, C].

    `permute` turns NHWC bytes into a channels-last NCHW view without a copy; the cast and the normalisation are one
    pointwise operation, which torch.compile fuses into the first convolution's input.
    """

    scale: torch.Tensor  # [1, 3, 1, 1]: 1 / (255 std)
    shift: torch.Tensor  # [1, 3, 1, 1]: -mean / std

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], size: int) -> None:
        """`mean` and `std` are of pixels in [0, 1], one a channel."""
        super().__init__()
        self.model = model
        self.size = size  # pixels a side that it was built for
        # Not in the state dict: a checkpoint of the model is timm's, key for key.
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer(
            "shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1), persistent=False
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.permute(0, 3, 1, 2).to(self.scale.dtype)
        return self.model(x * self.scale + self.shift)

    @property
    def num_classes(self) -> int:
        """Outputs, C."""
        return int(self.model.num_classes)  # type: ignore[arg-type]  # timm's attribute


def build(spec: str | ModelSpec, size: int | None = None) -> NormalizedModel:
    """The model of a spec on the CPU in float32, with its weights, its own mean and std, in training mode.

    `size` (pixels) is handed to architectures that are built for one input size (vision transformers). Raises
    UsageError where the architecture, tag, keyword arguments or weights are wrong or cannot be had.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    _check_names(spec)
    state = weights.read(spec.checkpoint) if spec.checkpoint else None
    model = _create(spec, state, size)
    if state is not None:
        weights.load(model, state, spec)
    config = timm.data.resolve_model_data_config(model)
    if config["input_size"][0] != 3:
        raise UsageError(f"model spec {_quoted(spec.text)}: takes {config['input_size'][0]} channels; images have 3")
    return NormalizedModel(model, config["mean"], config["std"], size or config["input_size"][-1])


def evaluation_config(model: NormalizedModel) -> dict[str, Any]:
    """timm's own evaluation of a model: {"size" (pixels), "crop_pct", "interpolation"}."""
    config = timm.data.resolve_model_data_config(model.model, use_test_size=False)
    return {
        "size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }


def is_random(spec: str) -> bool:
    """No tag and no checkpoint means random weights."""
    parsed = parse(spec)
    return not parsed.tag and not parsed.checkpoint


def random_notes(specs: Sequence[str]) -> list[str]:
    """What to tell the user of models with random weights that did not ask for them."""
    return [
        f"note: {spec} has random weights (no tag and no checkpoint)"
        for spec in specs
        if is_random(spec) and not parse(spec).random
    ]


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights: names, shapes, dtypes and bytes."""
    sha = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        sha.update(f"{key} {tuple(tensor.shape)} {tensor.dtype};".encode())
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def check_distinct(specs: Sequence[str], digests: Sequence[str]) -> None:
    """Refuses an ensemble that holds the same weights twice: its mean would be that of fewer teachers."""
    seen: dict[str, str] = {}
    for spec, value in zip(specs, digests, strict=True):
        if value in seen:
            raise UsageError(f"--teachers {seen[value]} and {spec} have the same weights: name different teachers")
        seen[value] = spec


def check_classes(
    specs: Sequence[str],
    models: Sequence[NormalizedModel],
    student: tuple[str, int] | None = None,
    option: str = "--teachers",
) -> int:
    """The number of outputs of all models, C: that of the student (its name, C), or else of the first.

    Raises UsageError, which names the `option` that gave the specs, where they differ.
    """
    other, classes = (f"the student {student[0]}", student[1]) if student else (specs[0], models[0].num_classes)
    for spec, model in zip(specs, models, strict=True):
        if model.num_classes != classes:
            raise UsageError(
                f"{option} {spec} has {model.num_classes} classes, {other} has {classes}: they must agree "
                "(?num_classes=N in a spec sets them)"
            )
    return classes


def precision_of(model: nn.Module, amp: str, device: torch.device) -> torch.dtype:
    """What `--amp` means for one model: "auto" is bfloat16 where the device computes this model faster in it.

    Raises UsageError where the device does not have the dtype.
    """
    # On a CPU with AVX512-BF16 alone bf16 is twice as fast as float32 for ResNets, and half to three quarters as fast
    # for MobileNets and EfficientNets.
    depthwise = any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in model.modules())
    if amp == "auto" and device.type == "cpu" and depthwise and not has_amx():
        return torch.float32
    return precision(amp, device)


def probe(model: NormalizedModel, spec: str, size: int) -> None:
    """Runs one grey image through a model, so that a size it cannot take is refused before anything starts.

    Raises UsageError: for the size where another one works, else for the spec; for outputs that are no finite logits.
    """
    training = model.training
    model.eval()
    try:
        logits = _of_grey(model, size)
    except Exception as error:
        own = timm.data.resolve_model_data_config(model.model)["input_size"][-1]
        others = {own, parse(spec).kwargs.get("img_size", own)} - {size}
        if any(isinstance(other, int) and _takes(model, other) for other in others):
            raise UsageError(
                f"model spec {_quoted(spec)} cannot take {size} x {size} pixels: {reason(error)}; change --size"
            ) from error
        raise UsageError(f"model spec {_quoted(spec)}: the model does not run: {reason(error)}") from error
    finally:
        model.train(training)
    if logits.ndim != 2 or logits.shape[1] != model.num_classes:
        raise UsageError(f"model spec {_quoted(spec)} is no classifier: its output has shape {list(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise UsageError(f"model spec {_quoted(spec)} gives non-finite logits: its weights are damaged")


def _of_grey(model: NormalizedModel, size: int) -> torch.Tensor:
    """Logits [1, C] of one grey image."""
    with torch.inference_mode():
        return model(torch.full((1, size, size, 3), 128, dtype=torch.uint8, device=model.scale.device))


def _takes(model: NormalizedModel, size: int) -> bool:
    try:
        _of_grey(model, size)
    except Exception:
        return False
    return True


def _check_names(spec: ModelSpec) -> None:
    if not timm.is_model(spec.architecture):
        if _is_file(spec.text):
            raise UsageError(
                f"model spec {_quoted(spec.text)}: is a file; say of which architecture: NAME@{brief(spec.text)}"
            )
        close = difflib.get_close_matches(spec.architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UsageError(
            f"model spec {_quoted(spec.text)}: timm has no architecture '{brief(spec.architecture, 60)}'; {hint}"
        )
    for key in sorted(_NOT_IN_SPECS & set(spec.kwargs)):
        raise UsageError(
            f"model spec {_quoted(spec.text)}: {key} cannot be set; weights are NAME.TAG or NAME@FILE, images have 3 "
            "channels"
        )
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{spec.architecture}.*")]
    if spec.tag and spec.tag not in tags:
        known = ", ".join(tags) or "none"
        raise UsageError(
            f"model spec {_quoted(spec.text)}: no tag '{brief(spec.tag, 60)}'; timm's for {spec.architecture}: {known}"
        )


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, RuntimeError):  # too long; a home of nobody
        return False


def _create(spec: ModelSpec, state: dict[str, torch.Tensor] | None, size: int | None) -> nn.Module:
    kwargs = dict(spec.kwargs)
    if state is not None and "num_classes" not in kwargs:
        kwargs.update(weights.num_classes(spec, state))
    config = timm.models.get_pretrained_cfg(spec.timm_name)
    if size is not None and config is not None and config.fixed_input_size and "img_size" not in kwargs:
        kwargs["img_size"] = size
    pretrained = bool(spec.tag) and state is None
    if pretrained:
        kwargs.update(hub.local_weights(spec, config))
    try:
        return timm.create_model(spec.timm_name, pretrained=pretrained, **kwargs)
    except Exception as error:  # an argument that a constructor does not expect can raise anything
        if isinstance(error, OSError):  # of the hub's client, urllib's among them
            raise hub.no_weights(spec, reason(error)) from error
        raise UsageError(f"model spec {_quoted(spec.text)}: timm cannot build it: {reason(error)}") from error


def _quoted(text: str) -> str:
    return f"'{brief(text)}'"
