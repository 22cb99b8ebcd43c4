"""Distillation losses for ensembles of teachers: fused Triton kernels on a GPU, plain PyTorch elsewhere."""

from . import reference
from .modules import EnsembleSoftCrossEntropy, SparseSoftCrossEntropy
from .soft_ce import ensemble_soft_cross_entropy, ensemble_target
from .sparse_soft_ce import sparse_soft_cross_entropy
from .topk_targets import ensemble_topk

__all__ = [
    "EnsembleSoftCrossEntropy",
    "SparseSoftCrossEntropy",
    "ensemble_soft_cross_entropy",
    "ensemble_target",
    "ensemble_topk",
    "reference",
    "sparse_soft_cross_entropy",
]
