"""The float64 oracle of the kernels' tests, how far a result may be from it, and the worst that a session has met.

Shape legend: B batch, K teachers, C classes. EPS is float32's: the kernels accumulate in it.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mealfast.kernels.dispatch import INTERPRETED, uses_triton

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCE = {"mean": torch.mean, "sum": torch.sum, "none": torch.clone}
ERRORS = "KERNEL_ERRORS"  # names a file that gets the table of errors too, one JSON line a figure


def logits(*shape: int, dtype=torch.float32, device="cpu", scale=3.0, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def softmax(x: Tensor, temperature=1.0) -> Tensor:
    """In float64."""
    return (x.double() / temperature).softmax(-1)


def softmax_mean(teachers, weights=None, temperature=1.0) -> Tensor:
    """Eq. 1 in float64."""
    weights = weights or [1 / len(teachers)] * len(teachers)
    return torch.stack([softmax(t, temperature) * w for t, w in zip(teachers, weights, strict=True)]).sum(0)


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


def probability_bound(p: Tensor) -> Tensor:
    """8 eps p (1 + ln(1/p)): the logarithm is the rounding of a logit's distance from its row's largest."""
    return 8 * EPS * (p + torch.special.entr(p))


@dataclass
class Oracle:
    """Samples of loss and KL, gradient of sum_b upstream_b loss_b, and the bounds around them, in float64."""

    loss: Tensor  # [B]
    kl: Tensor  # [B]
    gradient: Tensor  # [B, C]
    larger: Tensor  # [B, C]: of the two probabilities that a gradient is the difference of
    factor: Tensor  # [B, 1]: what a sample's loss is multiplied by, over T

    @classmethod
    def of(cls, student: Tensor, target: Tensor, temperature=1.0, upstream=1.0) -> Oracle:
        s = student.detach().double() / temperature
        log_q = s.log_softmax(-1)
        loss = -torch.where(target == 0, 0, target * log_q).sum(-1)
        q = log_q.exp() * target.sum(-1, keepdim=True)
        factor = torch.as_tensor(upstream, dtype=torch.float64, device=s.device).expand(len(s))[:, None] / temperature
        return cls(
            loss=loss,
            kl=loss - torch.special.entr(target).sum(-1),
            gradient=(q - target) * factor,
            larger=torch.maximum(q, target),
            factor=factor.abs(),
        )

    def loss_bound(self) -> Tensor:
        return 8 * EPS * (1 + self.loss.abs())

    def kl_bound(self) -> Tensor:
        """Of the loss, not the KL: it is the difference of two numbers as large."""
        return 12 * EPS * (1 + self.loss.abs())

    def gradient_bound(self, dtype: torch.dtype) -> Tensor:
        """Its own rounding to `dtype`, that of the larger probability, and what is flushed to 0."""
        own = torch.finfo(dtype).eps * self.gradient.abs()
        return own + self.factor * probability_bound(self.larger) + (3e-8 if dtype == torch.float16 else 1e-37)


worst: dict[tuple[str, str, str], float] = defaultdict(float)


def over(got: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest error, as a multiple of its bound; a bound of 0 asks for equality. NaN where a result is NaN."""
    error = (got.double() - expected).abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    return ratio.max().item() if ratio.numel() else 0.0


def check(what: str, dtype: torch.dtype, got: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Every element within its bound. Remembers the largest error over the bound."""
    largest = over(got, expected, bound)
    path = "Triton, interpreted" if INTERPRETED else "Triton" if uses_triton(got) else "plain PyTorch"
    key = path, what, str(dtype).removeprefix("torch.")
    worst[key] = max(worst[key], largest)
    assert largest <= 1.0, f"{what}, {dtype}: error is {largest:.3g} of the bound"


def check_all(op: str, student: Tensor, loss: Tensor, kl: Tensor, oracle: Oracle, reduction: str) -> None:
    """The loss and the KL that came back for a reduction, and the gradient that is in `student.grad`."""
    reduce = REDUCE[reduction]
    check(f"{op} loss", student.dtype, loss.detach(), reduce(oracle.loss), reduce(oracle.loss_bound()))
    check(f"{op} kl", student.dtype, kl, reduce(oracle.kl), reduce(oracle.kl_bound()))
    check(f"{op} gradient", student.dtype, student.grad, oracle.gradient, oracle.gradient_bound(student.dtype))


def report_worst() -> None:
    """Prints the largest errors so far, and forgets them; appends them to the file that KERNEL_ERRORS names."""
    print("\nlargest error over its bound:")
    for (path, what, dtype), ratio in sorted(worst.items()):
        print(f"  {path:<20} {what:<18} {dtype:<9} {ratio:.3f}")
    if ERRORS in os.environ:
        with open(os.environ[ERRORS], "a", encoding="utf-8") as file:
            for (path, what, dtype), ratio in sorted(worst.items()):
                row = {"name": "kernel errors", "path": path, "what": what, "dtype": dtype, "error over bound": ratio}
                file.write(json.dumps(row) + "\n")
    worst.clear()


def skip_without(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
