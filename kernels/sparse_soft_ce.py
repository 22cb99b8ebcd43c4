"""Soft cross-entropy against cached, sparse targets: public function and custom ops.

Shape legend: B batch, C classes, k entries kept of each target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import check_logits, check_reduction, check_sparse, check_temperature
from .dispatch import TRITON, unit_stride, uses_triton
from .fused import FusedLoss

if TRITON:
    from .sparse_soft_ce_triton import sparse_soft_ce


def sparse_soft_cross_entropy(
    student_logits: Tensor,
    ids: Tensor,
    probabilities: Tensor,
    *,
    remainder: str = "spread",
    temperature: float = 1.0,
    reduction: str = "mean",
    return_kl: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Soft cross-entropy (MEAL V2, Eq. 3) against the k largest probabilities of a target P, as a label cache has them:

        loss_b = -sum_c P_bc log softmax(student_logits / T)_bc

    with P_bc = probabilities[b, j] where c = ids[b, j], and else what `remainder` says.

    Args:
        student_logits: [B, C], any floating dtype. The gradient comes back in its dtype.
        ids: uint16, int32 or int64 [B, k], the classes that were kept, k from 1 to C (at most 4096). Distinct within a
            row: this is not checked.
        probabilities: [B, k], any floating dtype. The target is taken as it stands: T does not touch it.
        remainder: "spread" gives the mass missing to 1 to the other C - k classes evenly; "renormalise" scales the
            kept probabilities to sum to one.
        temperature: T, positive; divides the student's logits.
        reduction: "mean" over B, "sum" over B, or "none".
        return_kl: also return KL(P || student) = loss - entropy(P), reduced in the same way and without gradient.

    Returns:
        The loss in nats, float32 (float64 where an input is float64): a scalar, or [B] with "none". With `return_kl`,
        (loss, kl). The edges are those of `ensemble_soft_cross_entropy`.

    Raises:
        ValueError: shapes or devices that differ (the line names both), or an option out of its range.
        RuntimeError: an id outside 0 to C - 1, on a CPU. On a GPU it makes its sample's loss and gradient NaN instead.
    """
    check_logits("student_logits", student_logits)
    check_sparse(student_logits, ids, probabilities, remainder)
    check_reduction(reduction)
    temperature = check_temperature(temperature)
    probabilities = probabilities.detach()

    if uses_triton(student_logits, probabilities):
        with_gradient = student_logits.requires_grad and torch.is_grad_enabled()
        rows = unit_stride(student_logits), ids.contiguous(), probabilities.contiguous()
        options = remainder, temperature, reduction
        loss, kl = FusedLoss.apply(sparse_soft_ce, options, return_kl, with_gradient, *rows)
        return (loss, kl) if return_kl else loss

    dtype = reference.result_dtype(student_logits, probabilities)
    target = reference.densified(ids, probabilities.to(dtype), student_logits.shape[1], remainder)
    samples = reference.soft_cross_entropy(student_logits, target, temperature)
    loss = reference.reduced(samples, reduction)
    if not return_kl:
        return loss
    return loss, reference.reduced(samples.detach() - reference.entropy(target), reduction)
