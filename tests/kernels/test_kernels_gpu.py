"""What only a GPU can show: no host sync, CUDA graphs, few launches, long offsets, a clean compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from mealfast.kernels import ensemble_soft_cross_entropy, ensemble_topk, sparse_soft_cross_entropy

from .kernels_bounds import Oracle, check, logits, report_worst, skip_without, softmax_mean

pytestmark = pytest.mark.gpu

SHAPES = [(64, 1000), (8, 21843)]


@pytest.fixture(autouse=True)
def cuda():
    skip_without("cuda")


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    report_worst()


def step(student, teachers, ids, probabilities, scale):
    """Every kernel once, and the backward ones with upstream gradients of 1 and of `scale`."""
    results = []
    for upstream in (torch.ones_like(scale), scale):
        dense = ensemble_soft_cross_entropy(student, teachers, return_kl=True)
        sparse = sparse_soft_cross_entropy(student, ids, probabilities, return_kl=True)
        for loss, kl in (dense, sparse):
            results += [loss.detach(), kl, *torch.autograd.grad(loss, student, upstream)]
    return [*results, *ensemble_topk(teachers, ids.shape[1])]


def inputs(batch, classes, seed=0):
    student = logits(batch, classes, dtype=torch.bfloat16, device="cuda", seed=seed).requires_grad_()
    teachers = [logits(batch, classes, dtype=torch.bfloat16, device="cuda", seed=seed + k + 1) for k in range(2)]
    return student, teachers, *ensemble_topk(teachers, 8), torch.tensor(3.0, device="cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_host_sync(shape):
    arguments = inputs(*shape)
    step(*arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_graph(shape):
    student, teachers, ids, probabilities, _ = arguments = inputs(*shape)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*arguments)
    for seed in (10, 20):
        new_student, new_teachers, new_ids, new_probabilities, _ = new = inputs(*shape, seed=seed)
        with torch.no_grad():
            student.copy_(new_student)
            for teacher, new_teacher in zip(teachers, new_teachers, strict=True):
                teacher.copy_(new_teacher)
            ids.copy_(new_ids)
            probabilities.copy_(new_probabilities)
        graph.replay()
        for got, expected in zip(captured, step(*new), strict=True):
            assert torch.equal(got, expected)


def kernels_of(function) -> list[str]:
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        pytest.skip("torch.profiler records nothing of this GPU: no CUPTI, or no permission to use its counters")
    return [e.name for e in events if not getattr(e, "is_user_annotation", False)]


def test_launches():
    """One for the samples; the means are one more, small; backward is one that finds nothing to do."""
    student, teachers, ids, probabilities, scale = inputs(64, 1000)
    for loss, name in (
        (lambda r, **o: ensemble_soft_cross_entropy(student, teachers, reduction=r, **o), "ensemble_soft_ce_kernel"),
        (
            lambda r, **o: sparse_soft_cross_entropy(student, ids, probabilities, reduction=r, **o),
            "sparse_soft_ce_kernel",
        ),
    ):
        assert kernels_of(lambda f=loss: f("none")) == [name]
        assert len(kernels_of(lambda f=loss: f("mean"))) == 2
        assert len(kernels_of(lambda f=loss: f("mean", return_kl=True))) == 2
        one = torch.ones_like(scale)
        both = kernels_of(lambda f=loss, u=one: torch.autograd.grad(f("mean"), student, u))
        assert both.count(name) == 2
        assert len(both) == 3


def test_offsets_beyond_31_bits():
    batch, classes = 2**15 + 1, 65536
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    student = torch.zeros(batch, classes, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros_like(student)
    student[-1] = logits(classes, device="cuda")
    teacher[-1] = logits(classes, device="cuda", seed=1)
    student.requires_grad_()
    loss = ensemble_soft_cross_entropy(student, [teacher], reduction="none")
    loss.backward(torch.full_like(loss, 2.0))
    last = slice(-1, None)
    oracle = Oracle.of(student[last], softmax_mean([teacher[last]]), upstream=2.0)
    check("dense loss", torch.bfloat16, loss[last].detach(), oracle.loss, oracle.loss_bound())
    check("dense gradient", torch.bfloat16, student.grad[last], oracle.gradient, oracle.gradient_bound(torch.bfloat16))


SANITIZED = """
import torch
from mealfast.kernels import ensemble_soft_cross_entropy, ensemble_topk, sparse_soft_cross_entropy
for classes in (1, 10, 1000, 1001, 4097):
    student = torch.randn(5, classes, device="cuda", requires_grad=True)
    teachers = [torch.randn(5, classes, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    kept = ensemble_topk(teachers, min(classes, 7))
    for loss in (ensemble_soft_cross_entropy(student, teachers), sparse_soft_cross_entropy(student, *kept)):
        torch.autograd.grad(loss, student, torch.tensor(2.0, device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool, tmp_path):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    # Every tensor in an allocation of its own, or an access beyond one would land in the next unnoticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
