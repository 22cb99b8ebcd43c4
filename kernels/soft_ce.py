"""Ensemble soft cross-entropy: the distillation loss of MEAL V2 (Eq. 1 to 3).

Shape legend: B batch, K teachers, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import reference
from .arguments import as_teachers, as_weights, check_logits, check_reduction, check_same, check_temperature


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
        return_kl: also return MEAL V2's Eq. 2, KL(P || student) = loss - entropy(P), reduced in the same way and without
            gradient.

    Returns:
        The loss in nats, float32 (float64 where an input is float64): a scalar, or [B] with "none". With `return_kl`,
        (loss, kl).

    On the edges:
        a class with P = 0 adds nothing, even where the student's logit is -inf; a student's -inf where P > 0 makes that
        sample's loss +inf; a NaN makes its sample's loss and gradient NaN, and no other sample's; the mean of an empty
        batch is NaN (as in torch.nn.functional.cross_entropy), its sum 0.

    Raises:
        ValueError: shapes or devices that differ (the line names both), or an option out of its range.
    """
    teachers = as_teachers(teacher_logits)
    check_logits("student_logits", student_logits)
    check_same("student_logits", student_logits, "teacher_logits[0]", teachers[0])
    check_reduction(reduction)
    temperature = check_temperature(temperature)
    weights = as_weights(weights, len(teachers))

    target = reference.ensemble_target([teacher.detach() for teacher in teachers], weights, temperature)
    loss = reference.soft_cross_entropy(student_logits, target, temperature)
    if not return_kl:
        return _reduce(loss, reduction)
    kl = loss.detach() - reference.entropy(target)
    return _reduce(loss, reduction), _reduce(kl, reduction)


def _reduce(samples: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return samples
    return samples.mean() if reduction == "mean" else samples.sum()
