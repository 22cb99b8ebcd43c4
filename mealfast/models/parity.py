"""The start-up check: the ensemble as it runs (folded, cast, compiled) against eager float32, on one real batch.

Shape legend: B images of this process, K teachers, C classes, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mealfast.errors import UsageError
from mealfast.machine.precision import name_of
from mealfast.machine.processes import Runtime
from mealfast.machine.waiting import waiting
from mealfast.models.normalised import NormalizedModel

LARGEST_MEAN = 1e-2  # mean |difference| of probabilities, over images and classes
LEAST_AGREEMENT = 0.98  # share of images with the same class first
# A class counts as first, too, where its float32 probability is within this of the largest: of two that tie, rounding
# picks either. bfloat16 moves single probabilities of an EfficientNet by up to 0.08.
TIE = 0.05
_AT_ONCE = 64  # images, in float32: as many as will run at once in half the bytes might not fit


@dataclass(frozen=True)
class Parity:
    """How far one teacher's probabilities are from eager float32's."""

    spec: str
    images: int
    mean_difference: float  # over images and classes
    agreement: float  # share of images with the same class first
    agreement_or_tie: float  # the same, ties counted in
    finite: bool
    finite_in_float32: bool

    def holds(self, share: float = 1.0) -> bool:
        """Whether its targets are eager float32's but for rounding, within `share` of what rounding may do."""
        close = self.mean_difference <= share * LARGEST_MEAN
        agrees = 1 - self.agreement_or_tie <= share * (1 - LEAST_AGREEMENT)
        return self.finite and self.finite_in_float32 and close and agrees

    def to_json(self) -> dict[str, object]:
        """For config.json."""
        return {
            "images": self.images, "mean_difference": self.mean_difference, "agreement": self.agreement,
            "agreement_or_tie": self.agreement_or_tie,
        }  # fmt: skip

    def __str__(self) -> str:
        percent = math.floor(1000 * self.agreement_or_tie + 1e-6) / 10  # never more than the rule sees
        return (
            f"{percent:.1f}% of {self.images} images agree with eager float32 but for ties, mean |difference| of "
            f"probabilities {self.mean_difference:.1e}"
        )


def wanted(share: float = 1.0) -> str:
    """What `Parity.holds` asks for, in the words of its numbers."""
    return f"{100 * (1 - share * (1 - LEAST_AGREEMENT)):.1f}% but for ties, at most {share * LARGEST_MEAN:.1e}"


@torch.no_grad()
def reference_logits(
    teachers: Sequence[NormalizedModel], images: torch.Tensor, runtime: Runtime, names: Sequence[str]
) -> list[torch.Tensor]:
    """K logits [B, C] in float32, eager, unfolded, no TF32, of uint8 images [B, H, W, 3]; `names` are for the user."""
    found = []
    with _plainly():
        for name, teacher in zip(names, teachers, strict=True):
            with waiting(f"computing in float32, to compare with, {name}"):
                model = teacher.to(runtime.device).eval()
                found.append(torch.cat([model(part) for part in images.split(_AT_ONCE)]))
    return found


def compare(
    specs: Sequence[str], logits: Sequence[torch.Tensor], references: Sequence[torch.Tensor], runtime: Runtime
) -> list[Parity]:
    """One Parity a teacher, over the images of all processes, from K logits [B, C] and their float32 references."""
    found = []
    for spec, ours, reference in zip(specs, logits, references, strict=True):
        p, q = reference.float().softmax(1), ours.float().softmax(1)
        chosen = p.gather(1, q.argmax(1, keepdim=True))
        sums = torch.stack(
            [
                (p - q).abs().double().mean(1).sum(),
                (p.argmax(1) == q.argmax(1)).double().sum(),
                (chosen[:, 0] >= p.amax(1) - TIE).double().sum(),
                torch.tensor(float(len(p)), dtype=torch.float64, device=p.device),
                (~torch.isfinite(ours)).double().sum(),
                (~torch.isfinite(reference)).double().sum(),
            ]
        )
        difference, same, tied, images, bad, bad_reference = runtime.sum(sums).tolist()
        shares = difference / images, same / images, tied / images
        found.append(Parity(spec, int(images), *shares, bad == 0, bad_reference == 0))
    return found


def check(found: Sequence[Parity], dtype: torch.dtype) -> None:
    """Refuses teachers whose targets would be wrong; `dtype` is what `--amp` asked for. Raises UsageError."""
    for parity in found:
        if not parity.finite_in_float32:
            raise UsageError(
                f"--teachers {parity.spec}: gives non-finite logits on training images: its weights are damaged"
            )
        if not parity.finite:
            raise UsageError(
                f"--teachers {parity.spec}: gives non-finite logits in {name_of(dtype)}: use --amp "
                f"{'bf16' if dtype == torch.float16 else 'off'}"
            )
        if not parity.holds():
            raise UsageError(
                f"--teachers {parity.spec}: as it runs here, {parity} "
                f"(wanted: {wanted()}): use --amp off, or --no-compile"
            )


@contextmanager
def _plainly() -> Iterator[None]:
    """No TF32, and no search for the fastest convolutions: it takes longer than the one pass that they are for."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
