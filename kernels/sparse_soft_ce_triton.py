"""Soft cross-entropy against a sparse target in Triton: loss, KL and the student's gradient in one launch.

    n    = sum_j p_j                                     over the k kept entries (class i_j, probability p_j)
    r    = max(0, 1 - n) / (C - k)                       the other classes' probability each ("spread"), or
    p_j  = p_j / n, r = 0                                ("renormalise")
    M    = sum_j p_j + (C - k) r                         the target's mass, 1 but for the rounding of p
    d    = s - max s,  e = exp(d / T),  Z = sum_c e
    loss = M log Z - (sum_j p_j d_ij + r sum_(c not kept) d_c) / T
    kl   = loss + sum_j p_j log p_j + (C - k) r log r
    g    = (M e / Z - (p_j where kept, r elsewhere)) * factor
    g    = (mass of the others - M sum_others e / Z) * factor     the same for the largest of the student's classes

Shape legend: B batch, C classes, k entries kept of each target.
"""

# ruff: noqa: N803 (constants of a kernel are in capitals)

import torch
import triton
import triton.language as tl

from .row_triton import (
    assert_outputs,
    blocks,
    exp_and_others,
    exp_over_t,
    exponent,
    load_logits,
    log1p,
    programs,
    store_row,
    sweep,
)


@triton.jit
def _x_log_x(x):
    return tl.where(x == 0.0, 0.0, x * tl.log(x))


@triton.jit
def _finite(d):
    return tl.where(d == -float("inf"), 0.0, d)


@triton.jit
def _missing_to_one(p):
    """1 - sum p, the largest taken from 1 before the others, so that a p next to 1 costs no digits."""
    top = tl.max(p, 0)
    others = tl.sum(tl.where(p == top, 0.0, p), 0)
    ties = tl.sum(tl.where(p == top, 1.0, 0.0), 0)
    return tl.maximum((1.0 - top) - (others + (ties - 1.0) * top), 0.0)


@triton.jit
def _row(
    student,  # [B, C]
    ids,  # [B, k], contiguous
    probabilities,  # [B, k], contiguous
    loss,  # float32 [B], or None
    kl,  # float32 [B], or None
    gradient,  # [B, C], contiguous, or None
    row,
    factor,
    one_over_t,
    exponent,
    student_stride: tl.constexpr,
    RENORMALISE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,  # k
    K_BLOCK: tl.constexpr,
):
    student += row * student_stride
    entries = tl.arange(0, K_BLOCK)
    kept = entries < K
    i = tl.load(ids + row * K + entries, mask=kept, other=0).to(tl.int32)
    p = tl.load(probabilities + row * K + entries, mask=kept, other=0.0).to(tl.float32)
    valid = kept & (i >= 0) & (i < C)
    p = tl.where(kept & (valid == 0), float("nan"), p)  # an id out of range spoils its sample, not other memory
    n = tl.sum(p, 0)
    if RENORMALISE:
        p = p * tl.div_rn(1.0, n)
        n = tl.sum(p, 0)
    if RENORMALISE or C == K:
        rest = tl.zeros([], tl.float32)
    else:
        rest = tl.div_rn(_missing_to_one(p), (C - K) * 1.0)
    mass = n + rest * (C - K)

    if BLOCK >= C:
        s = load_logits(student, 0, C, BLOCK, "").to(tl.float32)
        top = tl.max(s, 0)
        d, e, others = exp_and_others(s, exponent)
        at = tl.min(tl.where(d == 0.0, tl.arange(0, BLOCK), C), 0)
        rough_others = others
        mass_over_z = tl.div_rn(mass, 1.0 + others)
        if loss is not None:
            finite = tl.sum(_finite(d), 0)
            masked = tl.sum(tl.where((d == -float("inf")) & (tl.arange(0, BLOCK) < C), 1.0, 0.0), 0)
        if gradient is not None:
            store_row(gradient + row * C, 0, (e * mass_over_z - rest) * factor, C, BLOCK)
    else:
        top, at, rough_others = sweep(student, exponent, C, BLOCK)
        mass_over_z = tl.div_rn(mass, 1.0 + rough_others)
        others_of = tl.zeros([BLOCK], tl.float32)  # of each lane, so that the loop holds no barrier
        finite_of = tl.zeros([BLOCK], tl.float32)
        masked_of = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, C, BLOCK):
            classes = first + tl.arange(0, BLOCK)
            s = load_logits(student, first, C, BLOCK, "evict_first").to(tl.float32)
            d = s - top
            e = exp_over_t(s, top, rough_others, exponent)
            others_of += tl.where(classes == at, 0.0, e)
            if loss is not None:
                finite_of += _finite(d)
                masked_of += tl.where((d == -float("inf")) & (classes < C), 1.0, 0.0)
            if gradient is not None:
                store_row(gradient + row * C, first, (e * mass_over_z - rest) * factor, C, BLOCK)
        others = tl.sum(others_of, 0)
        finite = tl.sum(finite_of, 0)
        masked = tl.sum(masked_of, 0)

    s_kept = tl.load(student + i, mask=valid, other=-float("inf")).to(tl.float32)
    d_kept = s_kept - top
    if gradient is not None:
        at = tl.where(others < 1.0, at, C)  # else better known from itself, as it stands
        top_kept = tl.sum(tl.where(valid & (i == at), 1.0, 0.0), 0)
        other_mass = tl.sum(tl.where(valid & (i == at), 0.0, p), 0) + rest * ((C - K - 1) + top_kept)
        g_top = other_mass - others * mass_over_z
        g = tl.where(i == at, g_top, exp_over_t(s_kept, top, rough_others, exponent) * mass_over_z - p) * factor
        tl.debug_barrier()  # what follows overwrites what other threads have just stored
        tl.store(gradient + row * C + at, (g_top * factor).to(gradient.dtype.element_ty), mask=at < C)
        tl.store(gradient + row * C + i, g.to(gradient.dtype.element_ty), mask=valid)
    if loss is not None:
        expected_d = tl.sum(tl.where(p == 0.0, 0.0, p * d_kept), 0)
        finite -= tl.sum(tl.where(valid, _finite(d_kept), 0.0), 0)
        masked -= tl.sum(tl.where(valid & (d_kept == -float("inf")), 1.0, 0.0), 0)
        spread = tl.where(masked > 0.0, -float("inf"), finite)
        expected_d += tl.where(rest == 0.0, 0.0, rest * spread)
        value = mass * log1p(others) - expected_d * one_over_t
        tl.store(loss + row, value)
        if kl is not None:
            tl.store(kl + row, value + tl.sum(_x_log_x(p), 0) + (C - K) * _x_log_x(rest))


@triton.jit
def sparse_soft_ce_kernel(
    student,  # [B, C]
    ids,  # [B, k], contiguous
    probabilities,  # [B, k], contiguous
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
    RENORMALISE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Forward: one program a row. Backward: the rows whose upstream gradient is not 1, anew, several a program."""
    program = tl.program_id(0).to(tl.int64)
    if upstream is None:
        _row(
            student,
            ids,
            probabilities,
            loss,
            kl,
            gradient,
            program,
            factor,
            one_over_t,
            exponent,
            student_stride,
            RENORMALISE,
            C,
            BLOCK,
            K,
            K_BLOCK,
        )
    else:
        row = program
        while row < B:
            scale = tl.load(upstream + row * upstream_stride)
            if scale != 1.0:
                _row(
                    student,
                    ids,
                    probabilities,
                    loss,
                    kl,
                    gradient,
                    row,
                    scale * factor,
                    one_over_t,
                    exponent,
                    student_stride,
                    RENORMALISE,
                    C,
                    BLOCK,
                    K,
                    K_BLOCK,
                )
            row += tl.num_programs(0)


def launch(
    student: torch.Tensor,
    ids: torch.Tensor,
    probabilities: torch.Tensor,
    remainder: str,
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
    assert ids.shape == probabilities.shape, (ids.shape, probabilities.shape)
    assert ids.shape[0] == student.shape[0], (ids.shape, student.shape)
    assert ids.is_contiguous()
    assert probabilities.is_contiguous()
    assert_outputs(student, loss, kl, gradient, upstream)
    block, options = blocks(student.shape[1])
    with torch.cuda.device_of(student):
        sparse_soft_ce_kernel[programs(student.shape[0], upstream)](
            student,
            ids,
            probabilities,
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
            RENORMALISE=remainder == "renormalise",
            C=student.shape[1],
            BLOCK=block,
            K=ids.shape[1],
            K_BLOCK=triton.next_power_of_2(ids.shape[1]),
            **options,
        )
