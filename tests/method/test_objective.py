"""The loss that the student minimises, against the released code's formulas in float64; the learning rate."""

import pytest
import torch

from mealfast.method.cutmix import partner
from mealfast.method.discriminator import Discriminator
from mealfast.method.objective import TERMS, Objective, hard_cross_entropy
from mealfast.recipe import make_recipe
from mealfast.training.lr_schedule import lr_factor

from .. import released_code

B, C = 6, 11


@pytest.fixture
def logits():
    """Student and three teachers, float64 [B, C], as a trained model spreads them; labels [B]."""
    generator = torch.Generator().manual_seed(4)
    made = [5 * torch.randn(B, C, generator=generator, dtype=torch.float64) for _ in range(4)]
    return made[0].requires_grad_(), made[1:], torch.randint(0, C, (B,), generator=generator)


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
    loss, terms = Objective()(given, teachers, 1.0, labels)
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
    labels_given = (labels,) if kept is None else (labels, partner(labels))
    loss, terms = Objective(weight)(student, teachers, kept or 1.0, *labels_given)

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
    loss, terms = Objective(0.0, discriminator)(student, teachers, 1.0, labels)
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
    loss, _ = Objective(0.5)(rounded, teachers, 1.0, labels)
    exact = rounded.detach().double()
    soft = released_code.soft_cross_entropy(exact, [teacher.double() for teacher in teachers])
    hard = torch.nn.functional.cross_entropy(exact, labels)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(0.5 * float(soft) + 0.5 * float(hard), rel=1e-6)


def test_the_papers_learning_rate():
    recipe = make_recipe("resnet50-224")
    rates = [recipe.lr * lr_factor(epoch, recipe.lr_decay_epochs, recipe.lr_decay) for epoch in range(recipe.epochs)]
    assert rates == [0.01] * 100 + [pytest.approx(0.001, rel=1e-12)] * 80


def test_a_learning_rate_of_several_steps():
    assert [lr_factor(epoch, (2, 4), 0.5) for epoch in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert lr_factor(7, (), 0.1) == 1
