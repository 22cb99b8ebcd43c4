"""Ensemble soft cross-entropy in Triton: loss, KL and the student's gradient in one launch.

    P    = sum_k w_k softmax(t_k / T)            (MEAL V2, Eq. 1)
    d    = (s - max s) / (T ln 2)                so that exp((s - max s) / T) = 2^d
    Z    = sum_c 2^d
    loss = ln 2 (log2 Z - sum_c P d)             (Eq. 3; both terms are 0 or more: nothing cancels)
    kl   = loss + ln 2 sum_c P log2 P            (Eq. 2; 0 where rounding leaves less)
    g    = (2^d / Z - P) factor                  the student's gradient; factor: upstream / T, / B for a mean

Shape legend: B batch, K teachers, C classes.
"""

# ruff: noqa: N803 (constants of a kernel are in capitals)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_triton import LN2, launch, load_row, log2, max_and_sum, rows_at, store_row, x_log2_x


@triton.jit
def target_row(teachers, weights, log2e_over_t, C: tl.constexpr, BLOCK: tl.constexpr):
    """P [BLOCK] of one row, from K teachers' rows (pointers to [C]) that are loaded once each."""
    p = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(len(teachers)):
        t = load_row(teachers[k], 0, C, BLOCK)
        e = tl.exp2((t - tl.max(t, 0)) * log2e_over_t)
        p += e * (weights[k] / tl.sum(e, 0))
    return p


@triton.jit
def _store_samples(row, loss, kl, log2_z, p_d, p_log2_p):
    """Loss and, unless it is None, KL of one row, from the sums over its classes."""
    value = (log2_z - p_d) * LN2
    tl.store(loss + row, value)
    if kl is not None:
        divergence = value + p_log2_p * LN2
        tl.store(kl + row, tl.where(divergence < 0.0, 0.0, divergence))  # a NaN stays


@triton.jit
def _one_row(
    row,
    student,  # this row of it, a pointer to [C]
    teachers,  # K of them
    weights,  # K numbers that sum to one
    outputs,  # loss float32 [B], kl float32 [B], gradient [B, C]; each may be None
    factor,
    log2e_over_t,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row in registers: every logit is loaded once."""
    loss, kl, gradient = outputs
    s = load_row(student, 0, C, BLOCK)
    p = target_row(teachers, weights, log2e_over_t, C, BLOCK)
    d = (s - tl.max(s, 0)) * log2e_over_t
    e = tl.exp2(d)
    z = tl.sum(e, 0)
    if loss is not None:
        p_d = tl.sum(p * tl.where(p == 0.0, 0.0, d), 0)  # where P is 0, d may be -inf
        _store_samples(row, loss, kl, log2(z), p_d, tl.sum(x_log2_x(p), 0))
    if gradient is not None:
        store_row(gradient + row * C, 0, e * (factor / z) - p * factor, C, BLOCK)


@triton.jit
def target_factors(teachers, weights, log2e_over_t, C: tl.constexpr, BLOCK: tl.constexpr):
    """The first sweep over K long rows: what `target_chunk` needs of each, max t_k and w_k / sum_c exp."""
    tops = ()
    factors = ()
    for k in tl.static_range(len(teachers)):
        top, total = max_and_sum(teachers[k], log2e_over_t, C, BLOCK)
        tops = tops + (top,)  # noqa: RUF005 (Triton has no starred tuples)
        factors = factors + (weights[k] / total,)  # noqa: RUF005
    return tops, factors


@triton.jit
def target_chunk(teachers, first, of_teachers, log2e_over_t, C: tl.constexpr, BLOCK: tl.constexpr):
    """The second sweep: P of the classes first to first + BLOCK - 1; of_teachers is from `target_factors`."""
    tops, factors = of_teachers
    p = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(len(teachers)):
        p += tl.exp2((load_row(teachers[k], first, C, BLOCK) - tops[k]) * log2e_over_t) * factors[k]
    return p


@triton.jit
def _long_row(row, student, teachers, weights, outputs, factor, log2e_over_t, C: tl.constexpr, BLOCK: tl.constexpr):
    """`_one_row` in chunks, swept twice. Each lane adds up its own classes, so that the loop holds no barrier."""
    loss, kl, gradient = outputs
    of_teachers = target_factors(teachers, weights, log2e_over_t, C, BLOCK)
    top, z = max_and_sum(student, log2e_over_t, C, BLOCK)
    p_d = tl.zeros([BLOCK], tl.float32)
    p_log2_p = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, C, BLOCK):
        p = target_chunk(teachers, first, of_teachers, log2e_over_t, C, BLOCK)
        d = (load_row(student, first, C, BLOCK) - top) * log2e_over_t
        if loss is not None:
            p_d += p * tl.where(p == 0.0, 0.0, d)
            p_log2_p += x_log2_x(p)
        if gradient is not None:
            store_row(gradient + row * C, first, tl.exp2(d) * (factor / z) - p * factor, C, BLOCK)
    if loss is not None:
        _store_samples(row, loss, kl, log2(z), tl.sum(p_d, 0), tl.sum(p_log2_p, 0))


@triton.jit(do_not_specialize=["B"])
def ensemble_soft_ce_kernel(
    student,  # [B, C]
    teachers,  # K pointers to [B, C]
    weights,  # K numbers that sum to one
    loss,  # float32 [B], or None
    kl,  # float32 [B], or None
    gradient,  # [B, C], contiguous, or None
    upstream,  # None: forward; float32 [B], or [1] with upstream_stride 0: backward
    B,
    factor,
    log2e_over_t,
    upstream_stride: tl.constexpr,
    student_stride: tl.constexpr,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward: one program a row. Backward: the rows whose upstream gradient is not 1, anew, several a program."""
    do_row: tl.constexpr = _one_row if BLOCK >= C else _long_row
    outputs = loss, kl, gradient
    program = tl.program_id(0).to(tl.int64)
    if upstream is None:
        s, t = student + program * student_stride, rows_at(program, teachers, teacher_strides)
        do_row(program, s, t, weights, outputs, factor, log2e_over_t, C, BLOCK)
    else:
        for row in tl.range(program, B, tl.num_programs(0), disable_licm=True):  # hoisting takes registers
            scale = tl.load(upstream + row * upstream_stride)
            if scale != 1.0:
                s, t = student + row * student_stride, rows_at(row, teachers, teacher_strides)
                do_row(row, s, t, weights, outputs, factor * scale, log2e_over_t, C, BLOCK)


@torch.library.custom_op("mealfast::ensemble_soft_ce", mutates_args=("samples", "gradient"))
def ensemble_soft_ce(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    reduction: str,
    samples: Tensor | None,
    gradient: Tensor | None,
    upstream: Tensor | None,
) -> None:
    """The op of `fused.FusedLoss`, for [B, C] with consecutive classes and weights that sum to one."""
    strides = tuple(teacher.stride(0) for teacher in teachers)
    target = {"teachers": tuple(teachers), "weights": tuple(weights), "teacher_strides": strides}
    launch(ensemble_soft_ce_kernel, student, temperature, reduction, samples, gradient, upstream, **target)
