"""The formulas in plain PyTorch, for any floating dtype and device: what a CPU runs, and what the kernels must equal.

Shape legend: B batch, K teachers, C classes, k entries kept of each target.

Accuracy: sums and exponentials are in float64 on a CPU, where they take no time beside a model, and in float32 on
other devices unless an input is float64. What is left when 1 is taken from nearly 1 has no digits, so nothing here is
computed so: with Z = 1 + the sum of the exponentials of all classes but the largest, log Z is log1p of that sum.

Nothing here checks its arguments; the public functions do, see `arguments.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Of the losses: float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if tensors[0].device.type == "cpu" else result_dtype(*tensors)


def ensemble_target(teachers: Sequence[Tensor], weights: Sequence[float], temperature: float = 1.0) -> Tensor:
    """MEAL V2, Eq. 1: sum_k weights[k] softmax(teachers[k] / temperature), K tensors [B, C] -> [B, C]."""
    dtype = accumulation_dtype(*teachers)
    target = None
    for teacher, weight in zip(teachers, weights, strict=True):
        teacher = teacher.to(dtype)
        e = ((teacher - teacher.amax(dim=-1, keepdim=True)) / temperature).exp()
        factor = weight / e.sum(dim=-1, keepdim=True)  # torch.softmax on a CPU adds in a row, torch.sum in a cascade
        target = e * factor if target is None else torch.addcmul(target, e, factor)
    return target


def soft_cross_entropy(student: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """MEAL V2, Eq. 3: -sum_c target log softmax(student / temperature), [B, C] and [B, C] -> [B].

    A class with target 0 adds nothing, even where the student's logit is -inf.

    The gradient of the student's largest logit comes through the differences d from it: minus the sum of the others'.
    """
    student = student.to(accumulation_dtype(student, target))
    top = student.argmax(dim=-1, keepdim=True)
    d = (student - student.gather(-1, top)) / temperature
    is_top = torch.zeros_like(d, dtype=torch.bool).scatter(-1, top, True)
    log_z = d.exp().masked_fill(is_top, 0.0).sum(dim=-1).log1p()
    return target.sum(dim=-1) * log_z - (target * d.masked_fill(is_top | (target == 0), 0.0)).sum(dim=-1)


def entropy(target: Tensor) -> Tensor:
    """-sum_c target log target, [B, C] -> [B]: MEAL V2's KL (Eq. 2) is the cross-entropy (Eq. 3) less this."""
    return torch.special.entr(target).sum(dim=-1)


def densified(ids: Tensor, probabilities: Tensor, classes: int, remainder: str) -> Tensor:
    """The target [B, C] that ids [B, k] and probabilities [B, k] stand for; `classes` is C.

    "spread": the mass that is missing to 1, over the other C - k classes evenly (none is missing where C = k).
    "renormalise": the probabilities scaled to sum to one, 0 elsewhere.
    """
    total = probabilities.sum(dim=-1, keepdim=True)
    if remainder == "renormalise":
        rest = torch.zeros_like(total)
        probabilities = probabilities / total
    else:
        rest = (1.0 - total).clamp(min=0.0) / max(classes - ids.shape[1], 1)
    return rest.repeat(1, classes).scatter(1, ids.long(), probabilities)


def reduced(samples: Tensor, reduction: str) -> Tensor:
    """[..., B] -> [...] with "mean" or "sum", [..., B] with "none"."""
    if reduction == "none":
        return samples
    return samples.mean(dim=-1) if reduction == "mean" else samples.sum(dim=-1)
