"""Compile a kernel for a GPU that need not be there, and say what it takes: registers, memory, instructions.

Shape legend: B batch, K teachers, C classes, k entries kept of each target.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import soft_ce_triton, sparse_soft_ce_triton, topk_targets_triton
from .row_triton import blocks

OPS = ("forward", "backward", "sparse forward", "sparse backward", "top-k")
KEPT = 16  # k of the sparse ops

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Compiled:
    registers: int  # of a thread
    threads: int  # of a program
    shared: int  # bytes of a program
    stack: int  # bytes of a thread
    local: int  # bytes of a thread; spilled registers are here or on the stack
    ptx: str

    def accesses(self, kind: str) -> list[str]:
        """Widths of the PTX's global loads ("ld") or stores ("st"), such as ["v4.b32", "b32"].

        Of the kernel itself, not of a function that it calls (for the few rows whose gradient is computed again).
        """
        entry = self.ptx[self.ptx.index(".entry") :].partition("\n}")[0]
        return re.findall(rf"\b{kind}\.global[\w.:]*?\.((?:v\d\.)?[a-z]\d+)\b", entry)


def compiled(op: str, classes: int, teachers: int, dtype: torch.dtype, arch: int) -> Compiled:
    """The kernel of one of OPS, for contiguous logits of `dtype`, as its launcher would have it compiled.

    `arch` is 80, 90, 100: a compute capability times 10. The forward kernels write loss, KL and gradient.
    """
    logits = "*" + _TYPES[dtype]
    real = tl.float64 if dtype == torch.float32 and op != "top-k" else tl.float32
    block, options = blocks(classes, real)
    kept = min(KEPT, classes)
    backward = op.endswith("backward")
    # Strings are types of run-time arguments, other values are constexpr.
    arguments = {
        "student": logits,
        "teachers": (logits,) * teachers,
        "weights": (("fp32",) * 2,) * teachers,
        "ids": "*i32" if op == "top-k" else "*u16",
        "probabilities": "*fp32" if op == "top-k" else "*fp16",
        "loss": None if backward else "*fp32",
        "kl": None if backward else "*fp32",
        "gradient": logits,
        "upstream": "*fp32" if backward else None,
        "B": "i32",
        "factor": ("fp32",) * 2,
        "one_over_t": "fp32",
        "exponent": ("fp32",) * 4,
        "upstream_stride": 0,
        "student_stride": classes,
        "teacher_strides": (classes,) * teachers,
        "RENORMALISE": False,
        "C": classes,
        "BLOCK": block,
        "REAL": real,
        "K": kept,
        "K_BLOCK": max(2, triton.next_power_of_2(kept)),
    }
    if op == "top-k":
        kernel = topk_targets_triton.ensemble_topk_kernel
    elif op.startswith("sparse"):
        kernel = sparse_soft_ce_triton.sparse_soft_ce_kernel
    else:
        kernel = soft_ce_triton.ensemble_soft_ce_kernel
    result = triton.compile(_source(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resource_usage(result.asm["cubin"])
    return Compiled(
        registers=usage["REG"],
        threads=32 * options["num_warps"],
        shared=result.metadata.shared,
        stack=usage["STACK"],
        local=usage["LOCAL"],
        ptx=result.asm["ptx"],
    )


def _source(kernel, arguments: dict[str, object]) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        leaves = list(_leaves(arguments[name], (index,)))
        if not all(isinstance(leaf, str) for _, leaf in leaves):
            signature[name] = "constexpr"
            constants[(index,)] = arguments[name]
            continue
        signature[name] = arguments[name]
        for path, kind in leaves:
            if kind.startswith("*"):  # PyTorch's allocations begin at multiples of 16 bytes
                attributes[path] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _leaves(value: object, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], object]]:
    """What nested tuples hold, each with its indices."""
    if isinstance(value, tuple):
        for position, element in enumerate(value):
            yield from _leaves(element, (*path, position))
    else:
        yield path, value


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """The most that `cuobjdump --dump-resource-usage`, which Triton brings along, says of a cubin's functions."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [cuobjdump, "--dump-resource-usage", path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {}
    for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text):
        usage[name] = max(usage.get(name, 0), int(value))
    return usage
