"""The formulas in plain PyTorch, for any floating dtype and device: what a CPU runs, and what the kernels must equal.

Shape legend: B batch, K teachers, C classes, k entries kept of each target.

Computed in float32, or float64 where an input is. Not by torch.softmax, which on a CPU adds up a row one number after
the other, where torch.sum adds up sums and rounds less: at C = 65,536 that shows in the loss.

Nothing here checks its arguments; the public functions do, see `checks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Of the losses: float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _exponentials(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """d = (logits - their largest) / temperature, e = exp(d) and Z = sum_c e, which is [B, 1]."""
    d = logits - logits.detach().amax(dim=-1, keepdim=True)
    if temperature != 1.0:
        d = d / temperature
    e = d.exp()
    return d, e, e.sum(dim=-1, keepdim=True)


def ensemble_target(teachers: Sequence[Tensor], weights: Sequence[float], temperature: float = 1.0) -> Tensor:
    """MEAL V2, Eq. 1: sum_k weights[k] softmax(teachers[k] / temperature), K tensors [B, C] -> [B, C]."""
    dtype = result_dtype(*teachers)
    target = None
    for teacher, weight in zip(teachers, weights, strict=True):
        _, e, z = _exponentials(teacher.to(dtype), temperature)
        target = e * (weight / z) if target is None else torch.addcmul(target, e, weight / z)
    return cast(Tensor, target)  # K is at least 1


def soft_cross_entropy(student: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """MEAL V2, Eq. 3: -sum_c target log softmax(student / temperature), [B, C] and [B, C] -> [B].

    A class with target 0 adds nothing, even where the student's logit is -inf.
    """
    d, _, z = _exponentials(student.to(result_dtype(student, target)), temperature)
    return (target * (z.log() - d)).masked_fill(target == 0, 0.0).sum(dim=-1)


def entropy(target: Tensor) -> Tensor:
    """-sum_c target log target, [B, C] -> [B]: MEAL V2's KL (Eq. 2) is the cross-entropy (Eq. 3) less this."""
    return torch.special.entr(target).sum(dim=-1)


def densified(ids: Tensor, probabilities: Tensor, classes: int, remainder: str) -> Tensor:
    """The target [B, C] that ids [B, k] and probabilities [B, k] stand for; `classes` is C.

    "spread": the mass that is missing to 1, over the other C - k classes evenly (none is missing where C = k).
    "renormalise": the probabilities scaled to sum to one, 0 elsewhere.
    """
    total = probabilities.sum(dim=-1, keepdim=True, dtype=torch.float64)  # of k; 1 - total may be next to nothing
    if remainder == "renormalise":
        rest = torch.zeros_like(probabilities[:, :1])
        probabilities = (probabilities / total).to(probabilities.dtype)
    else:
        rest = ((1.0 - total).clamp(min=0.0) / max(classes - ids.shape[1], 1)).to(probabilities.dtype)
    return rest.repeat(1, classes).scatter(1, ids.long(), probabilities)


def reduced(samples: Tensor, reduction: str) -> Tensor:
    """[..., B] -> [...] with "mean" or "sum", [..., B] with "none"."""
    if reduction == "none":
        return samples
    return samples.mean(dim=-1) if reduction == "mean" else samples.sum(dim=-1)
