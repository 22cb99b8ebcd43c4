"""Which tensors go through Triton."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

TRITON = importlib.util.find_spec("triton") is not None
# Triton reads this when a kernel is decorated, which is when this package is imported.
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(*tensors: Tensor) -> bool:
    """CUDA tensors do, where Triton is installed; all do under TRITON_INTERPRET=1; float64 never does."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return INTERPRETED or (TRITON and tensors[0].is_cuda)


def unit_stride(logits: Tensor) -> Tensor:
    """[B, C] with consecutive classes, whatever the stride of B: a view where it is so already."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
