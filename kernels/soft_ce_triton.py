"""Ensemble soft cross-entropy in Triton: loss, KL and the student's gradient in one launch.

    P    = sum_k w_k softmax(t_k / T)                    (MEAL V2, Eq. 1)
    d    = s - max s,  e = exp(d / T),  Z = sum_c e
    loss = log Z - sum_c P d / T                         (Eq. 3; both terms are 0 or more: nothing cancels)
    kl   = loss + sum_c P log P                          (Eq. 2)
    g    = (e / Z - P) * factor / T                      the student's gradient; factor: upstream, and 1/B for a mean

Shape legend: B batch, K teachers, C classes.
"""

# ruff: noqa: N803 (constants of a kernel are in capitals)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .row_triton import (
    assert_outputs,
    assert_rows,
    blocks,
    load_logits,
    log_sum,
    max_and_sum,
    over_temperature,
    programs,
    store_row,
    target_chunk,
    target_row,
    teacher_sums,
)


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
    log2e_over_t,
    one_over_t,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row that fits in registers: each logit is loaded once."""
    student_logits = load_logits(
        student + row * student_stride, 0, C, BLOCK, ""
    )  # first, to arrive while teachers reduce
    target = target_row(teachers, teacher_strides, weights, row, log2e_over_t, C, BLOCK)
    s = student_logits.to(tl.float32)
    d = s - tl.max(s, 0)
    e = tl.exp2(d * log2e_over_t)
    others = tl.sum(tl.where(d == 0.0, 0.0, e), 0)
    ties = tl.sum(tl.where(d == 0.0, 1.0, 0.0), 0)
    if loss is not None:
        value = log_sum(others, ties) - tl.sum(tl.where(target == 0.0, 0.0, target * d), 0) * one_over_t
        tl.store(loss + row, value)
        if kl is not None:
            tl.store(kl + row, value + tl.sum(tl.where(target == 0.0, 0.0, target * tl.log(target)), 0))
    if gradient is not None:
        g = (e * tl.div_rn(1.0, others + ties) - target) * (factor * one_over_t)
        store_row(gradient + row * C, 0, g, C, BLOCK)


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
    log2e_over_t,
    one_over_t,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of several chunks, swept twice."""
    tops, factors = teacher_sums(teachers, teacher_strides, weights, row, log2e_over_t, C, BLOCK)
    top, z = max_and_sum(student + row * student_stride, log2e_over_t, C, BLOCK)
    one_over_z = tl.div_rn(1.0, z)
    others = 0.0
    ties = 0.0
    expected_d = 0.0
    negative_entropy = 0.0
    for first in tl.range(0, C, BLOCK):
        target = target_chunk(teachers, teacher_strides, tops, factors, row, first, log2e_over_t, C, BLOCK)
        d = load_logits(student + row * student_stride, first, C, BLOCK, "evict_first").to(tl.float32) - top
        e = tl.exp2(d * log2e_over_t)
        if loss is not None:
            others += tl.sum(tl.where(d == 0.0, 0.0, e), 0)
            ties += tl.sum(tl.where(d == 0.0, 1.0, 0.0), 0)
            expected_d += tl.sum(tl.where(target == 0.0, 0.0, target * d), 0)
            if kl is not None:
                negative_entropy += tl.sum(tl.where(target == 0.0, 0.0, target * tl.log(target)), 0)
        if gradient is not None:
            g = (e * one_over_z - target) * (factor * one_over_t)
            store_row(gradient + row * C, first, g, C, BLOCK)
    if loss is not None:
        value = log_sum(others, ties) - expected_d * one_over_t
        tl.store(loss + row, value)
        if kl is not None:
            tl.store(kl + row, value + negative_entropy)


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
    log2e_over_t,
    one_over_t,
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
            log2e_over_t,
            one_over_t,
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
                    log2e_over_t,
                    one_over_t,
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
            factor,
            **over_temperature(temperature),
            upstream_stride=upstream.stride(0) if upstream is not None and upstream.ndim else 0,
            student_stride=student.stride(0),
            teacher_strides=tuple(teacher.stride(0) for teacher in teachers),
            C=student.shape[1],
            BLOCK=block,
            **options,
        )
