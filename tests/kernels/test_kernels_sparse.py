"""The sparse loss and the top-k writer against float64, on every path: see test_kernels.py."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mealfast.kernels import (
    SparseSoftCrossEntropy,
    ensemble_soft_cross_entropy,
    ensemble_topk,
    sparse_soft_cross_entropy,
)
from mealfast.kernels.dispatch import INTERPRETED, TRITON, uses_triton

from .kernels_bounds import (
    DTYPES,
    EPS,
    Oracle,
    check,
    check_all,
    logits,
    probability_bound,
    report_worst,
    skip_without,
    softmax,
    softmax_mean,
)

SIZES = {
    (1, 1): "one class, kept",
    (2, 1): "one kept, one spread over",
    (10, 10): "every class kept: nothing to spread over",
    (37, 36): "every class kept but one: the spread sum is a difference of nearly equal sums",
    (1000, 16): "ImageNet-1k, the usual k",
    (1000, 100): "more entries than a warp has lanes",
    (4097, 5): "the shortest row swept in chunks, k not a power of two",
    (21843, 16): "ImageNet-21k",
    (65536, 3): "ids up to 65,535 in uint16",
}
REMAINDERS = ["spread", "renormalise"]


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


def entries(batch, classes, k, device="cpu", ids=torch.int32, probabilities=torch.float32, seed=1):
    """Distinct classes in random order, with probabilities that sum to about 0.9."""
    chosen = logits(batch, classes, seed=seed).argsort(-1)[:, :k].contiguous()
    p = logits(batch, k, seed=seed + 1).softmax(-1) * 0.9
    return chosen.to(device, ids), p.to(device, probabilities)


def dense(ids, probabilities, classes, remainder):
    """The target [B, C] in float64, a row at a time."""
    rows = []
    for i, p in zip(ids.long().cpu(), probabilities.double().cpu(), strict=True):
        rest = 0.0
        if remainder == "renormalise":
            p = p / p.sum()
        elif len(i) < classes:
            rest = max(0.0, 1.0 - p.sum().item()) / (classes - len(i))
        row = torch.full((classes,), rest, dtype=torch.float64)
        row[i] = p
        rows.append(row)
    return torch.stack(rows).to(ids.device)


def run(student, ids, probabilities, upstream=None, **options):
    student.requires_grad_()
    student.grad = None
    loss, kl = sparse_soft_cross_entropy(student, ids, probabilities, return_kl=True, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss, kl


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(device, size, dtype, remainder):
    classes, k = size
    batch = 2
    kept = entries(batch, classes, k, device, ids=torch.uint16, probabilities=torch.float16)
    student = logits(batch, classes, dtype=dtype, device=device)
    loss, kl = run(student, *kept, remainder=remainder)
    oracle = Oracle.of(student, dense(*kept, classes, remainder), upstream=1 / batch)
    check_all("sparse", student, loss, kl, oracle, "mean")


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("classes", "k"), [(12, 4), (4100, 4)])
def test_upstream_gradients(device, classes, k, reduction, remainder):
    batch, temperature = 3, 2.5
    kept = entries(batch, classes, k, device, ids=torch.int64)
    student = logits(batch, classes, device=device)
    upstream = torch.tensor([-2.5, 1.0, 0.3] if reduction == "none" else -2.5, device=device)
    options = {"temperature": temperature, "reduction": reduction, "remainder": remainder}
    loss, kl = run(student, *kept, upstream, **options)
    upstream = upstream.double() / (batch if reduction == "mean" else 1)
    oracle = Oracle.of(student, dense(*kept, classes, remainder), temperature, upstream)
    check_all("sparse", student, loss, kl, oracle, reduction)


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "k"), [(2, 1), (10, 10), (37, 36), (1000, 16), (4100, 4)])
def test_student_and_target_that_agree(device, classes, k, dtype, remainder):
    """As in test_kernels.py. The student's other classes are as even as the target's."""
    noise = torch.tensor([0.1, 1e-2, 1e-3, 1e-5, 0.0, 0.0], dtype=torch.float64)
    ids, _ = entries(len(noise), classes, k)
    student = torch.full((len(noise), classes), -40.0 if remainder == "renormalise" else -5.0)
    kept = logits(len(noise), k)
    kept[4:, 0] += 12
    student = student.scatter(1, ids.long(), kept).to(dtype)
    off = 1 + noise[:, None] * logits(len(noise), k, scale=0.5, seed=3).double()
    p = softmax(student).gather(1, ids.long()) * off.abs()
    p = (p / p.sum(-1, keepdim=True).clamp(min=1.0)).float()
    student, ids, p = student.to(device), ids.to(device), p.to(device)
    loss, kl = run(student, ids, p, reduction="none", remainder=remainder)
    check_all("agreeing sparse", student, loss, kl, Oracle.of(student, dense(ids, p, classes, remainder)), "none")


def test_all_but_a_few_of_many_classes_kept(device):
    """The largest of a target, as always: the spread sum is a difference of nearly equal sums, and times little."""
    student, teacher = logits(4, 1000, device=device), logits(4, 1000, scale=1.0, device=device, seed=1)
    for k in (900, 999):
        p, ids = teacher.softmax(-1).topk(k)
        loss, kl = run(student, ids, p, reduction="none")
        check_all("spread", student, loss, kl, Oracle.of(student, dense(ids, p, 1000, "spread")), "none")


@pytest.mark.parametrize("missing", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_next_to_nothing_to_spread(device, dtype, missing):
    """1 - sum p is all that the other classes' gradients are made of: no float32 sum of p tells it."""
    classes, k = 1000, 16
    ids, _ = entries(4, classes, k)
    p = logits(4, k, dtype=torch.float64).softmax(-1) * (1 - missing)
    p = p.to(dtype)
    student = torch.full((4, classes), -math.log(classes / missing)).scatter(1, ids.long(), p.log().float())
    student, ids, p = student.to(device), ids.to(device), p.to(device)
    loss, kl = run(student, ids, p, reduction="none")
    check_all("spread", student, loss, kl, Oracle.of(student, dense(ids, p, classes, "spread")), "none")


def test_every_class_kept_is_the_dense_loss(device):
    student, teachers = logits(4, 20, device=device), [logits(4, 20, device=device, seed=k + 1) for k in range(2)]
    ids, probabilities = ensemble_topk(teachers, 20)
    for remainder in REMAINDERS:
        sparse = run(student, ids, probabilities, remainder=remainder)
        gradient = student.grad.clone()
        student.grad = None
        expected = ensemble_soft_cross_entropy(student, teachers, return_kl=True)
        expected[0].backward()
        torch.testing.assert_close(sparse, expected, rtol=8 * EPS, atol=8 * EPS)
        torch.testing.assert_close(gradient, student.grad, rtol=0, atol=2 * EPS)
        student.grad = None


@pytest.mark.parametrize("classes", [12, 4100])
def test_masked_classes(device, classes):
    """-inf in the student: nothing where the target is 0, +inf where it is not, kept or spread over."""
    student = logits(4, classes, device=device)
    ids = torch.tensor([[0, 1]] * 4, dtype=torch.int32, device=device)
    probabilities = torch.tensor([[0.5, 0.5], [0.5, 0.25], [0.5, 0.5], [1.0, 0.0]], device=device)
    student[0, 2] = -math.inf  # spread over, but nothing is left to spread
    student[1, 2] = -math.inf  # spread over
    student[2, 1] = -math.inf  # kept
    student[3, 1] = -math.inf  # kept with probability 0
    loss, kl = run(student, ids, probabilities, reduction="none")
    assert loss.isinf().tolist() == kl.isinf().tolist() == [False, True, True, False]
    assert student.grad.isfinite().all()
    finite = [0, 3]
    oracle = Oracle.of(student[finite], dense(ids, probabilities, classes, "spread")[finite])
    check("sparse loss", torch.float32, loss[finite].detach(), oracle.loss, oracle.loss_bound())


@pytest.mark.parametrize("classes", [12, 4100])
def test_an_id_out_of_range_spoils_its_sample_alone(triton_device, classes):
    student = logits(3, classes, device=triton_device)
    ids, probabilities = entries(3, classes, 2, triton_device)
    clean, _ = run(student, ids, probabilities, reduction="none")
    gradient = student.grad
    for wrong in (classes, -1, 2**31 - 1):
        ids[1, 0] = wrong
        loss, _ = run(student, ids, probabilities, reduction="none")
        assert loss.isnan().tolist() == student.grad.isnan().all(-1).tolist() == [False, True, False]
        assert torch.equal(loss[[0, 2]], clean[[0, 2]])
        assert torch.equal(student.grad[[0, 2]], gradient[[0, 2]])


def test_nan_and_empty(device):
    student, (ids, probabilities) = logits(3, 12, device=device), entries(3, 12, 2, device)
    student[1, 5] = math.nan
    loss, _ = run(student, ids, probabilities, reduction="none")
    assert loss.isnan().tolist() == student.grad.isnan().all(-1).tolist() == [False, True, False]
    for reduction, expected in (("mean", math.nan), ("sum", 0.0), ("none", [])):
        loss, _ = run(student[:0].detach(), ids[:0], probabilities[:0], reduction=reduction)
        torch.testing.assert_close(loss.detach(), torch.tensor(expected, device=device), equal_nan=True)


def test_the_reference_in_float64_passes_gradcheck():
    student = logits(3, 7).double().requires_grad_()
    kept = entries(3, 7, 3)
    for remainder in REMAINDERS:
        assert torch.autograd.gradcheck(
            lambda s, r=remainder: sparse_soft_cross_entropy(s, *kept, remainder=r, temperature=2.0), student
        )


def test_compiles_as_one_graph(device):
    student, kept = logits(4, 11, device=device), entries(4, 11, 3, device)
    criterion = SparseSoftCrossEntropy(remainder="renormalise", return_kl=True)
    results = []
    for function in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        leaf = student.clone().requires_grad_()
        loss, kl = function(leaf, *kept)
        (2 * loss).backward()
        results.append((loss.detach(), kl, leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    topk = torch.compile(lambda t: ensemble_topk([t, t], 3), fullgraph=True, backend="aot_eager")
    assert torch.equal(topk(student)[0], ensemble_topk([student], 3)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(triton_device, reduction):
    student, kept = logits(3, 5, device=triton_device), entries(3, 5, 2, triton_device)
    call = student, kept, "spread", 1.0, reduction
    samples, gradient = torch.zeros(2, 3, device=triton_device), torch.zeros_like(student)
    upstream = torch.full([3] if reduction == "none" else [], 2.0, device=triton_device)
    for outputs in ((samples, gradient, None), (samples[:1], None, None), (None, gradient, upstream)):
        torch.library.opcheck(torch.ops.mealfast.sparse_soft_ce, (*call, *outputs))


def test_opcheck_topk(triton_device):
    teacher, kept = logits(3, 5, device=triton_device), entries(3, 5, 2, triton_device)
    torch.library.opcheck(torch.ops.mealfast.ensemble_topk, ([teacher, teacher], [0.5, 0.5], 1.0, *kept))


# The top-k writer.


# The interpreter sorts slowly: the longest rows are left to the other paths, and two dtypes to the shorter rows.
TOPK_SIZES = [
    (size, dtype)
    for size, dtype in product(SIZES, DTYPES)
    if not INTERPRETED or size[0] <= 37 or (dtype == torch.bfloat16 and size[0] <= 4097 and size[1] <= 100)
]


@pytest.mark.parametrize(("size", "dtype"), TOPK_SIZES, ids=str)
def test_topk_sizes(device, size, dtype):
    classes, k = size
    teachers = [logits(1, classes, dtype=dtype, device=device, seed=i) for i in range(3)]
    check_topk(teachers, k, [3.0, 1.0, 2.0], 1.5)


@pytest.fixture
def short_chunks(monkeypatch):
    """Rows of 17 classes and more are swept in chunks of 16: the kernel's own, of 2048, take the interpreter long."""
    if TRITON:
        from mealfast.kernels import topk_targets_triton

        monkeypatch.setattr(topk_targets_triton, "blocks", lambda classes: (16, {"num_warps": 1}))


def test_topk_beyond_a_chunk(triton_device, short_chunks):
    """k = 20, more than a chunk's 16 classes, which have to grow."""
    teachers = [logits(2, 100, dtype=torch.bfloat16, device=triton_device, seed=i) for i in range(2)]
    check_topk(teachers, 20, [2.0, 1.0], 1.0)


DRAWN = {
    "batch": st.integers(0, 3),
    "classes_and_k": st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c))),
    "dtypes": st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    "scale": st.sampled_from([0.0, 1.0, 10.0]),
    "seed": st.integers(0, 2**32),
}


@settings(max_examples=10 if INTERPRETED else 50, deadline=None)
@given(**DRAWN)
def test_topk_drawn(**drawn):
    check_drawn_topk("cpu", **drawn)


@pytest.mark.gpu
@settings(max_examples=5, deadline=None)  # each is a shape to compile for
@given(**DRAWN)
def test_topk_drawn_on_a_gpu(**drawn):
    skip_without("cuda")
    check_drawn_topk("cuda", **drawn)


def check_drawn_topk(device, batch, classes_and_k, dtypes, scale, seed):
    classes, k = classes_and_k
    teachers = [
        logits(batch, classes, dtype=dtype, device=device, scale=scale, seed=seed + i) for i, dtype in enumerate(dtypes)
    ]
    check_topk(teachers, k, [1.0] * len(teachers), 1.0)


def check_topk(teachers, k, weights, temperature):
    ids, probabilities = ensemble_topk(teachers, k, weights=weights, temperature=temperature)
    assert (ids.dtype, probabilities.dtype) == (torch.int32, torch.float32)
    assert ids.shape == probabilities.shape == (len(teachers[0]), k)
    target = softmax_mean(teachers, [w / sum(weights) for w in weights], temperature)
    bound = probability_bound(target)  # the k largest, as far as float32 can tell
    named = ids.long()
    check("top-k", teachers[0].dtype, probabilities, target.gather(1, named), bound.gather(1, named))
    check(
        "top-k", teachers[0].dtype, probabilities, target.sort(-1, descending=True)[0][:, :k], bound.amax(-1)[:, None]
    )
    assert all(len(set(row)) == k for row in ids.tolist())
    assert (probabilities.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("classes", [12, 40], ids=["in registers", "in chunks"])
def test_topk_ties_and_nan(device, classes, short_chunks):
    teacher = torch.zeros(2, classes, device=device)
    teacher[0, [1, 7]] = 1.0
    teacher[1, 3] = math.nan
    ids, probabilities = ensemble_topk([teacher], 5)
    assert ids[0].tolist() == [1, 7, 0, 2, 3]
    assert probabilities.isnan().all(-1).tolist() == [False, True]
    assert ids[1].tolist() == [0, 1, 2, 3, 4]


# Mistakes.

STUDENT, IDS, P = torch.zeros(4, 10), torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((STUDENT, IDS[:3], P[:3]), {}, r"ids \[3, 3\] and student_logits \[4, 10\] differ in batch size"),
        ((STUDENT, IDS, P[:, :2]), {}, r"probabilities \[4, 2\] and ids \[4, 3\] differ in shape"),
        ((STUDENT, IDS.float(), P), {}, "ids must be uint16, int32 or int64"),
        ((STUDENT, IDS, IDS), {}, "probabilities must be floating point, got torch.int32"),
        ((STUDENT, IDS.to("meta"), P.to("meta")), {}, "ids on meta and student_logits on cpu"),
        ((STUDENT[:, :2], IDS, P), {}, "k must be from 1 to 2 for 2 classes, got 3"),
        ((STUDENT, IDS, P), {"remainder": "drop"}, "remainder must be one of spread, renormalise, got 'drop'"),
        ((STUDENT, IDS, P), {"reduction": "average"}, "reduction must be one of"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        sparse_soft_cross_entropy(*arguments, **options)
    assert "\n" not in str(raised.value)


def test_topk_mistakes():
    with pytest.raises(ValueError, match="k must be from 1 to 10 for 10 classes, got 11"):
        ensemble_topk([STUDENT], 11)
    if not INTERPRETED:
        with pytest.raises(RuntimeError, match="out of bounds"):
            sparse_soft_cross_entropy(STUDENT, IDS + 10, P)
