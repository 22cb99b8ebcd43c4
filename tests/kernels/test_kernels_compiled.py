"""The kernels compiled for GPUs that are not here: nothing spilled, and 128 bits at a time where rows allow it."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import pytest
import torch

from mealfast.kernels.dispatch import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from mealfast.kernels.compiled import compiled

ARCHITECTURES = [80, 90, 100]
CLASSES = [10, 1000, 1001, 21843]
# Every K for the forward kernel in bfloat16. Elsewhere the most, which need the most registers.
VARIANTS = [
    *[("forward", k, torch.bfloat16) for k in (1, 2, 4)],
    ("forward", 4, torch.float32),
    ("backward", 4, torch.bfloat16),
    ("backward", 4, torch.float32),
    ("sparse forward", 1, torch.bfloat16),
    ("sparse backward", 1, torch.bfloat16),
    ("top-k", 2, torch.bfloat16),
]


@pytest.fixture(scope="module")
def workers():
    """To compile on all cores: a minute and more for one."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        yield workers


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resources(arch, workers):
    print(f"\nsm_{arch}: registers of a thread / threads / bytes of shared memory of a program")
    print(f"{'':<35}" + "".join(f"{f'C = {classes:,}':>18}" for classes in CLASSES))
    spilled = []
    wanted = [(op, classes, teachers, dtype, arch) for (op, teachers, dtype), classes in product(VARIANTS, CLASSES)]
    results = dict(zip(wanted, workers.map(compiled, *zip(*wanted, strict=True)), strict=True))
    for op, teachers, dtype in VARIANTS:
        cells = []
        for classes in CLASSES:
            result = results[op, classes, teachers, dtype, arch]
            cells.append(f"{result.registers} / {result.threads} / {result.shared}")
            if result.stack or result.local:
                spilled.append((op, teachers, dtype, classes, result.stack, result.local))
        name = f"{op}, K = {teachers}, {str(dtype).removeprefix('torch.')}"
        print(f"{name:<35}" + "".join(f"{cell:>18}" for cell in cells))
    assert not spilled


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_aligned_rows_move_128_bits_at_a_time(arch):
    result = compiled("forward", 1000, 2, torch.bfloat16, arch)
    assert result.accesses("ld") == ["v4.b32"] * 6  # the student, two teachers: 16 logits a thread, once each
    assert sorted(result.accesses("st")) == ["b32", "b32", "v4.b32", "v4.b32"]  # loss, KL, gradient


def test_a_row_that_begins_anywhere_is_seen_by_these_checks():
    assert set(compiled("forward", 1001, 2, torch.bfloat16, 90).accesses("ld")) == {"b16"}


def test_topk_reads_128_bits_at_a_time():
    assert compiled("top-k", 1000, 2, torch.bfloat16, 90).accesses("ld") == ["v4.b32"] * 4
