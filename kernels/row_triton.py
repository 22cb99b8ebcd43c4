"""What the kernels share: one row of logits at a time, by one program, in float32.

Shape legend: B batch, K teachers, C classes. A row of C <= ROW_LIMIT is held in registers, BLOCK >= C lanes at once. A
longer row is swept in chunks of BLOCK = CHUNK, twice: first for each tensor's maximum and sum, then for the result. No
register file holds such rows. The second sweep is meant to find them in the L2 cache, so that each logit crosses the
memory bus once either way: registers allow two or three programs a multiprocessor, hence at C = 21,843, K = 2, bfloat16
about 35 to 50 MB of rows on an H100, whose L2 cache has 50.

Exponentials are of d = x - max x, as exp(d / T) = exp2(d * (log2(e) / T)): one multiply and one instruction. The
roundings of d and of the product make them off by |d / T| eps, which a sum over many classes averages away, and the
loss of a row where one class outweighs the others does not: there, and only there, they are computed anew without
those roundings.

What is left when 1 is taken from nearly 1 has no digits, so nothing here is computed so. With Z = 1 + others, where
`others` leaves the student's largest class out: log Z is log1p(others), the gradient of that class is minus the sum of
all the others' (a row of gradients adds up to 0), and its target is 1 minus the others'. Nor are many small numbers
added to one large number one after the other: each addition rounds the same way, and that does not average away. The
small ones are added up first.

Quotients are tl.div_rn, once a row: `/` is an approximate division on a GPU, off by up to 2 units in the last place.
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

_INTERPRETED = tl.constexpr(INTERPRETED)
ROW_LIMIT = 4096
CHUNK = 1024
# A row is confident where the exponentials of all classes but the largest add up to less: a probability above 1/2.
CONFIDENT = tl.constexpr(1.0)
# A target's probabilities above this, 16 at most, are added up apart from the rest.
LARGE = tl.constexpr(1 / 17)


def blocks(classes: int) -> tuple[int, dict[str, int]]:
    """BLOCK and the compiler's options for rows of C classes.

    A row in registers has 8 logits a thread up to C = 512, 128 bits of a 16-bit dtype, and 16 beyond: a reduction over
    the row costs each warp about as much as 8 logits do, so that fewer warps leave more of the issue slots to them.
    A chunk of a long row has 4, since the second sweep keeps six running sums of each. With 16 teachers it spills
    on sm_80 and sm_100 all the same, some hundred bytes a thread: 16 pointers, maxima and sums leave too little.
    """
    # Fused multiply-adds round less. Said aloud because Triton's default is about to change.
    if classes > ROW_LIMIT:
        # Left alone, the assembler spills eight bytes to fit a third program beside two.
        return CHUNK, {"num_warps": CHUNK // 128, "enable_fp_fusion": True, "maxnreg": 128}
    block = triton.next_power_of_2(classes)
    return block, {"num_warps": max(1, block // (256 if block <= 512 else 512)), "enable_fp_fusion": True}


def exponent(temperature: float) -> tuple[float, float, float]:
    """What the kernels' exponentials need of T: log2(e) / T, and T ln 2 in two parts.

    The first part has 12 bits, so that its product with a whole number up to 4096 is exact in float32.
    """
    mantissa, power = math.frexp(temperature * math.log(2.0))
    high = math.ldexp(round(mantissa * 4096), power - 12)
    return math.log2(math.e) / temperature, high, temperature * math.log(2.0) - high


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
def log1p(x):
    """log(1 + x), x > -1, right to the last bits where x is far below the precision of 1 + x too."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * tl.div_rn(x, u - 1.0))


@triton.jit
def precise_exp(x, top, exponent):
    """exp((x - top) / T), x <= top, within 2 eps: as 2^n exp((x - top - n T ln 2) / T)."""
    d = x - top
    back = d - x
    lost = (x - (d - back)) - (top + back)  # by d's rounding: x - top is d + lost
    # To a whole number by adding 1.5 * 2^23, whose last bits are then n's. Below -126 the remainder does it: to 0.
    shifted = tl.maximum(tl.fma(d, exponent[0], 12582912.0), 12582912.0 - 126.0)
    n = shifted - 12582912.0
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)  # 2^n
    remainder = ((d - n * exponent[1]) - n * exponent[2]) + lost
    return tl.where(d == -float("inf"), 0.0, tl.exp2(remainder * exponent[0]) * power)


@triton.jit
def exp_over_t(x, top, others, exponent):
    """exp((x - top) / T) of logits of a row whose maximum is `top`; `others` is their sum over the row without it."""
    e = tl.exp2((x - top) * exponent[0])
    if others < CONFIDENT:
        e = precise_exp(x, top, exponent)
    return e


@triton.jit
def exp_and_others(x, exponent):
    """A whole row x in registers: d = x - max x, exp(d / T), and their sum without one largest, whose own is 1."""
    top = tl.max(x, 0)
    d = x - top
    e = tl.exp2(d * exponent[0])
    others = tl.sum(tl.where(d == 0.0, 0.0, e), 0)
    others += tl.floor(tl.sum(e, 0) - others + 0.5) - 1.0  # as many more as are equal to the largest
    if others < CONFIDENT:
        e = precise_exp(x, top, exponent)
        others = tl.sum(tl.where(d == 0.0, 0.0, e), 0)
    return d, e, others


@triton.jit
def x_log2_x(x):
    """0 where x is 0 or not a normal number. One instruction on a GPU, within 2 eps of 1 or of itself."""
    if _INTERPRETED:
        log2 = tl.log2(x)
    else:
        log2 = libdevice.fast_log2f(x)
    return tl.where(x < 1.2e-38, 0.0, x * log2)


@triton.jit
def sweep(row, exponent, C: tl.constexpr, BLOCK: tl.constexpr):
    """First sweep over a long row [C], one exponential a logit: m = max x, its class, and sum exp((x - m) / T) without
    the 1 of that class.

    Each lane keeps its own running maximum and sum, so that the loop holds no barrier.
    """
    top = load_logits(row, 0, C, BLOCK, "evict_last").to(tl.float32)
    others = tl.zeros([BLOCK], tl.float32)  # sum exp((x - top) / T) without top's own 1
    start = tl.zeros([BLOCK], tl.int32)  # of the chunk that a lane's maximum is in
    for first in tl.range(BLOCK, C, BLOCK, loop_unroll_factor=2):
        x = load_logits(row, first, C, BLOCK, "evict_last").to(tl.float32)
        # Of exp(x - m) and exp(m - m_old), one is always 1. Equal values are -inf - -inf for masked classes: not NaN.
        e = tl.where(x == top, 1.0, tl.exp2(-tl.abs(x - top) * exponent[0]))
        others = others * tl.where(x > top, e, 1.0) + e
        start = tl.where(x > top, first, start)
        top = tl.maximum(top, x)
    m = tl.max(top, 0)
    classes = start + tl.arange(0, BLOCK)
    at = tl.min(tl.where(top == m, classes, C), 0)  # C where a NaN leaves no maximum
    e = tl.exp2((top - m) * exponent[0])
    return m, at, tl.sum(others * e + tl.where(classes == at, 0.0, e), 0)


@triton.jit
def target_row(
    teachers,  # K pointers to [B, C]
    teacher_strides: tl.constexpr,  # K strides of B, in elements
    weights,  # K floats that sum to one
    row,
    exponent,
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
        top = tl.max(logits, 0)
        # One instruction for logits - top and its product. The rounding of top's own product is in total too.
        e = tl.exp2(tl.fma(logits, exponent[0], -top * exponent[0]))
        total = tl.sum(e, 0)
        if total < 1.0 + CONFIDENT:
            e = precise_exp(logits, top, exponent)
            total = 1.0 + tl.sum(tl.where(logits == top, 0.0, e), 0)
        target += e * tl.div_rn(weights[k], total)
    return target


@triton.jit
def teacher_sums(
    teachers,  # K pointers to [B, C]
    teacher_strides: tl.constexpr,
    weights,  # K floats that sum to one
    row,
    exponent,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First sweep over K long rows: K maxima, K sums of exp((t_k - max t_k) / T) without one largest, which is 1, and
    the K weights over the whole sums."""
    tops = ()
    others = ()
    factors = ()
    for k in tl.static_range(len(teachers)):
        top, _, rest = sweep(teachers[k] + row * teacher_strides[k], exponent, C, BLOCK)
        tops = tops + (top,)  # noqa: RUF005 (Triton has no starred tuples)
        others = others + (rest,)  # noqa: RUF005
        factors = factors + (tl.div_rn(weights[k], 1.0 + rest),)  # noqa: RUF005
    return tops, others, factors


@triton.jit
def target_chunk(
    teachers,  # K pointers to [B, C]
    teacher_strides: tl.constexpr,
    sums,  # of `teacher_sums`
    row,
    first,
    exponent,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second sweep: Eq. 1 for BLOCK classes of one row."""
    tops, others, factors = sums
    target = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(len(teachers)):
        logits = load_logits(teachers[k] + row * teacher_strides[k], first, C, BLOCK, "evict_first").to(tl.float32)
        target += exp_over_t(logits, tops[k], others[k], exponent) * factors[k]
    return target
