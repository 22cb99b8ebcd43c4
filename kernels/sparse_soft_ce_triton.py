"""Soft cross-entropy against a sparse target in Triton: loss, KL and the student's gradient in one launch.

    P    = p_j for the k kept classes i_j, r for each other
    r    = max(0, 1 - sum_j p_j) / (C - k)                  ("spread"), or r = 0, p_j / sum_j p_j ("renormalise")
    M    = sum_c P                                          1 but for the rounding of p
    d    = (s - max s) / (T ln 2)                           so that exp((s - max s) / T) = 2^d
    Z    = sum_c 2^d
    loss = ln 2 (M log2 Z - sum_j p_j d_ij - r (sum_c d_c - sum_j d_ij))
    kl   = loss + ln 2 (sum_j p_j log2 p_j + (C - k) r log2 r)
    g    = (M 2^d / Z - P) factor                           factor: upstream / T, / B for a mean

The difference in the loss is of sums that r multiplies. Where no kept p_j is below r, as in a target's k largest
probabilities, neither product is more than the loss, and rounding stays as small.

Shape legend: B batch, C classes, k entries kept of each target.
"""

# ruff: noqa: N803 (constants of a kernel are in capitals)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_triton import LN2, launch, load_row, log2, max_and_sum, store_row, x_log2_x


@triton.jit
def _missing_to_one(p):
    """max(0, 1 - sum p) without the rounding of a sum near 1: in whole numbers of 2^-50, which 4096 cannot overflow."""
    one: tl.constexpr = 2**50
    total = tl.sum((tl.minimum(p, 1.0) * one).to(tl.int64), 0)
    return tl.maximum(one - total, 0).to(tl.float32) / one


@triton.jit
def _row(
    row,
    student,  # this row of it, a pointer to [C]
    ids,  # its kept classes, a pointer to [k]
    probabilities,  # theirs, a pointer to [k]
    outputs,  # loss float32 [B], kl float32 [B], gradient [B, C]; each may be None
    factor,
    log2e_over_t,
    SPREAD: tl.constexpr,  # over the other classes, of which there are some
    RENORMALISE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,  # k
    K_BLOCK: tl.constexpr,
):
    """A row of any length. One that fits in registers is loaded once: the compiler sees that the loop's one trip loads
    what `max_and_sum` has."""
    loss, kl, gradient = outputs
    j = tl.arange(0, K_BLOCK)
    i = tl.load(ids + j, mask=j < K, other=0).to(tl.int32)
    p = tl.load(probabilities + j, mask=j < K, other=0.0).to(tl.float32)
    valid = (j < K) & (i >= 0) & (i < C)
    p = tl.where((j < K) & (valid == 0), float("nan"), p)  # an id out of range spoils its sample, not other memory
    if RENORMALISE:
        p /= tl.sum(p, 0)
    missing = 0.0
    if SPREAD:
        missing = _missing_to_one(p)
    rest = missing / max(C - K, 1)
    mass = tl.sum(p, 0) + missing

    top, z = max_and_sum(student, log2e_over_t, C, BLOCK)
    scale = mass * factor / z
    finite = tl.zeros([BLOCK], tl.float32)  # sum of d over all classes that the student does not exclude
    excluded = tl.zeros([BLOCK], tl.float32)  # how many it excludes, and the lanes beyond C
    for first in tl.range(0, C, BLOCK):
        d = (load_row(student, first, C, BLOCK) - top) * log2e_over_t
        if SPREAD:
            finite += tl.where(d == -float("inf"), 0.0, d)
            excluded += tl.where(d == -float("inf"), 1.0, 0.0)
        if gradient is not None:
            store_row(gradient + row * C, first, tl.exp2(d) * scale - rest * factor, C, BLOCK)

    d = (tl.load(student + i, mask=valid, other=0.0).to(tl.float32) - top) * log2e_over_t
    if loss is not None:
        p_d = tl.sum(p * tl.where(p == 0.0, 0.0, d), 0)
        if SPREAD:
            out = valid & (d == -float("inf"))
            others = tl.sum(finite, 0) - tl.sum(tl.where(valid & (out == 0), d, 0.0), 0)
            lanes: tl.constexpr = (C + BLOCK - 1) // BLOCK * BLOCK
            excluded_others = tl.sum(excluded, 0) - (lanes - C) - tl.sum(out.to(tl.float32), 0)
            p_d += tl.where(rest == 0.0, 0.0, rest * tl.where(excluded_others > 0.0, -float("inf"), others))
        value = (mass * log2(z) - p_d) * LN2
        tl.store(loss + row, value)
        if kl is not None:
            p_log2_p = tl.sum(x_log2_x(p), 0) + (C - K) * x_log2_x(rest)
            tl.store(kl + row, value + p_log2_p * LN2)
    if gradient is not None:
        tl.debug_barrier()  # what follows overwrites what other threads have just stored
        g = tl.exp2(d) * scale - p * factor
        tl.store(gradient + row * C + i, g.to(gradient.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["B"])
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
    log2e_over_t,
    upstream_stride: tl.constexpr,
    student_stride: tl.constexpr,
    RENORMALISE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Forward: one program a row. Backward: the rows whose upstream gradient is not 1, anew, several a program."""
    SPREAD: tl.constexpr = not RENORMALISE and C > K  # noqa: N806
    out = loss, kl, gradient
    program = tl.program_id(0).to(tl.int64)
    if upstream is None:
        s, i, p = student + program * student_stride, ids + program * K, probabilities + program * K
        _row(program, s, i, p, out, factor, log2e_over_t, SPREAD, RENORMALISE, C, BLOCK, K, K_BLOCK)
    else:
        for row in tl.range(program, B, tl.num_programs(0), disable_licm=True):  # hoisting takes registers
            scale = tl.load(upstream + row * upstream_stride)
            if scale != 1.0:
                s, i, p = student + row * student_stride, ids + row * K, probabilities + row * K
                _row(row, s, i, p, out, factor * scale, log2e_over_t, SPREAD, RENORMALISE, C, BLOCK, K, K_BLOCK)


@torch.library.custom_op("mealfast::sparse_soft_ce", mutates_args=("samples", "gradient"))
def sparse_soft_ce(
    student: Tensor,
    target: Sequence[Tensor],
    remainder: str,
    temperature: float,
    reduction: str,
    samples: Tensor | None,
    gradient: Tensor | None,
    upstream: Tensor | None,
) -> None:
    """The op of `fused.FusedLoss`, for [B, C] with consecutive classes; target is ids and probabilities, contiguous."""
    ids, probabilities = target
    k = ids.shape[1]
    arguments = {"ids": ids, "probabilities": probabilities, "K": k, "K_BLOCK": triton.next_power_of_2(k)}
    arguments["RENORMALISE"] = remainder == "renormalise"
    launch(sparse_soft_ce_kernel, student, temperature, reduction, samples, gradient, upstream, **arguments)
