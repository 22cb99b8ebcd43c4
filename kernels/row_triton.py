"""What the kernels share: one row of logits at a time, by one program.

Shape legend: B batch, K teachers, C classes. A row of C <= ROW_LIMIT is held in registers, BLOCK >= C lanes at once. A
longer row is swept in chunks of BLOCK = CHUNK, twice: first for each tensor's maximum and sum, then for the result. No
register file holds such rows. The second sweep is meant to find them in the L2 cache, so that each logit crosses the
memory bus once either way: registers allow two or three programs a multiprocessor, hence at C = 21,843, K = 2, bfloat16
about 35 to 50 MB of rows on an H100, whose L2 cache has 50.

A gradient is the difference of two probabilities and has to be within 2 eps of its dtype x the row's largest, however
much smaller than the probabilities that is. No float32 probability is good enough for a float32 gradient: a GPU's exp2
alone is off by up to 2 eps. Where the gradient is float32, REAL is float64, and exponentials, their sums, target and
gradient are computed in it; in a forward without gradient, or for a gradient of 16 bits, REAL is float32. The rows
whose student and target agree so well that this does not do for 16 bits either get their gradient once more, in
float64: see `agrees`. Loss and KL are float32 throughout.

In float32, exponentials are of d = x - max x, as exp(d / T) = exp2(d * (log2(e) / T)): one multiply and one
instruction. The roundings of d and of the product make them off by |d / T| eps, which a sum over many classes averages
away, and the loss of a row where one class outweighs the others does not: there, and only there, they are computed anew
without those roundings.

What is left when 1 is taken from nearly 1 has no digits, so nothing here is computed so. With Z = 1 + others, where
`others` leaves the student's largest class out: log Z is log1p(others), the gradient of that class is minus the sum of
all the others' (a row of gradients adds up to 0), and its target is 1 minus the others'. Nor are many small numbers
added to one large number one after the other: each addition rounds the same way, and that does not average away. The
small ones are added up first.

Quotients are `divided`, once a row: `/` is an approximate division on a GPU, off by up to 2 units in the last place.
Strides and C are constexpr: that is how Triton sees that a row of 1000 bfloat16 begins at a multiple of 16 bytes, and
loads 128 bits at a time (an integer argument is only ever known to be a multiple of 16 elements, which 1000 is not).
"""

# ruff: noqa: N803 (constants of a kernel are in capitals)

import ctypes
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
_TAYLOR = tl.constexpr([math.log(2.0) ** i / math.factorial(i) for i in range(13)])  # of 2^f
# At most the BLOCK of a row whose gradient is computed once more: float64 takes two registers a number.
AGAIN = tl.constexpr(256)


def blocks(classes: int, real: tl.dtype = tl.float32) -> tuple[int, dict[str, int]]:
    """BLOCK and the compiler's options for rows of C classes.

    A row in registers has 8 logits a thread up to C = 512, 128 bits of a 16-bit dtype, and 16 beyond: a reduction over
    the row costs each warp about as much as 8 logits do, so that fewer warps leave more of the issue slots to them. In
    float64, where a number is two registers, it has 8 throughout.
    A chunk of a long row has 4, since the second sweep keeps six running sums of each. With 16 teachers it spills
    on sm_80 and sm_100 all the same, some hundred bytes a thread: 16 pointers, maxima and sums leave too little.
    """
    # Fused multiply-adds round less. Said aloud because Triton's default is about to change.
    if classes > ROW_LIMIT:
        # Left alone, the assembler spills eight bytes to fit a third program beside two.
        return CHUNK, {"num_warps": CHUNK // 128, "enable_fp_fusion": True, "maxnreg": 128}
    block = triton.next_power_of_2(classes)
    logits = 256 if block <= 512 or real == tl.float64 else 512  # of a warp
    options = {"num_warps": max(1, block // logits), "enable_fp_fusion": True}
    if real == tl.float64 and options["num_warps"] < 16:  # left alone, the assembler spills here too, on sm_100
        options["maxnreg"] = 168  # of which a multiprocessor's 65,536 allow 12 warps
    return block, options


def split(value: float) -> tuple[float, float]:
    """A float64 as the sum of two float32, all that a kernel's argument can be, but for 1 in 2^48."""
    high = ctypes.c_float(value).value
    return high, value - high


def exponent(temperature: float) -> tuple[float, float, float, float]:
    """What the kernels' exponentials need of T: log2(e) / T as of `split`, and T ln 2 in two parts.

    The first part has 12 bits, so that its product with a whole number up to 4096 is exact in float32.
    """
    mantissa, power = math.frexp(temperature * math.log(2.0))
    high = math.ldexp(round(mantissa * 4096), power - 12)
    return *split(math.log2(math.e) / temperature), high, temperature * math.log(2.0) - high


def real(gradient: torch.Tensor | None) -> tl.dtype:
    """REAL of a kernel that writes this gradient."""
    return tl.float64 if gradient is not None and gradient.dtype == torch.float32 else tl.float32


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
    tl.store(row + classes, values.to(tl.float32).to(row.dtype.element_ty), mask=classes < C)


@triton.jit
def joined(parts, REAL: tl.constexpr):
    """The number that `split` took apart; in float32 the nearest."""
    return tl.cast(parts[0], REAL) + tl.cast(parts[1], REAL)


@triton.jit
def divided(x, y):
    """x / y, rounded once."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def log1p(x):
    """log(1 + x), x > -1, right to the last bits where x is far below the precision of 1 + x too. Float32."""
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
    remainder = ((d - n * exponent[2]) - n * exponent[3]) + lost
    return tl.where(d == -float("inf"), 0.0, tl.exp2(remainder * exponent[0]) * power)


@triton.jit
def _exp2_double(y):
    """2^y, y <= 0, in float64, right to a few eps; 0 below 2^-1000. Without the branches of libdevice's."""
    within = tl.where(y < -1000.0, -1000.0, y)  # a NaN stays
    shifted = within + 6755399441055744.0  # 1.5 * 2^52: to a whole number, as in `precise_exp`
    f = within - (shifted - 6755399441055744.0)
    e = f * _TAYLOR[12] + _TAYLOR[11]  # 2^f, |f| <= 1/2; the next term is below eps
    for i in tl.static_range(10, -1, -1):
        e = e * f + _TAYLOR[i]
    power = ((shifted.to(tl.int64, bitcast=True) << 52) + 0x3FF0000000000000).to(tl.float64, bitcast=True)
    return tl.where(y < -1000.0, 0.0, e * power)


@triton.jit
def exp_of(d, exponent):
    """exp(d / T), d <= 0, in d's dtype; in float32 off by |d / T| eps."""
    if d.dtype == tl.float64:
        return _exp2_double(d * joined(exponent, tl.float64))
    else:
        return tl.exp2(d * exponent[0])


@triton.jit
def exp_over_t(x, top, others, exponent, REAL: tl.constexpr):
    """exp((x - top) / T) of logits of a row whose maximum is `top`; `others` is their sum over the row without it."""
    e = exp_of(x.to(REAL) - top.to(REAL), exponent)
    if e.dtype == tl.float32:  # noqa: SIM102 (known to the compiler; the next is not)
        if others < CONFIDENT:
            e = precise_exp(x, top, exponent)
    return e


@triton.jit
def exp_and_others(x, exponent, REAL: tl.constexpr):
    """A whole row x in registers: d = x - max x, exp(d / T), and their sum without one largest, whose own is 1, and
    how many more are equal to the largest."""
    top = tl.max(x, 0)
    d = x - top
    e = exp_of(x.to(REAL) - top.to(REAL), exponent)
    others = tl.sum(tl.where(d == 0.0, 0.0, e), 0)
    ties = tl.floor(tl.sum(e, 0) - others + 0.5) - 1.0
    others += ties
    if e.dtype == tl.float32:  # noqa: SIM102 (known to the compiler; the next is not)
        if others < CONFIDENT:
            e = precise_exp(x, top, exponent)
            others = tl.sum(tl.where(d == 0.0, 0.0, e), 0)
    return d, e, others, ties


@triton.jit
def agrees(top_g, tops, q_top, q_others, p_top, p_others, gradient):
    """Whether student q and target p agree so well that a gradient of 16 bits cannot be the difference of float32's.

    top_g is the gradient of the student's largest class, or of `tops` equal ones together. `_top` of a probability is
    at least its largest, `_others` its sum without the student's largest class. What a row's gradients are the
    differences of is about the larger of both at most, and their errors are less than 48 eps of that (some 20 where
    many equal logits share one rounding). They may be 1.5 eps of the gradient's dtype x the row's largest gradient,
    which is top_g / tops or more: the rest is for its own rounding.
    """
    room: tl.constexpr = 2**-8 if gradient.dtype.element_ty == tl.float16 else 2**-11
    larger = tl.minimum(tl.maximum(q_others, p_others), tl.maximum(q_top, p_top))
    return tl.abs(top_g) < room * tops * larger  # False for a NaN


@triton.jit
def x_log2_x(x):
    """0 where x is 0 or not a normal number. One instruction on a GPU, within 2 eps of 1 or of itself."""
    if _INTERPRETED:
        log2 = tl.log2(x)
    else:
        log2 = libdevice.fast_log2f(x)
    return tl.where(x < 1.2e-38, 0.0, x * log2)


@triton.jit
def sweep(row, exponent, C: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr):
    """First sweep over a long row [C], one exponential a logit: m = max x, its class, and sum exp((x - m) / T) without
    the 1 of that class.

    Each lane keeps its own running maximum and sum, so that the loop holds no barrier.
    """
    top = load_logits(row, 0, C, BLOCK, "evict_last").to(tl.float32)
    others = tl.zeros([BLOCK], REAL)  # sum exp((x - top) / T) without top's own 1
    start = tl.zeros([BLOCK], tl.int32)  # of the chunk that a lane's maximum is in
    unroll: tl.constexpr = 2 if others.dtype == tl.float32 else 1
    for first in tl.range(BLOCK, C, BLOCK, loop_unroll_factor=unroll):
        x = load_logits(row, first, C, BLOCK, "evict_last").to(tl.float32)
        # Of exp(x - m) and exp(m - m_old), one is always 1. Equal values are -inf - -inf for masked classes: not NaN.
        e = tl.where(x == top, 1.0, exp_of(-tl.abs(x.to(REAL) - top.to(REAL)), exponent))
        others = others * tl.where(x > top, e, 1.0) + e
        start = tl.where(x > top, first, start)
        top = tl.maximum(top, x)
    m = tl.max(top, 0)
    classes = start + tl.arange(0, BLOCK)
    at = tl.min(tl.where(top == m, classes, C), 0)  # C where a NaN leaves no maximum
    e = exp_of(top.to(REAL) - m.to(REAL), exponent)
    return m, at, tl.sum(others * e + tl.where(classes == at, 0.0, e), 0)


@triton.jit
def target_row(
    teachers,  # K pointers to [B, C]
    teacher_strides: tl.constexpr,  # K strides of B, in elements
    weights,  # K floats of `split` that sum to one
    row,
    exponent,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """Eq. 1 of one row in registers: P = sum_k w_k exp((t_k - max t_k) / T) / sum exp((t_k - max t_k) / T).

    And sum_k w_k / sum exp((t_k - max t_k) / T), which no probability is above.
    """
    target = tl.zeros([BLOCK], REAL)
    largest = tl.zeros([], REAL)
    ahead = load_logits(teachers[0] + row * teacher_strides[0], 0, C, BLOCK, "")
    for k in tl.static_range(len(teachers)):
        logits = ahead.to(tl.float32)
        if k + 1 < len(teachers):  # the next teacher is on its way while this one is reduced
            ahead = load_logits(teachers[k + 1] + row * teacher_strides[k + 1], 0, C, BLOCK, "")
        if target.dtype == tl.float32:
            top = tl.max(logits, 0)
            # One instruction for logits - top and its product. The rounding of top's own product is in total too.
            e = tl.exp2(tl.fma(logits, exponent[0], -top * exponent[0]))
            total = tl.sum(e, 0)
            if total < 1.0 + CONFIDENT:
                e = precise_exp(logits, top, exponent)
                others = tl.sum(tl.where(logits == top, 0.0, e), 0)
                total = tl.floor(total - others + 0.5) + others  # of two equal ones total may be a little below 2
        else:
            _, e, others, _ = exp_and_others(logits, exponent, REAL)
            total = 1.0 + others
        factor = divided(joined(weights[k], REAL), total)
        target += e * factor
        largest += factor
    return target, largest


@triton.jit
def teacher_sums(
    teachers,  # K pointers to [B, C]
    teacher_strides: tl.constexpr,
    weights,  # K floats of `split` that sum to one
    row,
    exponent,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """First sweep over K long rows: K maxima, K sums of exp((t_k - max t_k) / T) without one largest, which is 1, and
    the K weights over the whole sums."""
    tops = ()
    others = ()
    factors = ()
    for k in tl.static_range(len(teachers)):
        top, _, rest = sweep(teachers[k] + row * teacher_strides[k], exponent, C, BLOCK, REAL)
        tops = tops + (top,)  # noqa: RUF005 (Triton has no starred tuples)
        others = others + (rest,)  # noqa: RUF005
        factors = factors + (divided(joined(weights[k], REAL), 1.0 + rest),)  # noqa: RUF005
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
    REAL: tl.constexpr,
):
    """Second sweep: Eq. 1 for BLOCK classes of one row."""
    tops, others, factors = sums
    target = tl.zeros([BLOCK], REAL)
    for k in tl.static_range(len(teachers)):
        logits = load_logits(teachers[k] + row * teacher_strides[k], first, C, BLOCK, "evict_first").to(tl.float32)
        target += exp_over_t(logits, tops[k], others[k], exponent, REAL) * factors[k]
    return target
