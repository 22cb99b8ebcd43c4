"""Ensemble soft cross-entropy, the distillation loss of MEAL V2 (Eq. 1 to 3): public functions and custom ops.

Shape legend: B batch, K teachers, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .checks import as_teachers, as_weights, check_logits, check_reduction, check_same, check_temperature
from .dispatch import TRITON, unit_stride, uses_triton
from .fused import FusedLoss

if TRITON:
    from .soft_ce_triton import ensemble_soft_ce


def ensemble_target(
    teacher_logits: Sequence[Tensor] | Tensor,
    *,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The ensemble's prediction, MEAL V2's Eq. 1: the weighted mean over the teachers of softmax(logits / temperature).

    Args:
        teacher_logits: K tensors [B, C] or one [K, B, C], any floating dtypes, K from 1 to 16.
        weights: K non-negative numbers, scaled to sum to one; None weighs the teachers equally.
        temperature: divides every logit; positive.

    Returns:
        float32 [B, C] (float64 where a teacher is float64), without gradient; each row sums to one.

    Raises:
        ValueError: shapes or devices that differ, or an option out of its range.
    """
    teachers = [teacher.detach() for teacher in as_teachers(teacher_logits)]
    return reference.ensemble_target(teachers, as_weights(weights, len(teachers)), check_temperature(temperature))


def ensemble_soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor] | Tensor,
    *,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    return_kl: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Soft cross-entropy between an ensemble of teachers and a student, MEAL V2's Eq. 1 and 3:

        P = sum_k w_k softmax(teacher_logits[k] / T)          the target
        loss_b = -sum_c P_bc log softmax(student_logits / T)_bc

    T divides the student's and the teachers' logits alike, and the loss is not multiplied by T^2.

    Args:
        student_logits: [B, C], any floating dtype. The gradient comes back in its dtype.
        teacher_logits: K tensors [B, C] or one [K, B, C], each of any floating dtype; no gradient flows to them.
        weights: K non-negative numbers w, scaled to sum to one; None weighs the teachers equally.
        temperature: T, positive.
        reduction: "mean" over B, "sum" over B, or "none".
        return_kl: also return MEAL V2's Eq. 2, KL(P || student) = loss - entropy(P), reduced in the same way and
            without gradient.

    Returns:
        The loss in nats, float32 (float64 where an input is float64): a scalar, or [B] with "none". With `return_kl`,
        (loss, kl).

    On the edges:
        a class with P = 0 adds nothing, even where the student's logit is -inf; a student's -inf where P > 0 makes that
        sample's loss +inf; a NaN makes its sample's loss and gradient NaN, and no other sample's; the mean of an empty
        batch is NaN (as in torch.nn.functional.cross_entropy), its sum 0.

    On a GPU one launch reads every logit once and writes the samples' losses, KLs and gradients; the mean or the sum of
    both is one more, small launch (in a fixed order, so that equal inputs give equal bits). Rows of unit stride
    are read where they are, others are copied first. Let this function take the mean: backward is free where the
    upstream gradient is 1, and elsewhere takes a second pass over the logits.

    Raises:
        ValueError: shapes or devices that differ (the line names both), or an option out of its range.
    """
    teachers = as_teachers(teacher_logits)
    check_logits("student_logits", student_logits)
    check_same("student_logits", student_logits, "teacher_logits[0]", teachers[0])
    check_reduction(reduction)
    temperature = check_temperature(temperature)
    weights = as_weights(weights, len(teachers))
    teachers = [teacher.detach() for teacher in teachers]

    if uses_triton(student_logits, *teachers):
        with_gradient = student_logits.requires_grad and torch.is_grad_enabled()
        rows = unit_stride(student_logits), *map(unit_stride, teachers)
        options = weights, temperature, reduction
        loss, kl = FusedLoss.apply(ensemble_soft_ce, options, return_kl, with_gradient, *rows)
        return (loss, kl) if return_kl else loss

    target = reference.ensemble_target(teachers, weights, temperature)
    samples = reference.soft_cross_entropy(student_logits, target, temperature)
    loss = reference.reduced(samples, reduction)
    if not return_kl:
        return loss
    kl = (samples.detach() - reference.entropy(target)).clamp(min=0.0)  # rounding may leave less than 0
    return loss, reference.reduced(kl, reduction)
