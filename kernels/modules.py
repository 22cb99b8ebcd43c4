"""The losses as modules: their options are those of the functions."""

from __future__ import annotations

from torch import Tensor, nn

from .soft_ce import ensemble_soft_cross_entropy
from .sparse_soft_ce import sparse_soft_cross_entropy


class EnsembleSoftCrossEntropy(nn.Module):
    """forward(student_logits, teacher_logits), see `ensemble_soft_cross_entropy`."""

    def __init__(self, *, weights=None, temperature=1.0, reduction="mean", return_kl=False):
        super().__init__()
        self.options = {
            "weights": weights,
            "temperature": temperature,
            "reduction": reduction,
            "return_kl": return_kl,
        }

    def forward(self, student_logits, teacher_logits) -> Tensor | tuple[Tensor, Tensor]:
        return ensemble_soft_cross_entropy(student_logits, teacher_logits, **self.options)


class SparseSoftCrossEntropy(nn.Module):
    """forward(student_logits, ids, probabilities), see `sparse_soft_cross_entropy`."""

    def __init__(self, *, remainder="spread", temperature=1.0, reduction="mean", return_kl=False):
        super().__init__()
        self.options = {
            "remainder": remainder,
            "temperature": temperature,
            "reduction": reduction,
            "return_kl": return_kl,
        }

    def forward(self, student_logits, ids, probabilities) -> Tensor | tuple[Tensor, Tensor]:
        return sparse_soft_cross_entropy(student_logits, ids, probabilities, **self.options)
