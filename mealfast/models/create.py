"""timm's model of a spec, with a line for whatever timm says against it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from mealfast.errors import UsageError
from mealfast.machine.files import brief, reason
from mealfast.models import hub, weights
from mealfast.models.spec import ModelSpec

# Arguments of timm.create_model that a spec has other words for, or that make something else than such a model.
_NOT_IN_SPECS = frozenset(
    {
        "cache_dir", "checkpoint_path", "features_only", "in_chans", "pretrained", "pretrained_cfg",
        "pretrained_cfg_overlay",
    }
)  # fmt: skip


def check_names(spec: ModelSpec) -> None:
    """Raises UsageError where timm knows no such architecture, tag or argument."""
    if not timm.is_model(spec.architecture):
        if not spec.source and _is_folder(spec.text):
            raise UsageError(f"model spec {quoted(spec.text)}: is a folder that holds no model; name a run directory")
        close = difflib.get_close_matches(spec.architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UsageError(
            f"model spec {quoted(spec.text)}: timm has no architecture '{brief(spec.architecture, 60)}'; {hint}"
        )
    for key in sorted(_NOT_IN_SPECS & set(spec.kwargs)):
        raise UsageError(
            f"model spec {quoted(spec.text)}: {key} cannot be set; weights are NAME.TAG or NAME@FILE, images have 3 "
            "channels"
        )
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{spec.architecture}.*")]
    if spec.tag and spec.tag not in tags:
        known = ", ".join(tags) or "none"
        raise UsageError(
            f"model spec {quoted(spec.text)}: no tag '{brief(spec.tag, 60)}'; timm's for {spec.architecture}: {known}"
        )


def _is_folder(text: str) -> bool:
    try:
        return Path(text).expanduser().is_dir()
    except (OSError, RuntimeError):  # too long; a home of nobody
        return False


def create(
    spec: ModelSpec, state: dict[str, torch.Tensor] | None, size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and what else of timm.create_model's arguments than weights made it."""
    kwargs = dict(spec.kwargs)
    if state is not None and "num_classes" not in kwargs:
        kwargs.update(weights.num_classes(spec, state))
    config = timm.models.get_pretrained_cfg(spec.timm_name)
    if size is not None and config is not None and config.fixed_input_size and "img_size" not in kwargs:
        kwargs["img_size"] = size
    pretrained = bool(spec.tag) and state is None
    where = hub.local_weights(spec, config) if pretrained else {}
    try:
        return timm.create_model(spec.timm_name, pretrained=pretrained, **kwargs, **where), kwargs
    except Exception as error:  # an argument that a constructor does not expect can raise anything
        if isinstance(error, OSError):  # of the hub's client, urllib's among them
            raise hub.no_weights(spec, reason(error)) from error
        raise UsageError(f"model spec {quoted(spec.text)}: timm cannot build it: {reason(error)}") from error


def quoted(text: str) -> str:
    """A spec as a line quotes it."""
    return f"'{brief(text)}'"
