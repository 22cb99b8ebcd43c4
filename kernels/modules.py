"""The losses as modules, their options fixed when they are made."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .soft_ce import ensemble_soft_cross_entropy
from .sparse_soft_ce import sparse_soft_cross_entropy


class EnsembleSoftCrossEntropy(nn.Module):
    """forward(student_logits [B, C], K teacher_logits [B, C]): `ensemble_soft_cross_entropy`, with its options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, student_logits: Tensor, teacher_logits: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        return ensemble_soft_cross_entropy(student_logits, teacher_logits, **self.options)


class SparseSoftCrossEntropy(nn.Module):
    """forward(student_logits [B, C], ids, probabilities [B, k]): `sparse_soft_cross_entropy`, with its options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, student_logits: Tensor, ids: Tensor, probabilities: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return sparse_soft_cross_entropy(student_logits, ids, probabilities, **self.options)
