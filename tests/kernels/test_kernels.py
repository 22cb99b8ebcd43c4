"""Ensemble soft cross-entropy against float64, on every path: plain PyTorch, Triton on a GPU, Triton interpreted.

The interpreted path is this file again, in a process of its own: see test_kernels_interpreted.py.
"""

from __future__ import annotations

import math
import subprocess
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mealfast.kernels import EnsembleSoftCrossEntropy, ensemble_soft_cross_entropy, ensemble_target
from mealfast.kernels.dispatch import INTERPRETED, uses_triton

from .kernels_bounds import (
    DTYPES,
    EPS,
    Oracle,
    agreeing,
    check,
    check_all,
    logits,
    over,
    probability_bound,
    report_worst,
    skip_without,
    softmax_mean,
)

CLASSES = {
    1: "one class: probability 1 whatever its logit",
    2: "the fewest between which there is a choice",
    10: "fewer classes than a warp has lanes",
    16: "a whole block, nothing masked",
    17: "one more than a power of two: most of the block masked",
    1000: "ImageNet-1k: rows that begin at multiples of 16 bytes",
    1001: "TensorFlow's ImageNet with a background class: rows that begin anywhere",
    4096: "the longest row held in registers",
    4097: "the shortest row swept in chunks, the last chunk with a single class",
    21843: "ImageNet-21k",
    65536: "the most classes that uint16 ids can name",
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    skip_without(request.param)
    return request.param


@pytest.fixture
def triton_device(device):
    if not uses_triton(torch.empty(0, device=device)):
        pytest.skip("plain PyTorch here: test_kernels_interpreted.py runs this on the CPU, or a GPU does")
    return device


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    report_worst()


def run(student, teachers, upstream=None, **options):
    """Loss, KL and, in student.grad, the gradient of sum(upstream * loss)."""
    student.requires_grad_()
    student.grad = None
    loss, kl = ensemble_soft_cross_entropy(student, teachers, return_kl=True, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss, kl


# The formula, its grid of sizes and options.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES, ids=str)
def test_sizes(device, classes, dtype):
    batch = 2 if classes > 4097 else 5
    student = logits(batch, classes, dtype=dtype, device=device)
    teachers = [logits(batch, classes, dtype=dtype, device=device, seed=k + 1) for k in range(2)]
    loss, kl = run(student, teachers)
    oracle = Oracle.of(student, softmax_mean(teachers), upstream=1 / batch)
    check_all("dense", student, loss, kl, oracle, "mean")


@pytest.mark.parametrize(("reduction", "temperature"), [("mean", 2.5), ("sum", 1.0), ("none", 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("classes", [10, 4100], ids=["in registers", "swept"])
def test_upstream_gradients(device, classes, dtype, reduction, temperature):
    batch = 3
    student = logits(batch, classes, dtype=dtype, device=device)
    teachers = [logits(batch, classes, dtype=torch.float32, device=device, seed=k + 1) for k in range(2)]
    upstream = torch.tensor([-2.5, 1.0, 0.3] if reduction == "none" else -2.5, device=device)
    loss, kl = run(student, teachers, upstream, temperature=temperature, reduction=reduction)
    upstream = upstream.double() / (batch if reduction == "mean" else 1)
    oracle = Oracle.of(student, softmax_mean(teachers, temperature=temperature), temperature, upstream)
    check_all("dense", student, loss, kl, oracle, reduction)


@pytest.mark.parametrize("classes", [10, 4100])
@pytest.mark.parametrize(
    "teachers",
    [
        [torch.float32],
        [torch.bfloat16, torch.float16],
        [torch.float16, torch.float32, torch.bfloat16, torch.bfloat16],
        [torch.bfloat16] * 16,
    ],
    ids=["1 teacher", "2 dtypes", "3 dtypes", "16 teachers"],
)
def test_teachers(device, teachers, classes):
    weights = [float(k + 1) for k in range(len(teachers))]
    student = logits(3, classes, dtype=torch.bfloat16, device=device)
    teachers = [logits(3, classes, dtype=dtype, device=device, seed=k + 1) for k, dtype in enumerate(teachers)]
    loss, kl = run(student, teachers, weights=weights, reduction="sum")
    target = softmax_mean(teachers, [w / sum(weights) for w in weights])
    check_all("dense", student, loss, kl, Oracle.of(student, target), "sum")
    check("target", torch.float32, ensemble_target(teachers, weights=weights), target, probability_bound(target))


def test_one_tensor_of_teachers_is_the_sequence(device):
    student, teachers = logits(3, 10, device=device), logits(4, 3, 10, device=device, seed=1)
    assert torch.equal(
        ensemble_soft_cross_entropy(student, teachers), ensemble_soft_cross_entropy(student, list(teachers))
    )


def test_rows_of_any_stride(device):
    wide = logits(4, 50, device=device)
    teacher = logits(12, 8, device=device, seed=1)
    cases = [
        (wide[:, 3:15], teacher.T[:4].T.reshape(12, 4).T),  # rows apart; classes apart
        (wide[::2, 3:15], wide[1::2, 20:32]),
        (wide[:1, :12].expand(4, 12), teacher.T[:4]),  # one row over and over
    ]
    for student, target in cases:
        student = student.detach()
        contiguous = student.contiguous()
        loss, kl = run(student, [target])
        expected, expected_kl = run(contiguous, [target.contiguous()])
        torch.testing.assert_close((loss, kl), (expected, expected_kl), rtol=8 * EPS, atol=0)
        torch.testing.assert_close(student.grad, contiguous.grad, rtol=0, atol=2 * EPS)


DRAWN = {
    "shape": st.tuples(st.integers(0, 4), st.integers(1, 70)),
    "dtypes": st.lists(st.sampled_from(DTYPES), min_size=2, max_size=5),
    "scale": st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    "offset": st.sampled_from([0.0, -60.0, 1000.0]),
    "temperature": st.sampled_from([0.5, 1.0, 4.0]),
    "masked": st.integers(0, 5),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
    "seed": st.integers(0, 2**32),
}


@settings(max_examples=20 if INTERPRETED else 100, deadline=None)
@given(**DRAWN)
def test_drawn(**drawn):
    check_drawn("cpu", **drawn)


@pytest.mark.gpu
@settings(max_examples=10, deadline=None)  # each is a shape to compile for
@given(**DRAWN)
def test_drawn_on_a_gpu(**drawn):
    skip_without("cuda")
    check_drawn("cuda", **drawn)


def check_drawn(device, shape, dtypes, scale, offset, temperature, masked, reduction, seed):
    batch, classes = shape
    tensors = [
        logits(batch, classes, dtype=dtype, device=device, scale=scale, seed=seed + i) + offset
        for i, dtype in enumerate(dtypes)
    ]
    for tensor in tensors:
        tensor[:, : min(masked, classes - 1)] = -math.inf
    student, *teachers = tensors
    upstream = logits(batch, device=device, seed=seed) if reduction == "none" else logits(1, seed=seed)[0].to(device)
    loss, kl = run(student, teachers, upstream, reduction=reduction, temperature=temperature)
    assert kl.shape == loss.shape == (shape[:1] if reduction == "none" else ())
    assert student.grad.shape == shape
    if batch > 0:
        upstream = upstream / batch if reduction == "mean" else upstream
        oracle = Oracle.of(student, softmax_mean(teachers, temperature=temperature), temperature, upstream)
        check_all("drawn", student, loss, kl, oracle, reduction)


# The bounds themselves.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 1000, 65536])
def test_the_bounds_refuse_a_gradient_of_zero_and_one_without_its_mean(classes, dtype):
    batch = 2
    student = logits(batch, classes, dtype=dtype)
    oracle = Oracle.of(student, softmax_mean([logits(batch, classes, seed=1)]), upstream=1 / batch)
    right = oracle.gradient.to(dtype)
    assert over(right, oracle.gradient, oracle.gradient_bound(dtype)) < 1
    for wrong in (torch.zeros_like(right), right * batch):
        assert over(wrong, oracle.gradient, oracle.gradient_bound(dtype)) > 10


@pytest.mark.parametrize("classes", [10, 1000])
def test_the_bounds_refuse_accumulation_in_float16(classes):
    """With reduction "sum": a mean's 1/B hides much of it below float16's smallest numbers."""
    student, teacher = (logits(4, classes, dtype=torch.float16, seed=seed) for seed in range(2))
    e = [(x - x.amax(-1, keepdim=True)).exp() for x in (student, teacher)]
    total = [torch.zeros(4, dtype=torch.float16) for _ in e]
    for c in range(classes):
        total = [t + x[:, c] for t, x in zip(total, e, strict=True)]
    q, p = (x / t[:, None] for x, t in zip(e, total, strict=True))
    oracle = Oracle.of(student, softmax_mean([teacher]))
    assert over(q - p, oracle.gradient, oracle.gradient_bound(torch.float16)) > 3
    loss = total[0].log() + ((student.amax(-1, keepdim=True) - student) * p).sum(-1)
    assert over(loss.sum(), oracle.loss.sum(), oracle.loss_bound().sum()) > 10


@pytest.mark.skipif(
    not INTERPRETED,
    reason="needs the interpreter, whose exponential can be exchanged: test_kernels_interpreted.py runs it",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 1000, 4100])
def test_the_bounds_leave_room_for_a_gpus_functions(classes, dtype, monkeypatch):
    """exp2 off by 2 units in the last place, log2 by 2 eps of 1 or of itself (PTX's bounds), both always upwards."""
    exp2, log2 = numpy.exp2, numpy.log2
    monkeypatch.setattr(numpy, "exp2", lambda x: (exp2(x) * numpy.float32(1 + 2 * EPS)).astype(x.dtype))
    monkeypatch.setattr(numpy, "log2", lambda x: (log2(x) + 2 * EPS * numpy.maximum(1, abs(log2(x)))).astype(x.dtype))
    student = logits(8, classes, dtype=dtype)
    teachers = [logits(8, classes, dtype=dtype, seed=k + 1) for k in range(2)]
    student[:4] = teachers[0][:4]
    loss, kl = run(student, teachers, reduction="none")
    check_all("off", student, loss, kl, Oracle.of(student, softmax_mean(teachers)), "none")


def test_the_reference_in_float64_passes_gradcheck():
    student = logits(3, 7).double().requires_grad_()
    teachers = [logits(3, 7, seed=1).double(), logits(3, 7, seed=2).double()]
    for options in ({}, {"temperature": 2.5, "reduction": "none"}, {"weights": [3, 1], "reduction": "sum"}):
        assert torch.autograd.gradcheck(lambda s, o=options: ensemble_soft_cross_entropy(s, teachers, **o), student)


def test_float64_is_computed_in_float64(device):
    student, teacher = logits(3, 7, device=device).double(), logits(3, 7, device=device, seed=1)
    loss = ensemble_soft_cross_entropy(student, [teacher], reduction="none")
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, Oracle.of(student, softmax_mean([teacher])).loss, rtol=1e-7, atol=0)


# Edges.


@pytest.fixture(params=[12, 4100], ids=["in registers", "swept"])
def rows(request, device):
    """A student and two teachers, [3, C] float32."""
    return [logits(3, request.param, device=device, seed=i) for i in range(3)]


def test_masked_classes_are_as_if_absent(rows):
    student, *teachers = rows
    expected, expected_kl = run(student[:, 5:].clone(), [t[:, 5:] for t in teachers], reduction="none")
    for tensor in rows:
        tensor[:, :5] = -math.inf
    loss, kl = run(student, teachers, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=8 * EPS, atol=8 * EPS)
    torch.testing.assert_close(kl, expected_kl, rtol=0, atol=12 * EPS * (1 + expected.max().item()))
    assert student.grad[:, :5].eq(0).all()


def test_a_class_that_the_student_excludes_and_a_teacher_does_not(rows):
    student, *teachers = rows
    student[1, 2] = -math.inf
    loss, kl = run(student, teachers, reduction="none")
    assert loss.isinf().tolist() == kl.isinf().tolist() == [False, True, False]
    assert student.grad.isfinite().all()


def test_logits_of_ten_thousand(rows):
    student, teacher, _ = (torch.zeros_like(r) for r in rows)
    teacher[:, 3] = 1e4
    student[0, 3] = 1e4  # certain and right: 0
    student[1, 4] = 1e4  # certain and wrong: exactly the gap
    loss, kl = run(student, [teacher], reduction="none")
    expected = torch.tensor([0.0, 1e4, math.log(student.shape[1])], device=student.device)
    torch.testing.assert_close(loss.detach(), expected, rtol=4 * EPS, atol=0)
    torch.testing.assert_close(kl, expected, rtol=4 * EPS, atol=0)
    assert student.grad[0].eq(0).all()
    assert student.grad[1, [3, 4]].tolist() == [-1.0, 1.0]


def test_equal_logits(rows):
    student, teacher = torch.full_like(rows[0], 7.0), torch.full_like(rows[1], -3.0)
    loss, kl = run(student, [teacher])
    torch.testing.assert_close(loss.item(), math.log(student.shape[1]), rtol=4 * EPS, atol=0)
    assert abs(kl.item()) <= 4 * EPS * loss.item()
    assert student.grad.abs().max().item() <= EPS / student.shape[1]


def test_one_logit_far_above_many(device):
    """Neither confident nor even: the others' sum is near 1, and each of them rounds."""
    student, teacher = logits(2, 21843, scale=1.0), logits(2, 21843, scale=1.0, seed=1)
    student[0, 5] += 9
    teacher[1, 5] += 9
    student, teacher = student.to(device), teacher.to(device)
    loss, kl = run(student, [teacher], reduction="none")
    check_all("dense", student, loss, kl, Oracle.of(student, softmax_mean([teacher])), "none")


@pytest.mark.parametrize("classes", [2, 12])
def test_two_classes_share_the_whole_mass(device, classes):
    """Equal logits, at offsets whose own rounding is larger than the loss's."""
    tops = torch.tensor([-60.0, -7.3, -0.1, 33.7, 1234.5])[:, None]
    logits = torch.cat([tops, tops, (tops - 500).expand(-1, classes - 2)], 1).to(device)
    for dtype, temperature in ((torch.float32, 0.7), (torch.bfloat16, 1.0)):
        student = torch.zeros_like(logits, dtype=dtype)
        student[:, 2:] = -200
        loss, kl = run(student, [logits], reduction="none", temperature=temperature)
        oracle = Oracle.of(student, softmax_mean([logits], temperature=temperature), temperature)
        check_all("tied", student, loss, kl, oracle, "none")


@pytest.mark.parametrize("teachers_class", [0, 1], ids=["agree", "differ"])
@pytest.mark.parametrize("classes", [2, 1000, 4100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows(device, dtype, classes, teachers_class):
    offsets = 10 * torch.arange(4)  # from no confidence to a loss of about 1e-10
    student, teacher = (logits(4, classes, scale=0.5, seed=seed) for seed in range(2))
    student[:, 0] += offsets
    teacher[:, teachers_class] += offsets
    student, teacher = student.to(device, dtype), teacher.to(device, dtype)
    loss, kl = run(student, [teacher], reduction="none")
    oracle = Oracle.of(student, softmax_mean([teacher]))
    assert teachers_class == 1 or oracle.loss[-1] < 1e-6
    check_all("confident", student, loss, kl, oracle, "none")
    assert (kl >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("classes", "weights", "temperature"),
    [(2, [1.0], 2.5), (10, [1.0] * 16, 0.7), (1000, [1.0, 2.0], 1.0), (4100, [1.0] * 3, 2.5)],
)
def test_student_and_target_that_agree(device, dtype, classes, weights, temperature):
    """The gradient is the difference of two probabilities, which may be anything down to nothing."""
    noise, confidence = torch.tensor([(0.1, 0), (1e-3, 0), (1e-5, 0), (0.0, 0), (1e-5, 10), (0.0, 25)]).T
    student = logits(len(noise), classes)
    student[:, 0] += confidence
    student = student.to(device, dtype)
    weights = [w / sum(weights) for w in weights]
    teachers = agreeing(student, noise.double(), weights, temperature)
    upstream = torch.where(torch.arange(len(noise)) % 2 == 0, 1.0, 0.3).to(device)  # every other row is for backward
    loss, kl = run(student, teachers, upstream, weights=weights, temperature=temperature, reduction="none")
    oracle = Oracle.of(student, softmax_mean(teachers, weights, temperature), temperature, upstream.double())
    check_all("agreeing", student, loss, kl, oracle, "none")


@pytest.mark.parametrize("spoiled", [0, 1], ids=["student", "teacher"])
def test_nan_stays_in_its_sample(rows, spoiled):
    student, *teachers = rows
    clean, clean_kl = run(student, teachers, reduction="none")
    clean_gradient = student.grad
    student = student.detach().clone()
    [student, *teachers][spoiled][1, 2] = math.nan
    loss, kl = run(student, teachers, reduction="none")
    for got, expected in ((loss, clean), (kl, clean_kl), (student.grad, clean_gradient)):
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_an_empty_batch(device):
    student, teachers = torch.empty(0, 5, device=device), [torch.empty(0, 5, device=device)]
    for reduction, expected in (("mean", math.nan), ("sum", 0.0), ("none", [])):
        loss, kl = run(student, teachers, reduction=reduction)
        torch.testing.assert_close(loss.detach(), torch.tensor(expected, device=device), equal_nan=True)
        torch.testing.assert_close(kl, torch.tensor(expected, device=device), equal_nan=True)
        assert student.grad.shape == (0, 5)


def test_one_class(device):
    student = logits(3, 1, device=device)
    loss, kl = run(student, [logits(3, 1, device=device, seed=1)])
    assert (loss.item(), kl.item()) == (0.0, 0.0)
    assert student.grad.eq(0).all()


# Gradients, and where they go.


def test_teachers_get_no_gradient_and_kl_has_none(device):
    student, teacher = logits(3, 5, device=device), logits(3, 5, device=device, seed=1).requires_grad_()
    _, kl = run(student, [teacher])
    assert teacher.grad is None
    assert not kl.requires_grad
    with torch.no_grad():
        assert not ensemble_soft_cross_entropy(student, [teacher]).requires_grad


def test_the_kl_of_an_ensemble_to_itself_is_nothing(device):
    teacher = logits(3, 1000, device=device)
    loss, kl = run(teacher.clone(), [teacher])
    assert 0 <= kl.item() <= 4 * EPS * loss.item()


def test_a_retained_graph_gives_each_backward_its_own_gradient(device):
    student, teachers = logits(3, 11, device=device).requires_grad_(), [logits(3, 11, device=device, seed=1)]
    loss = ensemble_soft_cross_entropy(student, teachers)
    (first,) = torch.autograd.grad(loss, student, torch.tensor(2.0, device=device), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, student, retain_graph=True)
    (third,) = torch.autograd.grad(loss, student, torch.tensor(2.0, device=device))
    assert torch.equal(first, kept)
    assert torch.equal(first, third)
    torch.testing.assert_close(first, 2 * second)


def test_a_second_derivative_is_refused(triton_device):
    student = logits(3, 5, device=triton_device).requires_grad_()
    loss = ensemble_soft_cross_entropy(student, [logits(3, 5, device=triton_device, seed=1)])
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_a_loss_scale_saves_small_gradients_of_float16(device):
    """A mean over 128 puts most gradients below what float16 can tell from 0: scaling them afterwards is too late."""
    batch, scale = 128, 65536.0
    student = logits(batch, 100, dtype=torch.float16, device=device, scale=0.5)
    teachers = [student.detach() + 0.01 * logits(batch, 100, dtype=torch.float16, device=device, seed=1)]
    run(student, teachers, torch.tensor(scale, device=device))
    oracle = Oracle.of(student, softmax_mean(teachers), upstream=scale / batch)
    check("scaled gradient", student.dtype, student.grad, oracle.gradient, oracle.gradient_bound(student.dtype))
    too_late = (oracle.gradient / scale).half().double() * scale
    assert over(too_late, oracle.gradient, oracle.gradient_bound(student.dtype)) > 1


# Compilation.


def test_compiles_as_one_graph(device):
    backend = "aot_eager" if INTERPRETED else "inductor"
    layer = torch.nn.Linear(6, 11, device=device)
    images, teachers = logits(4, 6, device=device), [logits(4, 11, device=device, seed=k) for k in range(2)]
    criterion = EnsembleSoftCrossEntropy(weights=[3, 1], temperature=2.0, return_kl=True)

    def step(images):
        loss, kl = criterion(layer(images), teachers)
        return 3 * loss, kl

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        layer.zero_grad()
        loss, kl = function(images)
        loss.backward()
        results.append((loss.detach(), kl, layer.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1])


def test_autocast_does_not_touch_it(device):
    student, teachers = logits(3, 11, device=device), [logits(3, 11, device=device, seed=1)]
    expected, expected_kl = run(student, teachers)
    with torch.autocast(device, torch.bfloat16):
        loss, kl = run(student, teachers)
    assert (loss.item(), kl.item()) == (expected.item(), expected_kl.item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(triton_device, reduction):
    student, teachers = logits(3, 5, device=triton_device), [logits(3, 5, device=triton_device, seed=1)] * 2
    call = student, teachers, [0.5, 0.5], 1.0, reduction
    samples, gradient = torch.zeros(2, 3, device=triton_device), torch.zeros_like(student)
    upstream = torch.full([3] if reduction == "none" else [], 2.0, device=triton_device)
    for outputs in ((samples, gradient, None), (samples[:1], None, None), (None, gradient, upstream)):
        torch.library.opcheck(torch.ops.mealfast.ensemble_soft_ce, (*call, *outputs))


WITHOUT_TRITON = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else find(name, *more)
import torch
from mealfast.kernels import ensemble_soft_cross_entropy
assert not [name for name in sys.modules if name.startswith("mealfast.kernels") and name.endswith("_triton")]
assert ensemble_soft_cross_entropy(torch.zeros(2, 4), [torch.zeros(2, 4)]).item() > 1.38
"""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is Triton, which this test hides; it runs without")
def test_imports_and_runs_where_triton_is_missing(tmp_path):
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=tmp_path, check=True)


# Mistakes.

GOOD = torch.zeros(4, 10)


@pytest.mark.parametrize(
    ("student", "teachers", "options", "message"),
    [
        (GOOD, [torch.zeros(4, 11)], {}, r"student_logits \[4, 10\] and teacher_logits\[0\] \[4, 11\] differ in shape"),
        (GOOD, [GOOD, torch.zeros(3, 10)], {}, r"teacher_logits\[1\] \[3, 10\] and teacher_logits\[0\] \[4, 10\]"),
        (GOOD, [GOOD.to("meta")], {}, r"student_logits on cpu and teacher_logits\[0\] on meta"),
        (GOOD, GOOD, {}, r"a sequence of \[B, C\] or one \[K, B, C\], got one tensor \[4, 10\]"),
        (GOOD, [], {}, "1 to 16 teachers, got 0"),
        (GOOD, [GOOD] * 17, {}, "1 to 16 teachers, got 17"),
        (GOOD[0], [GOOD], {}, r"student_logits must be \[B, C\] with C of 1 or more, got \[10\]"),
        (GOOD[:, :0], [GOOD[:, :0]], {}, r"C of 1 or more, got \[4, 0\]"),
        (GOOD.long(), [GOOD], {}, "student_logits must be floating point, got torch.int64"),
        (GOOD, [GOOD], {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (GOOD, [GOOD], {"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        (GOOD, [GOOD], {"reduction": "average"}, "reduction must be one of mean, sum, none, got 'average'"),
        (GOOD, [GOOD], {"weights": [1.0, 2.0]}, "one number for each of 1 teachers, got 2"),
        (GOOD, [GOOD, GOOD], {"weights": [1.0, -1.0]}, "non-negative with a positive, finite sum"),
        (GOOD, [GOOD], {"weights": torch.ones(1)}, "a sequence of numbers, not a tensor"),
    ],
)
def test_mistakes_are_named_in_one_line(student, teachers, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        ensemble_soft_cross_entropy(student, teachers, **options)
    assert "\n" not in str(raised.value)
