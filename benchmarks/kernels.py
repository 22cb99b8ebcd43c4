"""The fused ensemble soft cross-entropy against PyTorch, torch.compile and, where installed, Liger-Kernel.

    python benchmarks/kernels.py [--batch B ...] [--classes C ...] [--teachers K ...] [--dtype bf16 fp32] [--out FILE]

Each figure is a CUDA graph that calls the loss on input after input, more of them than the L2 cache holds, replayed;
its time over the number of calls, so that no host time is in it. Beside it: what an empty kernel and a copy take when
measured so, and the bytes that must move (every logit read once, the student's gradient written once).
Liger's KL divergence gets its target ready-made, which leaves out the ensemble's work; its backward stops the host to
look at the upstream gradient, which no graph can hold, so that it is called from Python instead.
torch.compile compiles once for all B. A case that needs more memory than is free is left out, with the reason.

Without a GPU it says what it cannot measure, and prints the bytes, the launches, what the kernels compile to, and the
time that this allows on a GPU that is named: memory at its peak or every issue slot taken, whichever is longer. A table
measured on that GPU can be held against it.

Shape legend: B batch, K teachers, C classes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from _record import record, write
from torch import Tensor

from mealfast.kernels import ensemble_soft_cross_entropy, ensemble_target

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PASSES = ("forward", "forward with backward")
ROTATED = 512 * 2**20  # bytes of inputs to go through before one is used again: several times any L2 cache
MOST_CALLS = 500  # of a graph
REPLAYS = 50, 10  # at most and at least
SECONDS = 0.5  # to replay for, within these
COPIED = 2**30  # bytes
LIGER = "Liger"
COMPILED = (("dense", False), ("dense", True), ("dense backward", False), ("sparse", True), ("topk", False))


class Gpu(NamedTuple):
    name: str
    bandwidth: float  # bytes a second
    slots: float  # instructions that all schedulers issue in a second: multiprocessors x 4 x clock
    source: str = "NVIDIA's data sheet: peak bandwidth, boost clock"


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 2.039e12, 108 * 4 * 1.41e9),
    "h100": Gpu("H100 SXM", 3.35e12, 132 * 4 * 1.98e9),
    "h200": Gpu("H200 SXM", 4.8e12, 132 * 4 * 1.98e9),
}
# The most [B, C] float32 that a method holds at once, beside inputs and gradient: decides whether a case is tried.
SCRATCH = {"mealfast": 0, "eager": 8, "torch.compile": 4}


def main() -> None:
    args = parse()
    if not torch.cuda.is_available():
        without_gpu(args)
        return
    floor = {"copy GB/s": copy_bandwidth(), "empty kernel us": empty_kernel()}
    print(
        f"{torch.cuda.get_device_name()}: copy {floor['copy GB/s']:.0f} GB/s, empty {floor['empty kernel us']:.2f} us"
    )
    print(f"{'':34}{'':22}{'us':>9}{'p20':>9}{'p80':>9}{'launches':>9}{'GB/s':>8}{'of copy':>8}")
    methods = {name: loss for name, loss in losses().items() if name in args.methods}
    compiled_for = None
    for batch, classes, teachers, dtype in grid(args):
        if compiled_for != (classes, teachers, dtype):
            compiled_for = classes, teachers, dtype
            torch._dynamo.reset()  # or torch.compile gives up after eight shapes
        for with_backward, (name, loss) in itertools.product((False, True), methods.items()):
            row = measure(name, loss, batch, classes, teachers, dtype, with_backward, floor)
            report(row)
            if args.out:
                write(args.out, [row])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 512, 4096, 65536], help="B")
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 21843], help="C")
    parser.add_argument("--teachers", type=int, nargs="+", default=[1, 2, 4], help="K")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--methods", nargs="+", choices=list(losses()), default=list(losses()))
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="without a GPU: compile for these")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="without a GPU: predict the time on this one")
    parser.add_argument("--out", help="file to append one JSON line a figure to")
    return parser.parse_args()


def grid(args: argparse.Namespace):
    """(B, C, K, dtype), with B changing fastest."""
    for classes, teachers, dtype, batch in itertools.product(args.classes, args.teachers, args.dtype, args.batch):
        yield batch, classes, teachers, dtype


def losses() -> dict[str, Callable[[Tensor, list[Tensor]], Tensor]]:
    """name -> loss(student, teachers), a mean."""
    found = {
        "mealfast": ensemble_soft_cross_entropy,
        "eager": formula,
        "torch.compile": torch.compile(formula),
    }
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError:  # Liger itself, or the transformers it wants, is not installed
        return found
    divergence = LigerKLDIVLoss(reduction="batchmean")
    # Of the teachers, the first is taken for the target: `measure` puts it there.
    found[f"{LIGER}, target given"] = lambda student, teachers: divergence(student.log_softmax(-1), teachers[0])
    return found


def formula(student: Tensor, teachers: list[Tensor]) -> Tensor:
    """MEAL V2's Eq. 1 and 3 as one would write them."""
    target = sum(teacher.float().softmax(-1) for teacher in teachers) / len(teachers)
    return -(target * student.float().log_softmax(-1)).sum(-1).mean()


def bytes_to_move(batch: int, classes: int, teachers: int, dtype: torch.dtype, with_backward: bool) -> int:
    return batch * classes * dtype.itemsize * (1 + teachers + with_backward)


def measure(
    name: str, loss: Callable, batch: int, classes: int, teachers: int, dtype: str, with_backward: bool, floor: dict
) -> dict[str, object]:
    moved = bytes_to_move(batch, classes, teachers, DTYPES[dtype], with_backward)
    shape = {"B": batch, "C": classes, "K": teachers, "dtype": dtype, "pass": PASSES[with_backward]}
    read = batch * classes * DTYPES[dtype].itemsize * (1 + teachers)
    copies = min(max(1, ROTATED // read), MOST_CALLS)
    needed = read * copies + moved - read + batch * classes * 4 * SCRATCH.get(name, 8)
    free, _ = torch.cuda.mem_get_info()
    if needed > 0.9 * free:
        return record(name, **shape, error=f"left out: needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    inputs = None
    try:
        inputs = [make_inputs(name, batch, classes, teachers, DTYPES[dtype]) for _ in range(copies)]
        with torch.no_grad():
            upstream = torch.ones_like(loss(*inputs[0]))  # made once: autograd would launch a kernel each time

        def call(student, logits):
            if not with_backward:
                with torch.no_grad():
                    return loss(student, logits)
            return torch.autograd.grad(loss(student, logits), student, upstream)

        times = times_of([lambda i=i: call(*i) for i in inputs], graph=not name.startswith(LIGER))
        launches = count_launches(lambda: call(*inputs[0]))
    except RuntimeError as error:  # out of memory too: one case must not take the others along
        return record(name, **shape, error=str(error).strip().partition("\n")[0])
    finally:
        inputs = None
        torch.cuda.empty_cache()
    bandwidth = moved / times[1] / 1e3
    return record(
        name,
        **shape,
        **dict(zip(("p20 us", "us", "p80 us"), times, strict=True)),
        launches=launches,
        bytes=moved,
        **{"GB/s": bandwidth, "of copy": bandwidth / floor["copy GB/s"]},
        **{"above empty kernel us": times[1] - floor["empty kernel us"]},
        **floor,
    )


def make_inputs(name: str, batch: int, classes: int, teachers: int, dtype: torch.dtype):
    student, *logits = (torch.randn(batch, classes, device="cuda", dtype=dtype) for _ in range(1 + teachers))
    for tensor in (student, *logits):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    if name.startswith(LIGER):
        logits = [ensemble_target(logits).to(dtype)]
    return student.requires_grad_(), logits


def times_of(calls: list[Callable[[], object]], graph: bool = True) -> tuple[float, float, float]:
    """Microseconds a call, as 20th, 50th and 80th percentile over the replays of one graph of all calls."""

    def replay():
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()  # a graph allocates from a pool of its own
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            replay()
        replay = captured.replay
    seconds = min(_seconds(replay) for _ in range(2))
    replays = max(REPLAYS[1], min(REPLAYS[0], round(SECONDS / seconds)))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    deciles = statistics.quantiles([start.elapsed_time(end) * 1e3 / len(calls) for start, end in events], n=10)
    return deciles[1], deciles[4], deciles[7]


def _seconds(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def count_launches(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in events)  # torch.compile annotates its calls


def copy_bandwidth() -> float:
    """GB/s, read and written bytes together."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / times_of([lambda: target.copy_(source)] * 4)[1] / 1e3


def empty_kernel() -> float:
    """Microseconds a launch: torch.cuda._sleep(0) starts a kernel that does nothing."""
    return times_of([lambda: torch.cuda._sleep(0)] * MOST_CALLS)[1]


def report(row: dict[str, object]) -> None:
    shape = f"B {row['B']:<6} C {row['C']:<6} K {row['K']} {row['dtype']}"
    label = f"{shape:<34}{row['name'] + (' +bw' if row['pass'] == PASSES[1] else ''):<22}"
    if "error" in row:
        print(f"{label}{row['error']}", flush=True)
        return
    times = "".join(f"{row[key]:>9.2f}" for key in ("us", "p20 us", "p80 us"))
    print(f"{label}{times}{row['launches']:>9}{row['GB/s']:>8.0f}{row['of copy']:>8.0%}", flush=True)


def without_gpu(args: argparse.Namespace) -> None:
    print("No CUDA device: times, achieved bytes/s and the comparison with PyTorch are not measured.")
    print("On a machine with one: python benchmarks/kernels.py --out benchmarks/results/kernels.jsonl")
    print("\nLaunches: forward 1, and 1 small one for the mean; backward 1, which ends at once where upstream is 1.")
    print("\nMiB that must move, forward / forward with backward:")
    for batch, classes, teachers, dtype in grid(args):
        moved = [bytes_to_move(batch, classes, teachers, DTYPES[dtype], b) / 2**20 for b in (False, True)]
        print(f"  B {batch:<6} C {classes:<6} K {teachers} {dtype}   {moved[0]:>10.1f} / {moved[1]:.1f}")
    if importlib.util.find_spec("triton") is None:
        print("\nTriton is not installed: nothing to compile.")
        return
    gpu = GPUS[args.gpu]
    batch = max(args.batch)
    print(f"\nCompiled, and the least time for {batch} rows on an {gpu.name}, the longer of two: bytes at")
    print(f"{gpu.bandwidth / 1e12:.2f} TB/s, instructions at {gpu.slots / 1e12:.2f} T/s ({gpu.source}).")
    head = ("registers", "warps", "stack", "instructions", "slots/row", "bytes/row", "us", "bound by")
    print(f"{'':43}" + "".join(f"{name:>13}" for name in head))
    for arch, (op, kl), classes, teachers, dtype in itertools.product(
        args.arch, COMPILED, args.classes, args.teachers, args.dtype
    ):
        if op == "sparse" and teachers != args.teachers[0]:
            continue  # it reads no teachers
        row = predict(op, kl, classes, teachers, dtype, arch, gpu, batch)
        name = f"sm_{arch} {op}{' + kl' if kl else ''}"
        shape = f"C {classes:<6}" + (f"K {teachers} " if op != "sparse" else "    ") + dtype
        keys = ("registers", "warps", "stack", "instructions", "issue_slots_per_row", "bytes_per_row")
        cells = *(row[key] for key in keys), f"{row['predicted us']:.1f}", row["bound"]
        print(f"  {name:<24}{shape:<17}" + "".join(f"{cell:>13}" for cell in cells), flush=True)
        if args.out:
            write(args.out, [row])


def predict(
    op: str, kl: bool, classes: int, teachers: int, dtype: str, arch: int, gpu: Gpu, batch: int
) -> dict[str, object]:
    """What a kernel takes of a GPU that need not be there, and the time that follows for `batch` rows."""
    from _compiled import bytes_per_row, compiled

    found = compiled(op, classes, teachers, DTYPES[dtype], arch, kl)
    moved = bytes_per_row(op, classes, teachers, DTYPES[dtype], kl)
    seconds = {"memory": batch * moved / gpu.bandwidth, "issue": batch * found.issue_slots_per_row / gpu.slots}
    bound = max(seconds, key=seconds.get)
    shape = {"op": op, "classes": classes, "teachers": teachers, "dtype": dtype, "arch": f"sm_{arch}", "kl": kl}
    resources = {key: getattr(found, key) for key in ("warps", "instructions", "registers", "stack", "local", "shared")}
    return record(
        "mealfast compiled",
        **shape,
        **resources,
        issue_slots_per_row=found.issue_slots_per_row,
        bytes_per_row=moved,
        B=batch,
        bound=bound,
        **{"predicted for": gpu.name, "predicted us": seconds[bound] * 1e6},
    )


if __name__ == "__main__":
    main()
