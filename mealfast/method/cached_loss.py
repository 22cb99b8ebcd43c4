"""Losses against targets from a label cache, alone and mixed by CutMix.

Shape legend: B images of this process, C classes, k entries kept of each target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mealfast.kernels import reference, sparse_soft_cross_entropy

# The smallest positive float16: what a target holds less of is taken as this, so that its logarithm is finite.
_SMALLEST = 2.0**-24


def soft_cross_entropy(
    student_logits: torch.Tensor, kept: float | torch.Tensor, cached: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean soft cross-entropy and KL (float32 scalars; no gradient through the KL) of logits [B, C].

    `cached` is ids [B, k] and probabilities [B, k]; under CutMix also those of the pasted images, and `kept` is the
    share of the area that is each image's own. Cross-entropy is linear in the target: the mixed one's is the mixture.
    """
    loss, kl = sparse_soft_cross_entropy(student_logits, *cached[:2], return_kl=True)
    if len(cached) == 2:
        return loss, kl
    loss = kept * loss + (1 - kept) * sparse_soft_cross_entropy(student_logits, *cached[2:])
    entropy = reference.entropy(dense_target(student_logits.shape[1], kept, cached)).mean()
    return loss, loss.detach() - entropy


def dense_target(classes: int, kept: float | torch.Tensor, cached: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [B, C]: the cached target with the rest spread evenly; under CutMix the mixture of both images'."""
    own = reference.densified(*cached[:2], classes, "spread")
    if len(cached) == 2:
        return own
    return kept * own + (1 - kept) * reference.densified(*cached[2:], classes, "spread")


def log_target(classes: int, kept: float | torch.Tensor, cached: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [B, C], log-probabilities: what the discriminator sees in place of the teachers' mean logits."""
    return dense_target(classes, kept, cached).clamp(min=_SMALLEST).log()
