"""What MEAL V2's released code computes, written out by hand in any dtype, to compare with.

Shape legend: B images, K teachers, C classes.
"""

import torch
from torch import Tensor


def target(teachers: list[Tensor]) -> Tensor:
    """Mean of the softmaxes, [B, C]."""
    return sum(torch.softmax(t, dim=1) for t in teachers) / len(teachers)


def soft_cross_entropy(student: Tensor, teachers: list[Tensor]) -> Tensor:
    """Mean over the batch of -sum_c target log softmax(student)."""
    return -(target(teachers) * torch.log_softmax(student, dim=1)).sum(dim=1).mean()


def kl(student: Tensor, teachers: list[Tensor]) -> Tensor:
    """Mean over the batch of sum_c target (log target - log softmax(student))."""
    p = target(teachers)
    return (p * (p.log() - torch.log_softmax(student, dim=1))).sum(dim=1).mean()


def discriminator_loss(student: Tensor, teachers: list[Tensor], layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Three 1x1 convolutions, each with a ReLU (on the output too), on student and mean teacher logits; BCE with
    logits against [1, 0] for the student and [0, 1] for the teachers, written out."""
    rows = torch.cat((student, sum(teachers) / len(teachers)))[:, :, None, None]  # [2B, C, 1, 1]
    for weight, bias in layers:
        rows = torch.relu(torch.nn.functional.conv2d(rows, weight[:, :, None, None], bias))
    z = rows[:, :, 0, 0]
    y = torch.zeros_like(z)
    y[: len(student), 0] = 1
    y[len(student) :, 1] = 1
    return -(y * torch.log(torch.sigmoid(z)) + (1 - y) * torch.log(1 - torch.sigmoid(z))).mean()


def rand_bbox(size: int, generator) -> tuple[int, int, int, int]:
    """CutMix's box on a square image with beta = 1: (top, left, bottom, right), NumPy's generator."""
    lam = generator.beta(1.0, 1.0)
    cut = int(size * (1.0 - lam) ** 0.5)
    x, y = generator.integers(size), generator.integers(size)
    x1, x2 = max(x - cut // 2, 0), min(x + cut // 2, size)
    y1, y2 = max(y - cut // 2, 0), min(y + cut // 2, size)
    return y1, x1, y2, x2
