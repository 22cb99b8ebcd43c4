"""The loss that the student minimises, against the released code's formulas in float64; the learning rate."""

import pytest
import torch

from mealfast.method.cutmix import partner
from mealfast.method.discriminator import Discriminator
from mealfast.method.inputs import Inputs
from mealfast.method.objective import TERMS, Objective, hard_cross_entropy
from mealfast.method.targets import Target

from .. import released_code

B, C = 6, 11


@pytest.fixture
def logits():
    """Student and three teachers, float64 [B, C], as a trained model spreads them; labels [B]."""
    generator = torch.Generator().manual_seed(4)
    made = [5 * torch.randn(B, C, generator=generator, dtype=torch.float64) for _ in range(4)]
    return made[0].requires_grad_(), made[1:], torch.randint(0, C, (B,), generator=generator)


def part(labels, partner_labels=None, kept=1.0):
    return Inputs(torch.empty(len(labels), 0), labels, partner_labels, kept=kept)


def backward(loss, at):
    at.grad = None
    loss.backward()
    return at.grad.clone()


def close(ours, theirs, dtype):
    """Within 8 rounding errors of the largest number."""
    bound = 8 * torch.finfo(dtype).eps * float(theirs.detach().abs().max())
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_soft_targets_alone(logits, dtype, count):
    student, teachers, labels = logits
    given = student.detach().to(dtype).requires_grad_()
    teachers = [teacher.to(dtype) for teacher in teachers[:count]]
    loss, terms = Objective()(given, Target(teachers), part(labels))
    exact = given.detach().double().requires_grad_()
    expected = released_code.soft_cross_entropy(exact, [teacher.double() for teacher in teachers])
    close(loss, expected, dtype)
    close(backward(loss, given), backward(expected, exact), dtype)
    values = dict(zip(TERMS, terms.tolist(), strict=True))
    divergence = released_code.kl(exact, [teacher.double() for teacher in teachers])
    assert values["soft_ce"] == values["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    assert values["kl"] == pytest.approx(float(divergence.detach()), rel=1e-5)
    assert values["hard_ce"] == values["discriminator_loss"] == 0
    assert not terms.requires_grad


@pytest.mark.parametrize("weight", [0.25, 1.0])
@pytest.mark.parametrize("kept", [None, 0.7])
def test_hard_labels_beside_the_soft(logits, weight, kept):
    """w times the cross-entropy with the labels; under CutMix with both images' labels by their areas."""
    student, teachers, labels = logits
    student = student.detach().float().requires_grad_()
    teachers = [teacher.float() for teacher in teachers] if weight < 1 else []
    given = part(labels) if kept is None else part(labels, partner(labels), kept)
    loss, terms = Objective(weight)(student, Target(teachers), given)

    exact = student.detach().double().requires_grad_()
    log_q = torch.log_softmax(exact, dim=1)
    rows = torch.arange(B)
    hard = -log_q[rows, labels].mean()
    if kept is not None:
        others = torch.cat((labels[-1:], labels[:-1]))
        hard = -(kept * log_q[rows, labels] + (1 - kept) * log_q[rows, others]).mean()
    soft = released_code.soft_cross_entropy(exact, [t.double() for t in teachers]) if teachers else 0
    expected = (1 - weight) * soft + weight * hard
    close(loss, expected, torch.float32)
    close(backward(loss, student), backward(expected, exact), torch.float32)
    values = dict(zip(TERMS, terms.tolist(), strict=True))
    assert values["hard_ce"] == pytest.approx(float(hard.detach()), rel=1e-6)
    assert values["soft_ce"] == pytest.approx(float(torch.as_tensor(soft).detach()), rel=1e-6)


def test_the_area_weighs_the_labels_and_nothing_else(logits):
    student, _, labels = logits
    student = student.detach()
    own = hard_cross_entropy(student, 1.0, labels, partner(labels))
    assert float(own) == float(hard_cross_entropy(student, 1.0, labels))
    assert float(hard_cross_entropy(student, 0.0, labels, partner(labels))) == float(
        hard_cross_entropy(student, 1.0, partner(labels))
    )


def test_the_discriminator_is_added_with_weight_one(logits):
    student, teachers, labels = logits
    student = student.detach().float().requires_grad_()
    teachers = [teacher.float() for teacher in teachers]
    torch.manual_seed(0)
    discriminator = Discriminator(C, "cooperative")
    loss, terms = Objective(0.0, discriminator)(student, Target(teachers), part(labels))
    layers = [
        (layer.weight.double(), layer.bias.double())
        for layer in discriminator.layers
        if isinstance(layer, torch.nn.Linear)
    ]
    exact = student.detach().double().requires_grad_()
    doubles = [teacher.double() for teacher in teachers]
    added = released_code.discriminator_loss(exact, doubles, layers)
    expected = released_code.soft_cross_entropy(exact, doubles) + added
    close(loss, expected, torch.float32)
    close(backward(loss, student), backward(expected, exact), torch.float32)
    assert dict(zip(TERMS, terms.tolist(), strict=True))["discriminator_loss"] == pytest.approx(
        float(added.detach()), rel=1e-5
    )


def test_half_precision_logits_are_computed_in_float32(logits):
    """Autocast gives bfloat16 logits; the loss must be that of the rounded logits, not one rounded once more."""
    student, teachers, labels = logits
    rounded = student.detach().bfloat16().requires_grad_()
    teachers = [teacher.bfloat16() for teacher in teachers]
    loss, _ = Objective(0.5)(rounded, Target(teachers), part(labels))
    exact = rounded.detach().double()
    soft = released_code.soft_cross_entropy(exact, [teacher.double() for teacher in teachers])
    hard = torch.nn.functional.cross_entropy(exact, labels)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(0.5 * float(soft) + 0.5 * float(hard), rel=1e-6)
