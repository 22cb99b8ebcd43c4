"""Whether an exported model says what the model says: their logits beside each other, on batches of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mealfast.errors import UsageError
from mealfast.machine.files import reason
from mealfast.models.normalised import NormalizedModel

BATCHES = (1, 2, 5)  # images: one, the one it was exported with, another
# Of the largest logit. Another library's order of additions costs some 1e-6 of it; another epsilon, mean or size far
# more than this.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """The largest |difference| of two models' logits, and the largest |logit|."""

    difference: float
    largest: float

    def __str__(self) -> str:
        sizes = ", ".join(map(str, BATCHES[:-1]))
        return (
            f"largest difference from PyTorch's logits {self.difference:.2g}, the largest logit being "
            f"{self.largest:.3g} (batches of {sizes} and {BATCHES[-1]} images)"
        )


def sample(model: NormalizedModel, size: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` images of smooth noise: uint8 [count, size, size, 3], and normalised float32 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed + count)
    coarse = torch.rand(count, 3, max(size // 8, 2), max(size // 8, 2), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images = (255 * smooth).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    normalised = images.permute(0, 3, 1, 2).float() * model.scale + model.shift
    return images, normalised.contiguous()


@torch.inference_mode()
def compare(
    model: NormalizedModel,
    size: int,
    exported: Callable[[torch.Tensor], torch.Tensor],
    *,
    with_preprocessing: bool,
    what: str,
) -> Agreement:
    """Runs both models on `BATCHES` images. `exported` takes uint8 [B, size, size, 3] where `with_preprocessing`, else
    normalised float32 [B, 3, size, size], and returns logits [B, C].

    Raises UsageError where it fails on one of the batches, or its logits differ by more than `TOLERANCE`.
    """
    difference = largest = 0.0
    for count in BATCHES:
        images, normalised = sample(model, size, count)
        wanted = model.model(normalised)
        try:
            found = exported(images if with_preprocessing else normalised)
        except Exception as error:
            raise UsageError(f"{what}: does not run on a batch of {count}: {reason(error)}") from error
        if found.shape != wanted.shape:
            raise UsageError(f"{what}: gives {list(found.shape)} for a batch of {count}, not {list(wanted.shape)}")
        difference = max(difference, (found - wanted).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
    if not difference <= TOLERANCE * largest:
        raise UsageError(
            f"{what}: its logits differ from PyTorch's by {difference:.2g}, the largest being {largest:.3g}: "
            "nothing is written"
        )
    return Agreement(difference, largest)
