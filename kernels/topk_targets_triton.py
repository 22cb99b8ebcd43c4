"""The ensemble's k largest probabilities in Triton: from K teachers' logits, without a dense [B, C] mean in memory.

    P = sum_k w_k softmax(t_k / T)                       (MEAL V2, Eq. 1)

A class and its probability travel as one int64 key, the probability's bits (ordered like the number, since it is not
negative) above a count that falls with the class: keys are distinct, and of equal probabilities the lower class wins.

Shape legend: B batch, K teachers, C classes, k entries to keep.
"""

# ruff: noqa: N803 (constants of a kernel are in capitals)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_triton import blocks, log2e_over, rows_at
from .soft_ce_triton import target_chunk, target_factors, target_row


@triton.jit
def _top_keys(target, first, C: tl.constexpr, BLOCK: tl.constexpr, K_BLOCK: tl.constexpr):
    """The K_BLOCK largest keys of BLOCK classes, in descending order; -1 where there are fewer classes."""
    classes = first + tl.arange(0, BLOCK)
    bits = target.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN may carry a sign; without it, it is the largest
    keys = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - classes).to(tl.int64)
    return tl.topk(tl.where(classes < C, keys, -1), K_BLOCK)


@triton.jit
def ensemble_topk_kernel(
    teachers,  # K pointers to [B, C]
    weights,  # K numbers that sum to one
    ids,  # int32 [B, k], contiguous
    probabilities,  # float32 [B, k], contiguous
    log2e_over_t,
    teacher_strides: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,  # k
    K_BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    rows = rows_at(row, teachers, teacher_strides)
    if BLOCK >= C:
        keys = _top_keys(target_row(rows, weights, log2e_over_t, C, BLOCK), 0, C, BLOCK, K_BLOCK)
    else:
        of_teachers = target_factors(rows, weights, log2e_over_t, C, BLOCK)
        keys = tl.full([K_BLOCK], -1, tl.int64)
        for first in tl.range(0, C, BLOCK):
            target = target_chunk(rows, first, of_teachers, log2e_over_t, C, BLOCK)
            both = tl.join(keys, _top_keys(target, first, C, BLOCK, K_BLOCK))
            keys = tl.topk(tl.reshape(both, [2 * K_BLOCK]), K_BLOCK)
    entries = tl.arange(0, K_BLOCK)
    kept = entries < K
    tl.store(ids + row * K + entries, 0x7FFFFFFF - keys.to(tl.int32), mask=kept)
    p = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(probabilities + row * K + entries, p, mask=kept)


def topk_blocks(classes: int, k: int) -> tuple[int, int, dict[str, int]]:
    """BLOCK, K_BLOCK and the compiler's options."""
    kept = max(2, triton.next_power_of_2(k))  # topk sorts two or more
    block, options = blocks(max(classes, 2))
    return max(block, kept), kept, options


@torch.library.custom_op("mealfast::ensemble_topk", mutates_args=("ids", "probabilities"))
def ensemble_topk(
    teachers: Sequence[Tensor], weights: Sequence[float], temperature: float, ids: Tensor, probabilities: Tensor
) -> None:
    """Fills ids and probabilities; shapes as in the kernel, weights that sum to one."""
    rows, classes = teachers[0].shape
    if rows == 0:
        return
    block, kept, options = topk_blocks(classes, ids.shape[1])
    with torch.cuda.device_of(ids):
        ensemble_topk_kernel[(rows,)](
            tuple(teachers),
            tuple(weights),
            ids,
            probabilities,
            log2e_over(temperature),
            teacher_strides=tuple(teacher.stride(0) for teacher in teachers),
            C=classes,
            BLOCK=block,
            K=ids.shape[1],
            K_BLOCK=kept,
            **options,
        )
