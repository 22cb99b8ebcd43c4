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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mealfast.kernels import row_triton, soft_ce_triton, sparse_soft_ce_triton, topk_targets_triton

OPS = ("dense", "dense backward", "sparse", "sparse backward", "topk")
KEPT = 16  # k of the sparse ops

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # of NVIDIA's, which Triton brings along


@dataclass(frozen=True)
class Compiled:
    registers: int  # of a thread
    warps: int  # of a program
    shared: int  # bytes of a program
    stack: int  # bytes of a thread; spilled registers are here or in local memory
    local: int  # bytes of a thread
    instructions: int  # without padding
    issue_slots_per_row: int  # instructions as executed, a loop's body times its trips, x warps
    loads: dict[str, int]  # from global memory: kind, such as "LDG.E.128" -> how many instructions
    stores: dict[str, int]


def compiled(op: str, classes: int, teachers: int, dtype: torch.dtype, arch: int, kl: bool = True) -> Compiled:
    """The kernel of one of OPS, for contiguous logits of `dtype`, as its launcher would have it compiled.

    `arch` is 80, 90, 100: a compute capability times 10. The forward kernels write loss, KL (or not) and gradient.
    """
    logits = "*" + _TYPES[dtype]
    kept = min(KEPT, classes)
    if op == "topk":
        block, k_block, options = topk_targets_triton.topk_blocks(classes, kept)
    else:
        (block, options), k_block = row_triton.blocks(classes), triton.next_power_of_2(kept)
    backward = op.endswith("backward")
    # Strings are types of run-time arguments, other values are constexpr.
    arguments = {
        "student": logits,
        "teachers": (logits,) * teachers,
        "weights": ("fp32",) * teachers,
        "ids": "*i32" if op == "topk" else "*u16",
        "probabilities": "*fp32" if op == "topk" else "*fp16",
        "loss": None if backward else "*fp32",
        "kl": "*fp32" if kl and not backward else None,
        "gradient": logits,
        "upstream": "*fp32" if backward else None,
        "B": "i32",
        "factor": "fp32",
        "log2e_over_t": "fp32",
        "upstream_stride": 0,
        "student_stride": classes,
        "teacher_strides": (classes,) * teachers,
        "RENORMALISE": False,
        "C": classes,
        "BLOCK": block,
        "K": kept,
        "K_BLOCK": k_block,
    }
    if op == "topk":
        kernel, read = topk_targets_triton.ensemble_topk_kernel, teachers
    elif op.startswith("sparse"):
        kernel, read = sparse_soft_ce_triton.sparse_soft_ce_kernel, 1
    else:
        kernel, read = soft_ce_triton.ensemble_soft_ce_kernel, 1 + teachers
    result = triton.compile(_source(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=options)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "--dump-resource-usage", result)))
    instructions, loops = _instructions(_tool("nvdisasm", "-c", result))
    if backward:
        loops.remove(max(loops, key=len))  # over rows
    executed = len(instructions)
    for position, loop in enumerate(loops):
        swept = read if position == len(loops) - 1 else 1  # the last sweep is over all tensors, others over one
        body = [instructions[i] for i in loop]
        loaded = 32 * options["num_warps"] * sum(_bytes(i) for i in body if "LDG" in i)
        trips = block * -(-classes // block) * dtype.itemsize * swept // loaded  # the rest of it stands after the loop
        executed += len(loop) * (trips - 1)
    return Compiled(
        registers=int(usage["REG"]),
        warps=options["num_warps"],
        shared=result.metadata.shared,
        stack=int(usage["STACK"]),
        local=int(usage["LOCAL"]),
        instructions=len(instructions),
        issue_slots_per_row=executed * options["num_warps"],
        loads=_kinds(instructions, "LDG"),
        stores=_kinds(instructions, "STG"),
    )


def bytes_per_row(op: str, classes: int, teachers: int, dtype: torch.dtype, kl: bool = True) -> int:
    """What must cross the memory bus: each logit read once, each result written once."""
    row, kept, samples = classes * dtype.itemsize, min(KEPT, classes), 4 * (1 + kl)
    if op == "topk":
        return teachers * row + kept * (4 + 4)
    read = row + kept * (2 + 2) if op.startswith("sparse") else (1 + teachers) * row
    return read + row + (4 if op.endswith("backward") else samples)


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


def _tool(name: str, option: str, result) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(result.asm["cubin"])
        return subprocess.run([_TOOLS / name, option, path], check=True, capture_output=True, text=True).stdout


def _instructions(sass: str) -> tuple[list[str], list[range]]:
    """Instructions without padding and the jump to itself that follows the end, and each loop's indices, in order."""
    instructions, labels, jumps = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            target = re.search(r"\b(?:BRA|CALL\.REL\.NOINC)\b.*\((\.L\w+)\)", code[1])
            itself = target and labels.get(target[1]) == len(instructions)
            if itself or re.match(r"(@\S+\s+)?NOP\b", code[1]):
                continue
            if target and target[1] in labels:
                jumps.append(range(labels[target[1]], len(instructions) + 1))
            instructions.append(code[1])
    assert not any(re.search(r"\bRET\b", i) for i in instructions), (
        "a function's instructions count once, not as called"
    )
    return instructions, sorted(jumps, key=lambda loop: loop.start)


def _bytes(load: str) -> int:
    """What a thread loads by one instruction, such as "@P0 LDG.E.U16 R1, desc[UR4][R2.64]"."""
    kind = re.search(r"\bLDG\S*", load)[0].split(".")
    return next((size for name, size in (("U16", 2), ("64", 8), ("128", 16)) if name in kind), 4)


def _kinds(instructions: list[str], kind: str) -> dict[str, int]:
    found = [name for i in instructions for name in re.findall(rf"\b{kind}\S*", i)]
    return {name: found.count(name) for name in sorted(set(found))}
