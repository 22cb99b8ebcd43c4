"""Losses against targets from a label cache, alone and mixed by CutMix.

Shape legend: B images of this process, C classes, k entries kept of each target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mealfast.kernels import reference, sparse_soft_cross_entropy

# The smallest positive float16: what a target holds less of is taken as this, so that its logarithm is finite.
_SMALLEST = 2.0**-24

Sparse = tuple[torch.Tensor, torch.Tensor]  # ids and probabilities [B, k]


def soft_cross_entropy(
    student_logits: torch.Tensor, kept: float | torch.Tensor, cached: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean soft cross-entropy and KL (float32 scalars; no gradient through the KL) of logits [B, C].

    `cached` is ids [B, k] and probabilities [B, k]; under CutMix also those of the pasted images, and `kept` is the
    share of the area that is each image's own. Cross-entropy is linear in the target: the mixed one's is the mixture.
    """
    own, others = _pairs(cached)
    loss, kl = sparse_soft_cross_entropy(student_logits, *own, return_kl=True)
    if others is None:
        return loss, kl
    mixed = kept * loss + (1 - kept) * _cross_entropy(student_logits, others)
    entropy = reference.entropy(dense_target(student_logits.shape[1], kept, cached)).mean()
    return mixed, mixed.detach() - entropy


def _cross_entropy(student_logits: torch.Tensor, target: Sparse) -> torch.Tensor:
    loss = sparse_soft_cross_entropy(student_logits, *target)
    assert isinstance(loss, torch.Tensor)  # no KL was asked for
    return loss


def _pairs(cached: Sequence[torch.Tensor]) -> tuple[Sparse, Sparse | None]:
    """Each image's own target, and under CutMix the pasted one's."""
    return (cached[0], cached[1]), (cached[2], cached[3]) if len(cached) == 4 else None


def dense_target(classes: int, kept: float | torch.Tensor, cached: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [B, C]: the cached target with the rest spread evenly; under CutMix the mixture of both images'."""
    own, others = _pairs(cached)
    target = reference.densified(own[0], own[1], classes, "spread")
    if others is None:
        return target
    return kept * target + (1 - kept) * reference.densified(others[0], others[1], classes, "spread")


def log_target(classes: int, kept: float | torch.Tensor, cached: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [B, C], log-probabilities: what the discriminator sees in place of the teachers' mean logits."""
    return dense_target(classes, kept, cached).clamp(min=_SMALLEST).log()
