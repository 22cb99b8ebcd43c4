"""The losses as modules, their options fixed when they are made."""

from functools import partial

from torch import nn

from .soft_ce import ensemble_soft_cross_entropy
from .sparse_soft_ce import sparse_soft_cross_entropy


class EnsembleSoftCrossEntropy(nn.Module):
    """forward(student_logits, teacher_logits): `ensemble_soft_cross_entropy`, with its options."""

    def __init__(self, **options):
        super().__init__()
        self.loss = partial(ensemble_soft_cross_entropy, **options)

    def forward(self, student_logits, teacher_logits):
        return self.loss(student_logits, teacher_logits)


class SparseSoftCrossEntropy(nn.Module):
    """forward(student_logits, ids, probabilities): `sparse_soft_cross_entropy`, with its options."""

    def __init__(self, **options):
        super().__init__()
        self.loss = partial(sparse_soft_cross_entropy, **options)

    def forward(self, student_logits, ids, probabilities):
        return self.loss(student_logits, ids, probabilities)
