"""The discriminator against the released code's 1x1 convolutions, its two directions, and its death."""

import math

import pytest
import torch

from mealfast.method.discriminator import Discriminator, is_dead, mean_logits

from .. import released_code

B, C = 5, 1000


@pytest.fixture(scope="module")
def logits():
    generator = torch.Generator().manual_seed(8)
    return [3 * torch.randn(B, C, generator=generator) for _ in range(3)]


def run(mode: str, logits):
    """(loss, gradient at the student's logits, gradients of the discriminator's parameters)."""
    torch.manual_seed(1)
    discriminator = Discriminator(C, mode)
    student = logits[0].clone().requires_grad_()
    loss = discriminator(student, mean_logits(logits[1:]))
    loss.backward()
    return discriminator, loss.detach(), student.grad, [p.grad for p in discriminator.parameters()]


def test_the_released_widths():
    widths = [tuple(layer.weight.shape) for layer in Discriminator(C, "cooperative").layers[::2]]
    assert widths == [(125, 1000), (15, 125), (2, 15)]


def test_loss_and_gradients_are_the_released_codes(logits):
    discriminator, loss, at_student, at_weights = run("cooperative", logits)
    exact = [one.double() for one in logits]
    exact[0].requires_grad_()
    layers = [
        tuple(p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
        for layer in discriminator.layers[::2]
    ]
    expected = released_code.discriminator_loss(exact[0], exact[1:], layers)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(expected) != pytest.approx(math.log(2), abs=1e-3), "a dead discriminator would show nothing"
    theirs = [exact[0].grad] + [p.grad for layer in layers for p in layer]
    for ours, wanted in zip([at_student, *at_weights], theirs, strict=True):
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_adversarial_turns_the_students_gradient_and_only_that(logits):
    _, loss, at_student, at_weights = run("cooperative", logits)
    _, other_loss, other_student, other_weights = run("adversarial", logits)
    assert torch.equal(loss, other_loss)
    assert torch.equal(other_student, -at_student)
    assert at_student.abs().max() > 0
    for ours, theirs in zip(at_weights, other_weights, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("mode", "wins"), [("cooperative", True), ("adversarial", False)])
def test_who_is_helped(mode, wins):
    """Gradient steps of the student alone make a cooperative discriminator's loss fall, an adversarial one's rise."""
    torch.manual_seed(0)
    discriminator = Discriminator(20, mode)
    student, teacher = torch.randn(8, 20).requires_grad_(), torch.randn(8, 20)
    losses = []
    for _ in range(20):
        (gradient,) = torch.autograd.grad(loss := discriminator(student, teacher), student)
        losses.append(float(loss))
        student = (student - gradient * 5).detach().requires_grad_()
    assert (losses[-1] < losses[0] - 1e-3) if wins else (losses[-1] > losses[0] + 1e-3)


def test_mean_logits_is_the_mean_in_float32():
    logits = [torch.full((2, 3), value, dtype=torch.bfloat16) for value in (1.0, 2.0, 2.0)]
    mean = mean_logits(logits)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.full((2, 3), 5 / 3))
    assert all(torch.equal(one, torch.full_like(one, value)) for one, value in zip(logits, (1, 2, 2), strict=True))


def test_a_dead_discriminator_has_no_gradient_and_is_known():
    discriminator = Discriminator(20, "cooperative")
    with torch.no_grad():
        discriminator.layers[4].bias.fill_(-1e4)
    student = torch.randn(4, 20).requires_grad_()
    loss = discriminator(student, torch.randn(4, 20))
    loss.backward()
    assert float(loss) == pytest.approx(math.log(2), abs=1e-7)
    assert float(student.grad.abs().max()) == 0
    assert is_dead(float(loss))
    assert is_dead(math.log(2) + 0.9e-3)
    assert not is_dead(math.log(2) + 1.1e-3)
    assert not is_dead(math.log(2) - 1.1e-3)
    assert not is_dead(float("nan"))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="must be cooperative or adversarial"):
        Discriminator(10, "off")
