"""Folded models compute what they computed before, and only BatchNorms that may go are gone."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mealfast.models.folding import fold_batch_norms

# Architecture: how many of its BatchNorms follow a convolution and nothing else reads that (None: all of them).
MODELS = {
    "resnet18": None,  # BatchNorm2d, activations apart
    "resnet26t": None,  # deep stem, average-pool downsampling
    "tf_mobilenetv3_small_075": None,  # BatchNormAct2d, Conv2dSame
    "seresnet18": None,  # squeeze-and-excitation after the last BatchNorm
    "densenet121": 59,  # 62 stand before a convolution, after a concatenation
    "resnetv2_18": 8,  # pre-activation: one in each block; before the others lies the skip connection's sum
    "repvgg_a0": 44,  # 17 of them normalise the block's input
    "vit_tiny_patch16_224": 0,  # none there
}


def shaken(model: nn.Module) -> nn.Module:
    """Running statistics and affine parameters as training leaves them; folding fresh ones changes nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.uniform_(module.bias, -0.3, 0.3, generator=generator)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_is_the_model(name):
    torch.manual_seed(1)
    model = shaken(timm.create_model(name, num_classes=7)).double()
    size = 224 if "vit" in name else 64
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    before, expected = norms(model), model(images)
    folded = fold_batch_norms(model, images[:1])
    assert folded == (before if MODELS[name] is None else MODELS[name])
    assert norms(model) == before - folded
    # float64 through and through: a wrong fold is off by percents, rounding by 1e-14.
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-11 * float(expected.detach().abs().max()))


class Block(nn.Module):
    """A convolution and a BatchNorm whose fate `forward` decides."""

    def __init__(self, forward, convolution=None, norm=None):
        super().__init__()
        self.conv = convolution or nn.Conv2d(3, 4, 3)
        self.bn = norm or nn.BatchNorm2d(4)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


class Doubling(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def relu(x):
    return x.relu()


REFUSED = {
    "the output is read again": Block(lambda m, x: (y := m.conv(x)) + m.bn(y)),
    "the output is changed in between": Block(lambda m, x: m.bn(relu(m.conv(x)))),
    "the output is changed in place": Block(lambda m, x: m.bn(m.conv(x).mul_(2))),
    "the convolution runs twice": Block(lambda m, x: m.bn(m.conv(x)) + m.conv(x)),
    "the BatchNorm runs twice": Block(lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(x) + 1)),
    "a subclass computes something else": Block(lambda m, x: m.bn(m.conv(x)), Doubling(3, 4, 3)),
    "statistics of the batch": Block(lambda m, x: m.bn(m.conv(x)), norm=nn.BatchNorm2d(4, track_running_stats=False)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_must_not_be_folded_stays(why):
    block = REFUSED[why]
    if block.bn.running_mean is not None:
        shaken(block)
    block.eval()
    images = torch.randn(2, 3, 8, 8)
    expected = block(images.clone())
    assert fold_batch_norms(block, images[:1].clone()) == 0
    assert isinstance(block.bn, nn.BatchNorm2d)
    assert torch.equal(block(images.clone()), expected)


@pytest.mark.parametrize(
    ("convolution", "norm"),
    [
        (nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4, affine=False)),
        (Conv2dSame(3, 4, 3, stride=2), nn.BatchNorm2d(4, eps=1e-3)),
        (nn.Conv2d(3, 4, 3, bias=False), BatchNormAct2d(4, act_layer=nn.SiLU)),
    ],
    ids=["bias, no affine", "same padding", "with an activation"],
)
def test_kinds_of_convolutions_and_norms(convolution, norm):
    block = shaken(Block(lambda m, x: m.bn(m.conv(x)), convolution, norm))
    block.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 9, 9)
    y = convolution(images)
    shape = (1, -1, 1, 1)
    y = (y - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    if norm.affine:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    expected = y * torch.sigmoid(y) if isinstance(norm, BatchNormAct2d) else y
    assert fold_batch_norms(block, images[:1]) == 1
    torch.testing.assert_close(block(images), expected)
    assert block.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval mode"):
        fold_batch_norms(Block(lambda m, x: m.bn(m.conv(x))).train(), torch.zeros(1, 3, 8, 8))
