"""What the kernels share: one row of logits at a time, by one program, in float32.

Shape legend: B batch, K teachers, C classes. A row of C <= ROW_LIMIT is held in registers, BLOCK >= C lanes at once. A
longer row is swept in chunks of BLOCK = CHUNK, twice: first for each tensor's maximum and sum, then for the result. No
register file holds such rows. The second sweep is meant to find them in the L2 cache, so that each logit crosses the
memory bus once either way: registers allow two or three programs a multiprocessor, hence at C = 21,843, K = 2, bfloat16
about 35 to 50 MB of rows on an H100, whose L2 cache has 50.

Exponentials are exp(x / T) = exp2(x * log2e_over_t), with log2e_over_t = log2(e) / T: one multiply and one instruction.
Quotients are tl.div_rn, once a row: `/` is an approximate division on a GPU, off by up to 2 units in the last place.
Strides and C are constexpr: that is how Triton sees that a row of 1000 bfloat16 begins at a multiple of 16 bytes, and
loads 128 bits at a time (an integer argument is only ever known to be a multiple of 16 elements, which 1000 is not).
"""

# ruff: noqa: N803 (constants of a kernel are in capitals)

import math

import torch
import triton
import triton.language as tl

ROW_LIMIT = 4096
CHUNK = 2048


def blocks(classes: int) -> tuple[int, dict[str, int]]:
    """BLOCK and the compiler's options for rows of C classes: 8 logits a thread, 128 bits of a 16-bit dtype."""
    block = triton.next_power_of_2(classes) if classes <= ROW_LIMIT else CHUNK
    # Fused multiply-adds round less. Said aloud because Triton's default is about to change.
    return block, {"num_warps": max(1, block // 256), "enable_fp_fusion": True}


def over_temperature(temperature: float) -> dict[str, float]:
    """What the kernels know of T: rounded to float32 once, from Python's double precision."""
    return {"log2e_over_t": math.log2(math.e) / temperature, "one_over_t": 1.0 / temperature}


def programs(rows: int, upstream: torch.Tensor | None) -> tuple[int]:
    """The grid: a program a row forward, and backward no more than fill a GPU, since most find nothing to do."""
    return (rows if upstream is None else min(rows, 4096),)


def assert_rows(logits: torch.Tensor, like: torch.Tensor) -> None:
    assert logits.shape == like.shape, (logits.shape, like.shape)
    assert logits.device == like.device, (logits.device, like.device)
    assert logits.stride(1) == 1, logits.stride()


def assert_outputs(
    student: torch.Tensor,
    loss: torch.Tensor | None,
    kl: torch.Tensor | None,
    gradient: torch.Tensor | None,
    upstream: torch.Tensor | None,
) -> None:
    """Rows of unit stride, float32 [B] that are contiguous, gradient [B, C] contiguous, upstream float32 [] or [B]."""
    assert_rows(student, student)
    for samples in (loss, kl):
        if samples is not None:
            assert samples.shape == student.shape[:1], samples.shape
            assert samples.dtype == torch.float32, samples.dtype
            assert samples.is_contiguous()
    assert kl is None or loss is not None
    if gradient is not None:
        assert gradient.shape == student.shape, gradient.shape
        assert gradient.is_contiguous()
    if upstream is not None:
        assert upstream.shape in ((), student.shape[:1]), upstream.shape
        assert upstream.dtype == torch.float32, upstream.dtype


@triton.jit
def load_logits(
    row,  # pointer to [C]
    first,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICT: tl.constexpr,  # how the caches should keep it: "", "evict_first" or "evict_last"
):
    """Logits first to first + BLOCK - 1 of a row in the row's dtype, -inf beyond C."""
    classes = first + tl.arange(0, BLOCK)
    return tl.load(row + classes, mask=classes < C, other=-float("inf"), eviction_policy=EVICT)


@triton.jit
def store_row(row, first, values, C: tl.constexpr, BLOCK: tl.constexpr):
    classes = first + tl.arange(0, BLOCK)
    tl.store(row + classes, values.to(row.dtype.element_ty), mask=classes < C)


@triton.jit
def log_sum(others, ties):
    """log(ties + others), where others is the sum of exp(s - max s) over all but the largest and ties counts those.

    In the shape of log1p: with one confident class the result is about `others`, far below the precision of 1 + others.
    """
    x = others + (ties - 1.0)
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * tl.div_rn(x, u - 1.0))


@triton.jit
def max_and_sum(row, log2e_over_t, C: tl.constexpr, BLOCK: tl.constexpr):
    """First sweep over a long row [C]: m = max x, and sum exp((x - m) / T), with one exponential a logit.

    Each lane keeps its own running maximum and sum, so that the loop holds no barrier.
    """
    top = load_logits(row, 0, C, BLOCK, "evict_last").to(tl.float32)
    total = tl.full([BLOCK], 1.0, tl.float32)
    for first in tl.range(BLOCK, C, BLOCK, loop_unroll_factor=2):
        x = load_logits(row, first, C, BLOCK, "evict_last").to(tl.float32)
        # Of exp(x - m) and exp(m - m_old), one is always 1. Equal values are -inf - -inf for masked classes: not NaN.
        e = tl.where(x == top, 1.0, tl.exp2(-tl.abs(x - top) * log2e_over_t))
        total = tl.where(x > top, total * e + 1.0, total + e)
        top = tl.maximum(top, x)
    m = tl.max(top, 0)
    return m, tl.sum(total * tl.exp2((top - m) * log2e_over_t), 0)


@triton.jit
def target_row(
    teachers,  # K pointers to [B, C]
    teacher_strides: tl.constexpr,  # K strides of B, in elements
    weights,  # K floats that sum to one
    row,
    log2e_over_t,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Eq. 1 of one row in registers: P = sum_k w_k exp((t_k - max t_k) / T) / sum exp((t_k - max t_k) / T)."""
    target = tl.zeros([BLOCK], tl.float32)
    ahead = load_logits(teachers[0] + row * teacher_strides[0], 0, C, BLOCK, "")
    for k in tl.static_range(len(teachers)):
        logits = ahead.to(tl.float32)
        if k + 1 < len(teachers):  # the next teacher is on its way while this one is reduced
            ahead = load_logits(teachers[k + 1] + row * teacher_strides[k + 1], 0, C, BLOCK, "")
        e = tl.exp2((logits - tl.max(logits, 0)) * log2e_over_t)
        target += e * tl.div_rn(weights[k], tl.sum(e, 0))
    return target


@triton.jit
def teacher_sums(
    teachers,  # K pointers to [B, C]
    teacher_strides: tl.constexpr,
    weights,  # K floats that sum to one
    row,
    log2e_over_t,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First sweep over K long rows: K maxima, and K factors w_k / sum exp((t_k - max t_k) / T)."""
    tops = ()
    factors = ()
    for k in tl.static_range(len(teachers)):
        top, total = max_and_sum(teachers[k] + row * teacher_strides[k], log2e_over_t, C, BLOCK)
        tops = tops + (top,)  # noqa: RUF005 (Triton has no starred tuples)
        factors = factors + (tl.div_rn(weights[k], total),)  # noqa: RUF005
    return tops, factors


@triton.jit
def target_chunk(
    teachers,  # K pointers to [B, C]
    teacher_strides: tl.constexpr,
    tops,
    factors,
    row,
    first,
    log2e_over_t,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second sweep: Eq. 1 for BLOCK classes of one row, from `teacher_sums`."""
    target = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(len(teachers)):
        logits = load_logits(teachers[k] + row * teacher_strides[k], first, C, BLOCK, "evict_first").to(tl.float32)
        target += tl.exp2((logits - tops[k]) * log2e_over_t) * factors[k]
    return target
