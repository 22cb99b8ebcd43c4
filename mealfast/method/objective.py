"""What the student minimises: soft cross-entropy to the ensemble's target (MEAL V2, Eq. 1 to 3), and what is added.

Shape legend: B images of this process, K teachers, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mealfast.kernels import ensemble_soft_cross_entropy
from mealfast.method import cached_loss
from mealfast.method.discriminator import mean_logits
from mealfast.method.inputs import Inputs
from mealfast.method.targets import Target

# The order of the terms in the tensor that `Objective` returns beside the loss.
TERMS = ("loss", "soft_ce", "kl", "hard_ce", "discriminator_loss")


class Objective(nn.Module):
    """(1 - w) * soft cross-entropy + w * hard cross-entropy + discriminator loss, as the released code adds them."""

    def __init__(self, hard_label_weight: float = 0.0, discriminator: nn.Module | None = None) -> None:
        super().__init__()
        self.hard_label_weight = hard_label_weight
        self.discriminator = discriminator

    def forward(self, student_logits: torch.Tensor, target: Target, part: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, C] of the student, what they are compared with, and the inputs that gave both.

        Returns the loss to minimise (scalar) and the float32 values of `TERMS` [5], detached, on the same device; a
        term that this run does not have is 0.
        """
        soft = kl = hard = adversary = student_logits.new_zeros((), dtype=torch.float32)
        if target.logits:
            soft, kl = ensemble_soft_cross_entropy(student_logits, target.logits, return_kl=True)
        elif target.top_k:
            soft, kl = cached_loss.soft_cross_entropy(student_logits, part.kept, target.top_k)
        if self.hard_label_weight > 0:
            hard = hard_cross_entropy(student_logits, part.kept, part.labels, part.partner_labels)
        loss = (1 - self.hard_label_weight) * soft + self.hard_label_weight * hard
        if self.discriminator is not None:
            adversary = self.discriminator(*_sides(student_logits, target, part.kept))
            loss = loss + adversary
        return loss, torch.stack([term.detach().float() for term in (loss, soft, kl, hard, adversary)])


def _sides(
    student_logits: torch.Tensor, target: Target, kept: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the discriminator tells apart, [B, C] each: logits, or log-probabilities where a cache comes in."""
    if not target.top_k:
        return student_logits, mean_logits(target.logits)
    log_student = student_logits.float().log_softmax(dim=1)
    log_target = cached_loss.log_target(student_logits.shape[1], kept, target.top_k)
    # Less their mean over the classes, as logits lie around 0: offsets of -10 would kill the discriminator's ReLUs.
    return log_student - log_student.mean(dim=1, keepdim=True), log_target - log_target.mean(dim=1, keepdim=True)


def hard_cross_entropy(
    student_logits: torch.Tensor,
    kept: float | torch.Tensor,
    labels: torch.Tensor,
    partner_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy with the labels [B]; under CutMix with both images' labels, weighted by area."""
    logits = student_logits.float()
    own = F.cross_entropy(logits, labels)
    if partner_labels is None:
        return own
    return kept * own + (1 - kept) * F.cross_entropy(logits, partner_labels)
