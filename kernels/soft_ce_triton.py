"""Ensemble soft cross-entropy in Triton: loss, KL and the student's gradient in one launch.

    P    = sum_k w_k softmax(t_k / T)                    (MEAL V2, Eq. 1)
    d    = s - max s,  e = exp(d / T),  Z = sum_c e
    loss = log Z - sum_c P d / T                         (Eq. 3; both terms are 0 or more: nothing cancels)
    kl   = loss + sum_c P log P                          (Eq. 2; 0 where rounding leaves less)
    g    = (e / Z - P) * factor                          the student's gradient; factor: upstream / T, / B for a mean
    g    = (sum_others P - sum_others e / Z) * factor    the same for the largest of the student's classes

Shape legend: B batch, K teachers, C classes.
"""

# ruff: noqa: N803 (constants of a kernel are in capitals)

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .row_triton import (
    LARGE,
    assert_outputs,
    assert_rows,
    blocks,
    exp_and_others,
    exp_over_t,
    exponent,
    load_logits,
    log1p,
    programs,
    store_row,
    sweep,
    target_chunk,
    target_row,
    teacher_sums,
    x_log2_x,
)

LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _store_samples(loss, kl, row, others, expected_d, negative_entropy, one_over_t):
    """Loss and KL of one row; negative_entropy is not read where KL is None."""
    value = log1p(others) - expected_d * one_over_t
    tl.store(loss + row, value)
    if kl is not None:
        divergence = value + negative_entropy
        tl.store(kl + row, tl.where(divergence < 0.0, 0.0, divergence))  # a NaN stays


@triton.jit
def _one_row(
    student,  # [B, C]
    teachers,  # K pointers to [B, C]
    weights,  # K floats that sum to one
    loss,  # float32 [B], or None
    kl,  # float32 [B], or None
    gradient,  # [B, C], contiguous, or None
    row,
    factor,
    one_over_t,
    exponent,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row that fits in registers: each logit is loaded once."""
    student_logits = load_logits(
        student + row * student_stride, 0, C, BLOCK, ""
    )  # first, to arrive while teachers reduce
    target = target_row(teachers, teacher_strides, weights, row, exponent, C, BLOCK)
    d, e, others = exp_and_others(student_logits.to(tl.float32), exponent)
    other_targets = tl.sum(tl.where(d == 0.0, 0.0, target), 0)
    # The d of the student's largest class where it and its target are best known from the others; else no d at all.
    from_others = tl.where(others < 1.0, tl.where(other_targets < 0.5, 0.0, 1.0), 1.0)
    if loss is not None:
        target_d = tl.where(target == 0.0, 0.0, target * d)
        if other_targets < 0.5:  # the largest term, if one stands out, is the 0 of d = 0
            expected_d = tl.sum(target_d, 0)
        else:
            expected_d = tl.sum(tl.where(target > LARGE, target_d, 0.0), 0)
            expected_d += tl.sum(tl.where(target > LARGE, 0.0, target_d), 0)
        x_log_x = tl.sum(tl.where(d == from_others, 0.0, x_log2_x(target)), 0) * LN2
        x_log_x += tl.where(from_others == 0.0, (1.0 - other_targets) * log1p(-other_targets), 0.0)
        _store_samples(loss, kl, row, others, expected_d, x_log_x, one_over_t)
    if gradient is not None:
        one_over_z = tl.div_rn(1.0, 1.0 + others)
        top_g = other_targets - others * one_over_z
        g = tl.where(d == from_others, top_g, e * one_over_z - target)
        store_row(gradient + row * C, 0, g * factor, C, BLOCK)


@triton.jit
def _long_row(
    student,  # [B, C]
    teachers,  # K pointers to [B, C]
    weights,  # K floats that sum to one
    loss,  # float32 [B], or None
    kl,  # float32 [B], or None
    gradient,  # [B, C], contiguous, or None
    row,
    factor,
    one_over_t,
    exponent,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of several chunks, swept twice."""
    sums = teacher_sums(teachers, teacher_strides, weights, row, exponent, C, BLOCK)
    top, at, rough_others = sweep(student + row * student_stride, exponent, C, BLOCK)
    one_over_z = tl.div_rn(1.0, 1.0 + rough_others)
    # A lane adds up its own classes, so that the loop holds no barrier.
    others = tl.zeros([BLOCK], tl.float32)
    other_targets = tl.zeros([BLOCK], tl.float32)
    top_target = tl.zeros([BLOCK], tl.float32)
    expected_d = tl.zeros([BLOCK], tl.float32)
    expected_large_d = tl.zeros([BLOCK], tl.float32)
    negative_entropy = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, C, BLOCK):
        target = target_chunk(teachers, teacher_strides, sums, row, first, exponent, C, BLOCK)
        s = load_logits(student + row * student_stride, first, C, BLOCK, "evict_first").to(tl.float32)
        e = exp_over_t(s, top, rough_others, exponent)
        is_top = first + tl.arange(0, BLOCK) == at
        others += tl.where(is_top, 0.0, e)
        other_targets += tl.where(is_top, 0.0, target)
        if loss is not None:
            target_d = tl.where(target == 0.0, 0.0, target * (s - top))
            expected_d += tl.where(target > LARGE, 0.0, target_d)
            expected_large_d += tl.where(target > LARGE, target_d, 0.0)
            if kl is not None:
                top_target += tl.where(is_top, target, 0.0)
                negative_entropy += tl.where(is_top, 0.0, x_log2_x(target))
        if gradient is not None:
            store_row(gradient + row * C, first, (e * one_over_z - target) * factor, C, BLOCK)
    sum_others = tl.sum(others, 0)
    sum_other_targets = tl.sum(other_targets, 0)
    if loss is not None:
        p = tl.sum(top_target, 0)
        top_log = tl.where(sum_other_targets < 0.5, log1p(-sum_other_targets), tl.log(p))
        x_log_x = tl.sum(negative_entropy, 0) * LN2 + tl.where(p == 0.0, 0.0, p * top_log)
        sum_expected_d = tl.sum(expected_d, 0) + tl.sum(expected_large_d, 0)
        _store_samples(loss, kl, row, sum_others, sum_expected_d, x_log_x, one_over_t)
    if gradient is not None:
        top_g = sum_other_targets - sum_others * one_over_z
        at = tl.where(sum_others < 1.0, at, C)  # else better known from itself, as it stands
        tl.debug_barrier()  # overwrites what another thread has just stored
        tl.store(gradient + row * C + at, (top_g * factor).to(gradient.dtype.element_ty), mask=at < C)


@triton.jit
def ensemble_soft_ce_kernel(
    student,  # [B, C]
    teachers,  # K pointers to [B, C]
    weights,  # K floats that sum to one
    loss,  # float32 [B], or None
    kl,  # float32 [B], or None
    gradient,  # [B, C], contiguous, or None
    upstream,  # None: forward; float32 [B], or [1] with upstream_stride 0: backward
    B,
    factor,
    one_over_t,
    exponent,  # of `row_triton.exponent`
    upstream_stride: tl.constexpr,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward: one program a row. Backward: the rows whose upstream gradient is not 1, anew, several a program."""
    do_row: tl.constexpr = _one_row if BLOCK >= C else _long_row
    program = tl.program_id(0).to(tl.int64)
    if upstream is None:
        do_row(
            student,
            teachers,
            weights,
            loss,
            kl,
            gradient,
            program,
            factor,
            one_over_t,
            exponent,
            student_stride,
            teacher_strides,
            C,
            BLOCK,
        )
    else:
        row = program
        while row < B:
            scale = tl.load(upstream + row * upstream_stride)
            if scale != 1.0:
                do_row(
                    student,
                    teachers,
                    weights,
                    loss,
                    kl,
                    gradient,
                    row,
                    scale * factor,
                    one_over_t,
                    exponent,
                    student_stride,
                    teacher_strides,
                    C,
                    BLOCK,
                )
            row += tl.num_programs(0)


def launch(
    student: torch.Tensor,
    teachers: Sequence[torch.Tensor],
    weights: Sequence[float],
    temperature: float,
    factor: float,
    *,
    loss: torch.Tensor | None = None,
    kl: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
) -> None:
    """Fills what is given of loss [B], kl [B] and gradient [B, C], the last of factor * loss; shapes as in the kernel.

    With `upstream`, a scalar or [B], rewrites the rows of the gradient where it is not 1.
    """
    assert len(teachers) == len(weights)
    for teacher in teachers:
        assert_rows(teacher, student)
    assert_outputs(student, loss, kl, gradient, upstream)
    block, options = blocks(student.shape[1])
    with torch.cuda.device_of(student):
        ensemble_soft_ce_kernel[programs(student.shape[0], upstream)](
            student,
            tuple(teachers),
            tuple(weights),
            loss,
            kl,
            gradient,
            upstream,
            student.shape[0],
            factor / temperature,
            1.0 / temperature,
            exponent(temperature),
            upstream_stride=upstream.stride(0) if upstream is not None and upstream.ndim else 0,
            student_stride=student.stride(0),
            teacher_strides=tuple(teacher.stride(0) for teacher in teachers),
            C=student.shape[1],
            BLOCK=block,
            **options,
        )
