"""The float64 oracle of the kernels' tests, how far a result may be from it, and the worst that a session has met.

Shape legend: B batch, C classes. EPS is float32's: the kernels accumulate in it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mealfast.kernels.dispatch import INTERPRETED

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(*shape: int, dtype=torch.float32, device="cpu", scale=3.0, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def softmax_mean(teachers, weights=None, temperature=1.0) -> Tensor:
    """Eq. 1 in float64."""
    weights = weights or [1 / len(teachers)] * len(teachers)
    softmaxes = [softmax(t, temperature) * w for t, w in zip(teachers, weights, strict=True)]
    return torch.stack(softmaxes).sum(0)


def softmax(x: Tensor, temperature=1.0) -> Tensor:
    """In float64. torch.softmax on a CPU adds in a row, torch.sum in a cascade, which rounds less."""
    e = ((x.double() - x.double().amax(-1, keepdim=True)) / temperature).exp()
    return e / e.sum(-1, keepdim=True)


def agreeing(student: Tensor, noise: Tensor, weights: list[float], temperature=1.0, seed=0) -> list[Tensor]:
    """Teachers, float32, that differ from each other but whose target is the student's softmax but for noise [B]: where
    that is 0, each of them is the student."""
    generator = torch.Generator().manual_seed(seed)
    q, w = softmax(student.detach().cpu(), temperature), torch.tensor(weights, dtype=torch.float64)[:, None, None]
    shares = torch.rand(len(weights), *q.shape, generator=generator, dtype=torch.float64) * 0.8
    shares -= (w * shares).sum(0)
    shares -= (q * shares).sum(-1, keepdim=True)
    off = noise[:, None] * torch.randn(len(weights), *q.shape, generator=generator, dtype=torch.float64)
    teachers = ((q.log() + (1 + shares).log() + off) * temperature).float()
    teachers = torch.where(noise[:, None] == 0, student.detach().cpu().float(), teachers)
    return list(teachers.to(student.device))


@dataclass
class Oracle:
    """Samples of loss and KL, gradient of sum_b upstream_b loss_b, and the bounds around them, in float64.

    The student's largest class is left out of every sum that would be 1 and a little, or float64 too would lose the
    little: its gradient is minus the sum of the others'.
    """

    loss: Tensor  # [B]
    kl: Tensor  # [B]
    gradient: Tensor  # [B, C]
    operands: Tensor  # [B, 1]: the larger of the two probabilities that a gradient is the difference of
    sums: Tensor  # [B, 1]: the larger of the two sums over all classes but the student's largest

    @classmethod
    def of(cls, student: Tensor, target: Tensor, temperature=1.0, upstream=1.0) -> Oracle:
        s = student.detach().double() / temperature
        top = s.argmax(-1, keepdim=True)
        d = s - s.gather(-1, top)
        e = d.exp().scatter(-1, top, 0.0)
        others = e.sum(-1, keepdim=True)
        mass = target.sum(-1, keepdim=True)
        loss = (mass * others.log1p())[:, 0] - torch.where(target == 0, 0, target * d).sum(-1)
        q, p = mass * e / (1 + others), target.scatter(-1, top, 0.0)
        factor = torch.as_tensor(upstream, dtype=torch.float64, device=s.device).expand(len(s))[:, None] / temperature
        gradient = q - p
        without = torch.maximum(q.sum(-1, keepdim=True), p.sum(-1, keepdim=True))
        largest = torch.maximum(mass / (1 + others), target.gather(-1, top))
        operands = torch.maximum(torch.maximum(q, p).amax(-1, keepdim=True), torch.minimum(without, largest))
        return cls(
            loss=loss,
            kl=loss - torch.special.entr(target).sum(-1),
            gradient=gradient.scatter(-1, top, -gradient.sum(-1, keepdim=True)) * factor,
            operands=operands * factor.abs(),
            sums=without * factor.abs(),
        )

    def loss_bound(self) -> Tensor:
        """4 eps of the loss; what is next to float32's smallest number may be 0."""
        return 4 * EPS * self.loss + 1e-30

    def kl_bound(self) -> Tensor:
        """4 eps of the larger of loss and entropy: the KL is their difference, and may be next to nothing. And 4 eps
        of float64, for this oracle's own difference."""
        return 4 * EPS * torch.maximum(self.loss, self.loss - self.kl) + 4 * torch.finfo(torch.float64).eps

    def gradient_bound(self, dtype: torch.dtype) -> Tensor:
        """A row's: 2 eps of `dtype` x max|reference|, half the step between subnormals, which shows in float16 alone,
        and float64's own rounding, this oracle's, PyTorch's and the kernels': 16 eps x the larger operand, and 4 eps x
        the sum that the largest class's gradient comes from. It shows where student and target agree to about 1 in a
        million or are equal."""
        info = torch.finfo(dtype)
        bound = 2 * info.eps * self.gradient.abs().amax(-1, keepdim=True) + info.smallest_normal * info.eps / 2
        return bound + torch.finfo(torch.float64).eps * (16 * self.operands + 4 * self.sums)


worst: dict[tuple[str, str], float] = defaultdict(float)


def over(got: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest error, as a multiple of its bound; a bound of 0 asks for equality."""
    error = (got.double() - expected).abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    return ratio.max().item() if ratio.numel() else 0.0


def check(what: str, dtype: torch.dtype, got: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Every element within its bound. Remembers the largest error over the bound."""
    largest = over(got, expected, bound)
    key = what, str(dtype).removeprefix("torch.")
    worst[key] = max(worst[key], largest)
    assert largest <= 1.0, f"{what}, {dtype}: error is {largest:.3g} of the bound"


def check_all(op: str, student: Tensor, loss: Tensor, kl: Tensor, oracle: Oracle, reduction: str) -> None:
    """The loss and the KL that came back for a reduction, and the gradient that is in `student.grad`."""
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": torch.clone}[reduction]
    check(f"{op} loss", student.dtype, loss.detach(), reduce(oracle.loss), reduce(oracle.loss_bound()))
    check(f"{op} kl", student.dtype, kl, reduce(oracle.kl), reduce(oracle.kl_bound()))
    check(f"{op} gradient", student.dtype, student.grad, oracle.gradient, oracle.gradient_bound(student.dtype))


def print_worst() -> None:
    path = "Triton, interpreted" if INTERPRETED else "CUDA and CPU" if torch.cuda.is_available() else "plain PyTorch"
    print(f"\nlargest error over its bound ({path}):")
    for (what, dtype), ratio in sorted(worst.items()):
        print(f"  {what:<18} {dtype:<9} {ratio:.3f}")


def skip_without(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
