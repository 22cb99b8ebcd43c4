"""From a model spec to a module that takes uint8 images and normalises them itself.

Shape legend: B images, H and W pixels, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import nn

from mealfast.errors import UsageError
from mealfast.machine.files import reason
from mealfast.machine.precision import has_amx, precision
from mealfast.models import sources, weights
from mealfast.models.class_names import Names, imagenet
from mealfast.models.class_order import Named, Order
from mealfast.models.create import check_names, create, quoted
from mealfast.models.description import Description
from mealfast.models.spec import ModelSpec, parse


class NormalizedModel(nn.Module):
    """A timm model behind its own preprocessing: uint8 [B, H, W, 3] -> logits [B, C].

    `permute` turns NHWC bytes into a channels-last NCHW view without a copy; the cast and the normalisation are one
    pointwise operation, which torch.compile fuses into the first convolution's input.
    """

    scale: torch.Tensor  # [1, 3, 1, 1]: 1 / (255 std)
    shift: torch.Tensor  # [1, 3, 1, 1]: -mean / std
    order: torch.Tensor | None  # int64 [C]: the model's output that becomes each output here; None: as they are

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], size: int) -> None:
        """`mean` and `std` are of pixels in [0, 1], one a channel."""
        super().__init__()
        self.model = model
        self.size = size  # pixels a side that it was built for
        self.classes: Names | None = None  # name of each output; None: not known
        self.new_outputs = False  # random ones, which stand for no class yet
        self.trained_size: int | None = None  # pixels a side, where its file says so
        self.architecture, self.kwargs = "", dict[str, Any]()  # what timm.create_model made it of
        self.mean, self.std = tuple(mean), tuple(std)
        self.register_buffer("order", None, persistent=False)
        # Not in the state dict: a checkpoint of the model is timm's, key for key.
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer(
            "shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1), persistent=False
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.permute(0, 3, 1, 2).to(self.scale.dtype)
        logits: torch.Tensor = self.model(x * self.scale + self.shift)
        # Of the logits and not of the classifier's rows: exact for every architecture, and the weights stay the file's.
        return logits if self.order is None else logits.index_select(1, self.order)

    def take_order(self, order: Order | None, names: Names | None) -> None:
        """From now on output i is what the model's own output `order[i]` is (None: its output i), named `names[i]`."""
        self.order = None if order is None else torch.tensor(order, device=self.scale.device)
        self.classes = names

    def description(self, size: int, teachers: Sequence[Mapping[str, str]] = ()) -> Description:
        """Of the model as it is, trained at `size` pixels by `teachers`, for its file to say."""
        return Description(
            self.architecture, self.kwargs, self.mean, self.std, size, self.classes, tuple(map(dict, teachers))
        )

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
    if not spec.source:
        check_names(spec)
    source = sources.find(spec)
    spec, state, described = source.spec, source.state, source.description
    check_names(spec)
    model, kwargs = create(spec, state, size)
    if state is not None:
        weights.load(model, state, spec)
    config = timm.data.resolve_model_data_config(model)
    if config["input_size"][0] != 3:
        raise UsageError(f"model spec {quoted(spec.text)}: takes {config['input_size'][0]} channels; images have 3")
    mean, std = (described.mean, described.std) if described else (config["mean"], config["std"])
    own_size = described.size if described else None
    normalised = NormalizedModel(model, mean, std, size or own_size or config["input_size"][-1])
    normalised.trained_size = own_size
    normalised.architecture, normalised.kwargs = spec.architecture, kwargs
    _name_outputs(normalised, spec, state is not None, described)
    return normalised


def _name_outputs(model: NormalizedModel, spec: ModelSpec, loaded: bool, described: Description | None) -> None:
    """What is known of the classes: what the file says; ImageNet's for timm's weights of it."""
    outputs = model.num_classes
    model.kwargs["num_classes"] = outputs  # said, since timm's default moves with the tag
    pretrained = timm.models.get_pretrained_cfg(spec.timm_name) if spec.tag else None
    model.new_outputs = not loaded and (pretrained is None or pretrained.num_classes != outputs)
    if described is not None and described.classes is not None:
        if len(described.classes) != outputs:
            raise UsageError(
                f"model spec {quoted(spec.text)}: has {outputs} outputs, but its file names {len(described.classes)} "
                "classes"
            )
        model.classes = described.classes
    elif pretrained is not None and outputs == len(imagenet()) and spec.tag.endswith("in1k") and not model.new_outputs:
        model.classes = imagenet()


def named(what: str, model: NormalizedModel) -> Named:
    """A model as `class_names.agree` takes it; `what` is how a line calls it."""
    return Named(what, model.classes, model.new_outputs)


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
        others = {own, parse(spec).kwargs.get("img_size", own), model.trained_size or own} - {size}
        if any(isinstance(other, int) and _takes(model, other) for other in others):
            raise UsageError(
                f"model spec {quoted(spec)} cannot take {size} x {size} pixels: {reason(error)}; change --size"
            ) from error
        raise UsageError(f"model spec {quoted(spec)}: the model does not run: {reason(error)}") from error
    finally:
        model.train(training)
    if logits.ndim != 2 or logits.shape[1] != model.num_classes:
        raise UsageError(f"model spec {quoted(spec)} is no classifier: its output has shape {list(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise UsageError(f"model spec {quoted(spec)} gives non-finite logits: its weights are damaged")


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
