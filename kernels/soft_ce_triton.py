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
    AGAIN,
    LARGE,
    agrees,
    assert_outputs,
    assert_rows,
    blocks,
    divided,
    exp_and_others,
    exp_over_t,
    exponent,
    joined,
    load_logits,
    log1p,
    programs,
    real,
    split,
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
    weights,  # K floats of `row_triton.split` that sum to one
    loss,  # float32 [B], or None
    kl,  # float32 [B], or None
    gradient,  # [B, C], contiguous, or None
    row,
    factor,  # float64
    one_over_t,
    exponent,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """A row that fits in registers: each logit is loaded once. Whether the gradient wants float64: see `agrees`."""
    student_logits = load_logits(
        student + row * student_stride, 0, C, BLOCK, ""
    )  # first, to arrive while teachers reduce
    target, largest = target_row(teachers, teacher_strides, weights, row, exponent, C, BLOCK, REAL)
    d, e, others, ties = exp_and_others(student_logits.to(tl.float32), exponent, REAL)
    other_targets = tl.sum(tl.where(d == 0.0, 0.0, target), 0)
    # The d of the student's largest class where it and its target are best known from the others; else no d at all.
    from_others = tl.where(others < 1.0, tl.where(other_targets < 0.5, 0.0, 1.0), 1.0)
    if loss is not None:
        p = target.to(tl.float32)
        other_p = other_targets.to(tl.float32)
        p_d = tl.where(p == 0.0, 0.0, p * d)
        if other_p < 0.5:  # the largest term, if one stands out, is the 0 of d = 0
            expected_d = tl.sum(p_d, 0)
        else:
            expected_d = tl.sum(tl.where(p > LARGE, p_d, 0.0), 0)
            expected_d += tl.sum(tl.where(p > LARGE, 0.0, p_d), 0)
        x_log_x = tl.sum(tl.where(d == from_others, 0.0, x_log2_x(p)), 0) * LN2
        x_log_x += tl.where(from_others == 0.0, (1.0 - other_p) * log1p(-other_p), 0.0)
        _store_samples(loss, kl, row, others.to(tl.float32), expected_d, x_log_x, one_over_t)
    close = False
    if gradient is not None:
        one_over_z = divided(1.0, 1.0 + others)
        top_g = other_targets - others * one_over_z
        g = tl.where(d == from_others, top_g, e * one_over_z - target)
        store_row(gradient + row * C, 0, g * factor.to(REAL), C, BLOCK)
        if top_g.dtype == tl.float32:
            tops_g = other_targets - (others - ties) * one_over_z
            q_others = others * one_over_z
            close = agrees(tops_g, 1.0 + ties, one_over_z, q_others, largest, other_targets, gradient)
    return close


@triton.jit
def _long_row(
    student,  # [B, C]
    teachers,  # K pointers to [B, C]
    weights,  # K floats of `row_triton.split` that sum to one
    loss,  # float32 [B], or None
    kl,  # float32 [B], or None
    gradient,  # [B, C], contiguous, or None
    row,
    factor,  # float64
    one_over_t,
    exponent,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """A row in chunks, swept twice. Whether the gradient wants float64: see `agrees`."""
    sums = teacher_sums(teachers, teacher_strides, weights, row, exponent, C, BLOCK, REAL)
    top, at, rough_others = sweep(student + row * student_stride, exponent, C, BLOCK, REAL)
    one_over_z = divided(1.0, 1.0 + rough_others)
    # A lane adds up its own classes, so that the loop holds no barrier.
    others = tl.zeros([BLOCK], REAL)
    other_targets = tl.zeros([BLOCK], REAL)
    top_target = tl.zeros([BLOCK], tl.float32)
    expected_d = tl.zeros([BLOCK], tl.float32)
    expected_large_d = tl.zeros([BLOCK], tl.float32)
    negative_entropy = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, C, BLOCK):
        target = target_chunk(teachers, teacher_strides, sums, row, first, exponent, C, BLOCK, REAL)
        s = load_logits(student + row * student_stride, first, C, BLOCK, "evict_first").to(tl.float32)
        e = exp_over_t(s, top, rough_others, exponent, REAL)
        is_top = first + tl.arange(0, BLOCK) == at
        others += tl.where(is_top, 0.0, e)
        other_targets += tl.where(is_top, 0.0, target)
        if loss is not None:
            p = target.to(tl.float32)
            p_d = tl.where(p == 0.0, 0.0, p * (s - top))
            expected_d += tl.where(p > LARGE, 0.0, p_d)
            expected_large_d += tl.where(p > LARGE, p_d, 0.0)
            if kl is not None:
                top_target += tl.where(is_top, p, 0.0)
                negative_entropy += tl.where(is_top, 0.0, x_log2_x(p))
        if gradient is not None:
            store_row(gradient + row * C, first, (e * one_over_z - target) * factor.to(REAL), C, BLOCK)
    sum_others = tl.sum(others, 0)
    sum_other_targets = tl.sum(other_targets, 0)
    if loss is not None:
        p = tl.sum(top_target, 0)
        other_p = sum_other_targets.to(tl.float32)
        top_log = tl.where(other_p < 0.5, log1p(-other_p), tl.log(p))
        x_log_x = tl.sum(negative_entropy, 0) * LN2 + tl.where(p == 0.0, 0.0, p * top_log)
        sum_expected_d = tl.sum(expected_d, 0) + tl.sum(expected_large_d, 0)
        _store_samples(loss, kl, row, sum_others.to(tl.float32), sum_expected_d, x_log_x, one_over_t)
    close = False
    if gradient is not None:
        top_g = sum_other_targets - sum_others * one_over_z
        at = tl.where(sum_others < 1.0, at, C)  # else better known from itself, as it stands
        tl.debug_barrier()  # overwrites what another thread has just stored
        top_g_as_stored = (top_g * factor.to(REAL)).to(tl.float32).to(gradient.dtype.element_ty)
        tl.store(gradient + row * C + at, top_g_as_stored, mask=at < C)
        if top_g.dtype == tl.float32:
            _, _, factors = sums
            largest = 0.0
            for k in tl.static_range(len(teachers)):
                largest += factors[k]
            close = agrees(top_g, 1.0, one_over_z, sum_others * one_over_z, largest, sum_other_targets, gradient)
    return close


@triton.jit(noinline=True)
def _again(
    student,
    teachers,
    weights,
    gradient,
    row,
    factor,  # float64
    one_over_t,
    exponent,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's gradient in float64. A function of its own in the machine code too, so that the rows that do not need it
    give it no registers."""
    _long_row(
        student,
        teachers,
        weights,
        None,
        None,
        gradient,
        row,
        factor,
        one_over_t,
        exponent,
        student_stride,
        teacher_strides,
        C,
        BLOCK,
        tl.float64,
    )


@triton.jit
def _row(
    student,
    teachers,
    weights,
    loss,
    kl,
    gradient,
    row,
    factor,  # float64
    one_over_t,
    exponent,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """A row, and its gradient again in float64 where float32 did not do."""
    do_row: tl.constexpr = _one_row if BLOCK >= C else _long_row
    close = do_row(
        student,
        teachers,
        weights,
        loss,
        kl,
        gradient,
        row,
        factor,
        one_over_t,
        exponent,
        student_stride,
        teacher_strides,
        C,
        BLOCK,
        REAL,
    )
    if close:
        tl.debug_barrier()  # overwrites what other threads have just stored
        _again(
            student,
            teachers,
            weights,
            gradient,
            row,
            factor,
            one_over_t,
            exponent,
            student_stride,
            teacher_strides,
            C,
            min(BLOCK, AGAIN),
        )


@triton.jit
def ensemble_soft_ce_kernel(
    student,  # [B, C]
    teachers,  # K pointers to [B, C]
    weights,  # K floats of `row_triton.split` that sum to one
    loss,  # float32 [B], or None
    kl,  # float32 [B], or None
    gradient,  # [B, C], contiguous, or None
    upstream,  # None: forward; float32 [B], or [1] with upstream_stride 0: backward
    B,
    factor,  # of `row_triton.split`
    one_over_t,
    exponent,  # of `row_triton.exponent`
    upstream_stride: tl.constexpr,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """Forward: one program a row. Backward: the rows whose upstream gradient is not 1, anew, several a program."""
    program = tl.program_id(0).to(tl.int64)
    factor = joined(factor, tl.float64)
    if upstream is None:
        _row(
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
            REAL,
        )
    else:
        for row in tl.range(program, B, tl.num_programs(0), disable_licm=True):  # hoisting takes registers
            scale = tl.load(upstream + row * upstream_stride)
            if scale != 1.0:
                _row(
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
                    REAL,
                )


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
    dtype = real(gradient)
    block, options = blocks(student.shape[1], dtype)
    with torch.cuda.device_of(student):
        ensemble_soft_ce_kernel[programs(student.shape[0], upstream)](
            student,
            tuple(teachers),
            tuple(map(split, weights)),
            loss,
            kl,
            gradient,
            upstream,
            student.shape[0],
            split(factor / temperature),
            1.0 / temperature,
            exponent(temperature),
            upstream_stride=upstream.stride(0) if upstream is not None and upstream.ndim else 0,
            student_stride=student.stride(0),
            teacher_strides=tuple(teacher.stride(0) for teacher in teachers),
            C=student.shape[1],
            BLOCK=block,
            REAL=dtype,
            **options,
        )
