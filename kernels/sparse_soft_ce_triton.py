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
    AGAIN,
    agrees,
    assert_outputs,
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
def _one_pass(
    student,  # [B, C]
    ids,  # [B, k], contiguous
    probabilities,  # [B, k], contiguous
    loss,  # float32 [B], or None
    kl,  # float32 [B], or None
    gradient,  # [B, C], contiguous, or None
    row,
    factor,  # float64
    one_over_t,
    exponent,
    student_stride: tl.constexpr,
    RENORMALISE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,  # k
    K_BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """A row. Whether the gradient wants float64: see `agrees`."""
    student += row * student_stride
    entries = tl.arange(0, K_BLOCK)
    kept = entries < K
    i = tl.load(ids + row * K + entries, mask=kept, other=0).to(tl.int32)
    p = tl.load(probabilities + row * K + entries, mask=kept, other=0.0).to(REAL)
    valid = kept & (i >= 0) & (i < C)
    p = tl.where(kept & (valid == 0), float("nan"), p)  # an id out of range spoils its sample, not other memory
    n = tl.sum(p, 0)
    if RENORMALISE:
        p = p * divided(1.0, n)
        n = tl.sum(p, 0)
    if RENORMALISE or C == K:
        rest = tl.zeros([], REAL)
    else:
        rest = divided(_missing_to_one(p), tl.cast((C - K) * 1.0, REAL))
    mass = n + rest * (C - K)
    # Where most classes are kept, the sum over the others is a difference of nearly equal sums.
    spread_dtype: tl.constexpr = tl.float64 if 2 * K > C else tl.float32

    if BLOCK >= C:
        s = load_logits(student, 0, C, BLOCK, "").to(tl.float32)
        top = tl.max(s, 0)
        d, e, others, _ = exp_and_others(s, exponent, REAL)
        at = tl.min(tl.where(d == 0.0, tl.arange(0, BLOCK), C), 0)
        rough_others = others
        mass_over_z = divided(mass, 1.0 + others)
        if loss is not None:
            finite = tl.sum(_finite(d).to(spread_dtype), 0)
            masked = tl.sum(tl.where((d == -float("inf")) & (tl.arange(0, BLOCK) < C), 1.0, 0.0), 0)
        if gradient is not None:
            store_row(gradient + row * C, 0, (e * mass_over_z - rest) * factor.to(REAL), C, BLOCK)
    else:
        top, at, rough_others = sweep(student, exponent, C, BLOCK, REAL)
        mass_over_z = divided(mass, 1.0 + rough_others)
        others_of = tl.zeros([BLOCK], REAL)  # of each lane, so that the loop holds no barrier
        finite_of = tl.zeros([BLOCK], spread_dtype)
        masked_of = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, C, BLOCK):
            classes = first + tl.arange(0, BLOCK)
            s = load_logits(student, first, C, BLOCK, "evict_first").to(tl.float32)
            d = s - top
            e = exp_over_t(s, top, rough_others, exponent, REAL)
            others_of += tl.where(classes == at, 0.0, e)
            if loss is not None:
                finite_of += _finite(d)
                masked_of += tl.where((d == -float("inf")) & (classes < C), 1.0, 0.0)
            if gradient is not None:
                store_row(gradient + row * C, first, (e * mass_over_z - rest) * factor.to(REAL), C, BLOCK)
        others = tl.sum(others_of, 0)
        finite = tl.sum(finite_of, 0)
        masked = tl.sum(masked_of, 0)

    s_kept = tl.load(student + i, mask=valid, other=-float("inf")).to(tl.float32)
    d_kept = s_kept - top
    close = False
    if gradient is not None:
        top_kept = tl.sum(tl.where(valid & (i == at), 1.0, 0.0), 0)
        other_mass = tl.sum(tl.where(valid & (i == at), 0.0, p), 0) + rest * ((C - K - 1) + top_kept)
        g_top = other_mass - others * mass_over_z
        at = tl.where(others < 1.0, at, C)  # else better known from itself, as it stands
        e_kept = exp_over_t(s_kept, top, rough_others, exponent, REAL)
        g = tl.where(i == at, g_top, e_kept * mass_over_z - p)
        tl.debug_barrier()  # what follows overwrites what other threads have just stored
        stored: tl.constexpr = gradient.dtype.element_ty
        tl.store(gradient + row * C + at, (g_top * factor.to(REAL)).to(tl.float32).to(stored), mask=at < C)
        tl.store(gradient + row * C + i, (g * factor.to(REAL)).to(tl.float32).to(stored), mask=valid)
        if g_top.dtype == tl.float32:
            largest = tl.maximum(tl.max(p, 0), rest)
            close = agrees(g_top, 1.0, mass_over_z, others * mass_over_z, largest, other_mass, gradient)
    if loss is not None:
        p = p.to(tl.float32)
        rest = rest.to(tl.float32)
        expected_d = tl.sum(tl.where(p == 0.0, 0.0, p * d_kept), 0)
        finite -= tl.sum(tl.where(valid, _finite(d_kept), 0.0).to(spread_dtype), 0)
        masked -= tl.sum(tl.where(valid & (d_kept == -float("inf")), 1.0, 0.0), 0)
        spread = tl.where(masked > 0.0, -float("inf"), finite.to(tl.float32))
        expected_d += tl.where(rest == 0.0, 0.0, rest * spread)
        value = mass.to(tl.float32) * log1p(others.to(tl.float32)) - expected_d * one_over_t
        tl.store(loss + row, value)
        if kl is not None:
            tl.store(kl + row, value + tl.sum(_x_log_x(p), 0) + (C - K) * _x_log_x(rest))
    return close


@triton.jit
def _row(
    student,
    ids,
    probabilities,
    loss,
    kl,
    gradient,
    row,
    factor,  # float64
    one_over_t,
    exponent,
    student_stride: tl.constexpr,
    RENORMALISE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """A row, and its gradient again in float64 where float32 did not do."""
    close = _one_pass(
        student,
        ids,
        probabilities,
        loss,
        kl,
        gradient,
        row,
        factor,
        one_over_t,
        exponent,
        student_stride,
        RENORMALISE,
        C,
        BLOCK,
        K,
        K_BLOCK,
        REAL,
    )
    if close:
        tl.debug_barrier()  # what follows overwrites what other threads have just stored
        _one_pass(
            student,
            ids,
            probabilities,
            None,
            None,
            gradient,
            row,
            factor,
            one_over_t,
            exponent,
            student_stride,
            RENORMALISE,
            C,
            min(BLOCK, AGAIN),
            K,
            K_BLOCK,
            tl.float64,
        )


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
    factor,  # of `row_triton.split`
    one_over_t,
    exponent,  # of `row_triton.exponent`
    upstream_stride: tl.constexpr,
    student_stride: tl.constexpr,
    RENORMALISE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """Forward: one program a row. Backward: the rows whose upstream gradient is not 1, anew, several a program."""
    program = tl.program_id(0).to(tl.int64)
    factor = joined(factor, tl.float64)
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
            REAL,
        )
    else:
        for row in tl.range(program, B, tl.num_programs(0), disable_licm=True):  # hoisting takes registers
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
                    REAL,
                )


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
    dtype = real(gradient)
    block, options = blocks(student.shape[1], dtype)
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
            split(factor / temperature),
            1.0 / temperature,
            exponent(temperature),
            upstream_stride=upstream.stride(0) if upstream is not None and upstream.ndim else 0,
            student_stride=student.stride(0),
            RENORMALISE=remainder == "renormalise",
            C=student.shape[1],
            BLOCK=block,
            K=ids.shape[1],
            K_BLOCK=triton.next_power_of_2(ids.shape[1]),
            REAL=dtype,
            **options,
        )
