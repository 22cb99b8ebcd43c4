"""Distillation losses for ensembles of teachers: fused Triton kernels on a GPU, plain PyTorch elsewhere."""

from . import reference
from .soft_ce import ensemble_soft_cross_entropy, ensemble_target

__all__ = ["ensemble_soft_cross_entropy", "ensemble_target", "reference"]
