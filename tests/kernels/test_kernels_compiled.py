"""The kernels compiled for GPUs that are not here: nothing spilled, 128 bits at a time where rows allow it, and few
instructions."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from mealfast.kernels.dispatch import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")

ARCHITECTURES = [80, 90, 100]
CLASSES = {
    10: "fewer classes than a warp has lanes",
    1000: "ImageNet-1k: rows that begin at multiples of 16 bytes",
    21843: "ImageNet-21k: swept, rows that begin anywhere",
}
# Of float32 and of the backward kernels the most teachers, which need the most registers.
VARIANTS = [
    *[("dense", k, torch.bfloat16) for k in (1, 2, 4)],
    ("dense", 4, torch.float32),
    ("dense backward", 4, torch.bfloat16),
    ("dense backward", 4, torch.float32),
    ("sparse", 1, torch.bfloat16),
    ("sparse backward", 1, torch.bfloat16),
    ("topk", 2, torch.bfloat16),
]


@pytest.fixture(scope="module")
def compiled():
    """benchmarks/_compiled.py's; the folder stands on sys.path meanwhile, for the workers too."""
    sys.path.append(BENCHMARKS)
    from _compiled import compiled

    yield compiled
    sys.path.remove(BENCHMARKS)


@pytest.fixture(scope="module")
def workers(compiled):
    """To compile on all cores: a minute and more for one."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        yield workers


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resources(arch, compiled, workers):
    print(f"\nsm_{arch}: registers of a thread / warps of a program / issue slots a row")
    print(f"{'':<35}" + "".join(f"{f'C = {classes:,}':>20}" for classes in CLASSES))
    wanted = [(op, classes, teachers, dtype, arch) for (op, teachers, dtype), classes in product(VARIANTS, CLASSES)]
    results = dict(zip(wanted, workers.map(compiled, *zip(*wanted, strict=True)), strict=True))
    for op, teachers, dtype in VARIANTS:
        row = [results[op, classes, teachers, dtype, arch] for classes in CLASSES]
        cells = [f"{result.registers} / {result.warps} / {result.issue_slots_per_row}" for result in row]
        name = f"{op}, K = {teachers}, {str(dtype).removeprefix('torch.')}"
        print(f"{name:<35}" + "".join(f"{cell:>20}" for cell in cells))
    assert not {case: result for case, result in results.items() if result.stack or result.local}


def test_issue_slots(compiled):
    """A row of 1000 bfloat16 and two teachers. At full copy speed an H100's memory leaves 2,260 for it."""
    assert compiled("dense", 1000, 2, torch.bfloat16, 90, False).issue_slots_per_row <= 1100
    assert compiled("dense", 1000, 2, torch.bfloat16, 90, True).issue_slots_per_row <= 1300


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_aligned_rows_move_128_bits_at_a_time(compiled, arch):
    result = compiled("dense", 1000, 2, torch.bfloat16, arch)
    assert wide(result.loads) == {"128": 12}  # the student, two teachers: 32 logits a thread, once each
    assert wide(result.stores) == {"": 2, "128": 4}  # loss and KL; gradient
    assert wide(compiled("topk", 1000, 2, torch.bfloat16, arch).loads) == {"128": 8}
    sparse = compiled("sparse", 1000, 2, torch.bfloat16, arch)
    assert wide(sparse.loads) == {"128": 4, "U16": 3}  # the student; ids, probabilities, the student at the ids
    assert wide(sparse.stores) == {"": 2, "128": 4, "U16": 1}


def test_a_row_that_begins_anywhere_is_seen_by_these_checks(compiled):
    assert wide(compiled("dense", 1001, 2, torch.bfloat16, 90).loads) == {"U16": 96}


def wide(kinds: dict[str, int]) -> dict[str, int]:
    """ "LDG.E.128" and "LDG.E.128.CONSTANT" as "128"."""
    widths: dict[str, int] = {}
    for kind, count in kinds.items():
        width = next((part for part in kind.split(".") if part in ("U16", "64", "128")), "")
        widths[width] = widths.get(width, 0) + count
    return widths
