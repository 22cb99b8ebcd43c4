"""The formulas in plain PyTorch, for any floating dtype and device: what a CPU runs, and what the kernels must equal.

Shape legend: B batch, K teachers, C classes, k entries kept of each target.

Sums and exponentials are in float32, or in float64 where an input is float64. Nothing here checks its arguments; the
public functions do, see `arguments.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def ensemble_target(teachers: Sequence[Tensor], weights: Sequence[float], temperature: float = 1.0) -> Tensor:
    """MEAL V2, Eq. 1: sum_k weights[k] softmax(teachers[k] / temperature), K tensors [B, C] -> [B, C]."""
    dtype = accumulation_dtype(*teachers)
    target = None
    for teacher, weight in zip(teachers, weights, strict=True):
        e = _shifted(teacher.to(dtype), temperature).exp()
        factor = weight / e.sum(dim=-1, keepdim=True)
        target = e * factor if target is None else torch.addcmul(target, e, factor)
    return target


def soft_cross_entropy(student: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """MEAL V2, Eq. 3: -sum_c target log softmax(student / temperature), [B, C] and [B, C] -> [B].

    A class with target 0 adds nothing, even where the student's logit is -inf.
    """
    d = _shifted(student.to(accumulation_dtype(student, target)), temperature)
    log_q = d - d.exp().sum(dim=-1, keepdim=True).log()
    return -(target * log_q.masked_fill(target == 0, 0.0)).sum(dim=-1)


def _shifted(logits: Tensor, temperature: float) -> Tensor:
    """(logits - their maximum) / temperature.

    Softmax in steps from here on: torch.sum adds in a cascade; on a CPU torch.softmax does not, and is off by 14 eps of
    float32 at 21,843 classes.
    """
    d = logits - logits.detach().amax(dim=-1, keepdim=True)
    return d if temperature == 1.0 else d / temperature


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
    """[B] -> a scalar with "mean" or "sum", [B] with "none"."""
    if reduction == "none":
        return samples
    return samples.mean() if reduction == "mean" else samples.sum()
