"""The plain timm module of a model, which says itself how images become its input and what its outputs mean."""

from __future__ import annotations

from typing import Any

from torch import nn

from mealfast.downstream.trained import Trained, data_config

# Of the weights that the architecture's name stands for: where they come from, and how timm would best test those.
_OF_OTHER_WEIGHTS = (
    "url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "custom_load", "tag", "notes", "paper_ids",
    "paper_name", "license", "origin_url", "min_input_size", "test_input_size", "test_crop_pct", "pool_size",
    "label_names", "label_descriptions", "label_offset",
)  # fmt: skip


def plain_model(trained: Trained) -> nn.Module:
    """timm's module, in evaluation mode: normalised float32 [B, 3, S, S] -> logits [B, C].

    `timm.data.create_transform(**timm.data.resolve_model_data_config(model))` cuts and normalises a Pillow image as
    mealfast evaluates it; `model.pretrained_cfg["label_names"]` names the outputs, where the names are known.
    """
    model: Any = trained.model.model  # with attributes of timm's
    config = {key: value for key, value in dict(model.pretrained_cfg).items() if key not in _OF_OTHER_WEIGHTS}
    config |= {**data_config(trained), "num_classes": trained.model.num_classes}
    if trained.model.classes is not None:
        config["label_names"] = list(trained.model.classes)
    # timm reads the one, older code the other.
    model.pretrained_cfg = model.default_cfg = config
    found: nn.Module = model
    return found


def constructor_arguments(trained: Trained) -> dict[str, Any]:
    """What timm.create_model needs beside the architecture's name and the number of classes to build the module."""
    arguments = {key: value for key, value in trained.model.kwargs.items() if key != "num_classes"}
    config: Any = trained.model.model.pretrained_cfg
    if config.get("fixed_input_size"):
        arguments["img_size"] = trained.model.size
    return arguments
