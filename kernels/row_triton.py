"""What the kernels share: one program works on one row of logits at a time, all of it in float32.

Shape legend: B batch, C classes. A row of C <= ROW_LIMIT is held in registers, BLOCK >= C lanes at once. A longer row
is swept twice in chunks of BLOCK = CHUNK, first for its maximum and sum, then for the result. The second sweep is meant
to find it in the L2 cache: two programs a multiprocessor, as many as registers allow at C = 21,843, K = 2, bfloat16,
hold 35 MB on an H100, whose L2 has 50.

Exponentials are of differences d = x - max x, as exp(d / T) = exp2(d * (log2(e) / T)): one multiplication and one
instruction. The roundings of d and of the product leave exp(d / T) off by |d / T| eps at most.

Strides and C are constexpr: that is how Triton sees that a row of 1000 bfloat16 begins at a multiple of 16 bytes, and
loads 128 bits at a time (an integer argument is only ever known to be a multiple of 16 elements, which 1000 is not).
"""

# ruff: noqa: N803 (constants of a kernel are in capitals)

import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .dispatch import INTERPRETED

ROW_LIMIT = 4096
CHUNK = 2048
LN2 = tl.constexpr(math.log(2.0))
_INTERPRETED = tl.constexpr(INTERPRETED)


def blocks(classes: int) -> tuple[int, dict[str, int]]:
    """BLOCK and the compiler's options for rows of C classes.

    A reduction over a row costs each of its warps some ten instructions and, beyond one warp, barriers: up to C = 1024
    a row is one warp's, and longer rows in registers have 32 logits a thread as well. A chunk of a long row has 8: 128
    bits of a 16-bit dtype, since the second sweep keeps a sum beside each.
    """
    options = {"enable_fp_fusion": True}  # said aloud: Triton's default is about to change
    if classes > ROW_LIMIT:
        # Left alone, the assembler spills some bytes of a few kernels to fit a third program beside two.
        return CHUNK, options | {"num_warps": CHUNK // 256, "maxnreg": 255}
    block = triton.next_power_of_2(classes)
    return block, options | {"num_warps": max(1, block // 1024)}


def log2e_over(temperature: float) -> float:
    """What a logit is multiplied by on its way to exp2."""
    return math.log2(math.e) / temperature


def launch(
    kernel,
    student: torch.Tensor,
    temperature: float,
    reduction: str,
    samples: torch.Tensor | None,
    gradient: torch.Tensor | None,
    upstream: torch.Tensor | None,
    **target,
) -> None:
    """Starts the kernel of a loss; see `fused.FusedLoss` for the arguments. `target` is the kernel's own."""
    rows, classes = student.shape
    if rows == 0:
        return
    block, options = blocks(classes)
    # Backward no more programs than fill a GPU, since most find nothing to do.
    grid = (rows if upstream is None else min(rows, 4096),)
    with torch.cuda.device_of(student):
        kernel[grid](
            student=student,
            loss=None if samples is None else samples[0],
            kl=None if samples is None or len(samples) < 2 else samples[1],
            gradient=gradient,
            upstream=upstream,
            B=rows,
            factor=(1.0 / rows if reduction == "mean" else 1.0) / temperature,
            log2e_over_t=log2e_over(temperature),
            upstream_stride=0 if upstream is None or upstream.ndim == 0 else upstream.stride(0),
            student_stride=student.stride(0),
            C=classes,
            BLOCK=block,
            **target,
            **options,
        )


@triton.jit
def rows_at(row, tensors, strides: tl.constexpr):
    """One row each, pointers to [C], of K pointers to [B, C]; strides of B, in elements."""
    rows = ()
    for k in tl.static_range(len(tensors)):
        rows = rows + (tensors[k] + row * strides[k],)  # noqa: RUF005 (Triton has no starred tuples)
    return rows


@triton.jit
def load_row(row, first, C: tl.constexpr, BLOCK: tl.constexpr):
    """Logits first to first + BLOCK - 1 of a row (pointer to [C]), float32 [BLOCK], -inf beyond C."""
    lanes = tl.arange(0, BLOCK)
    return tl.load(row + first + lanes, mask=lanes < C - first, other=-float("inf")).to(tl.float32)


@triton.jit
def store_row(row, first, values, C: tl.constexpr, BLOCK: tl.constexpr):
    """`values` [BLOCK] to the same places, rounded once to the row's dtype."""
    lanes = tl.arange(0, BLOCK)
    tl.store(row + first + lanes, values.to(row.dtype.element_ty), mask=lanes < C - first)


@triton.jit
def log2(x):
    """One instruction on a GPU, within 2 eps of 1 or of itself; Triton's own is a polynomial of some twenty."""
    if _INTERPRETED:
        y = tl.log2(x)
    else:
        y = libdevice.fast_log2f(x)
    return y


@triton.jit
def x_log2_x(x):
    """0 where x is 0."""
    return x * log2(tl.maximum(x, 1.2e-38))


@triton.jit
def max_and_sum(row, log2e_over_t, C: tl.constexpr, BLOCK: tl.constexpr):
    """m = max x and sum exp((x - m) / T) of a row x (pointer to [C]) of any length.

    In chunks each lane keeps a running maximum and sum of its own, so that the loop holds no barrier: of exp(x - new)
    and exp(old - new) one is always 1, the other exp(-|x - old|) (online softmax, arXiv 1805.02867).
    """
    if BLOCK >= C:
        x = load_row(row, 0, C, BLOCK)
        m = tl.max(x, 0)
        e = tl.exp2((x - m) * log2e_over_t)
    else:
        top = tl.full([BLOCK], -3.4e38, tl.float32)  # finite: the difference of two -inf would be NaN
        e = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, C, BLOCK, loop_unroll_factor=2):
            x = load_row(row, first, C, BLOCK)
            smaller = tl.exp2(-tl.abs(x - top) * log2e_over_t)
            e = tl.where(x > top, e * smaller + 1.0, e + smaller)
            top = tl.maximum(top, x)
        m = tl.max(top, 0)
        e *= tl.exp2((top - m) * log2e_over_t)
    return m, tl.sum(e, 0)
