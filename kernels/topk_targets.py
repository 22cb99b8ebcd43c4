"""The writer of sparse targets: the ensemble's k largest probabilities, for a label cache.

Shape legend: B batch, K teachers, C classes, k entries to keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .checks import as_teachers, as_weights, check_k, check_temperature
from .dispatch import TRITON, unit_stride, uses_triton

if TRITON:
    from . import topk_targets_triton


def ensemble_topk(
    teacher_logits: Sequence[Tensor] | Tensor,
    k: int,
    *,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The k largest probabilities of the ensemble's target (MEAL V2, Eq. 1) and their classes.

    Args:
        teacher_logits: K tensors [B, C] or one [K, B, C], each of any floating dtype, K from 1 to 16.
        k: entries to keep, from 1 to C (at most 4096).
        weights: K non-negative numbers, scaled to sum to one; None weighs the teachers equally.
        temperature: divides every logit; positive.

    Returns:
        ids, int32 [B, k], and probabilities, float32 [B, k] (float64 where a teacher is float64): descending, of equal
        probabilities the lower class first, as they stand in the target (they sum to less than one). A NaN in a teacher
        makes that sample's probabilities NaN.

    Raises:
        ValueError: shapes or devices that differ, or an option out of its range.
    """
    teachers = [teacher.detach() for teacher in as_teachers(teacher_logits)]
    check_k(k, teachers[0].shape[1])
    weights = as_weights(weights, len(teachers))
    temperature = check_temperature(temperature)
    if uses_triton(*teachers):
        ids = teachers[0].new_empty((teachers[0].shape[0], k), dtype=torch.int32)
        probabilities = torch.empty_like(ids, dtype=torch.float32)
        rows = [unit_stride(teacher) for teacher in teachers]
        topk_targets_triton.ensemble_topk(rows, weights, temperature, ids, probabilities)
        return ids, probabilities
    target = reference.ensemble_target(teachers, weights, temperature)
    probabilities, ids = target.sort(dim=-1, descending=True, stable=True)
    return ids[:, :k].int(), probabilities[:, :k].contiguous()
