"""Checks on what callers pass. Each error is one line that names both sides; nothing here reads a device's memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_TEACHERS = 16
MAX_K = 4096
REDUCTIONS = ("mean", "sum", "none")
REMAINDERS = ("spread", "renormalise")
ID_DTYPES = (torch.uint16, torch.int32, torch.int64)


def check_logits(name: str, logits: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"{name} must be [B, C] with C of 1 or more, got {list(logits.shape)}")
    if not logits.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {logits.dtype}")


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name} {list(tensor.shape)} and {other_name} {list(other.shape)} differ in shape")
    if tensor.device != other.device:
        raise ValueError(f"{name} on {tensor.device} and {other_name} on {other.device} are on different devices")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_temperature(temperature: float) -> float:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return float(temperature)


def as_teachers(teacher_logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """K tensors [B, C], or one [K, B, C], as a list of K views of equal shape on one device."""
    if isinstance(teacher_logits, Tensor):
        if teacher_logits.ndim != 3:
            shape = list(teacher_logits.shape)
            raise ValueError(f"teacher_logits must be a sequence of [B, C] or one [K, B, C], got one tensor {shape}")
        teacher_logits = teacher_logits.unbind(0)
    teachers = list(teacher_logits)
    if not 1 <= len(teachers) <= MAX_TEACHERS:
        raise ValueError(f"teacher_logits must hold 1 to {MAX_TEACHERS} teachers, got {len(teachers)}")
    for k, teacher in enumerate(teachers):
        check_logits(f"teacher_logits[{k}]", teacher)
        check_same(f"teacher_logits[{k}]", teacher, "teacher_logits[0]", teachers[0])
    return teachers


def as_weights(weights: Sequence[float] | None, teachers: int) -> list[float]:
    """K non-negative numbers scaled to sum to one; equal where None. Not a tensor: reading one would stop the host."""
    if weights is None:
        return [1.0 / teachers] * teachers
    if isinstance(weights, torch.Tensor):
        raise ValueError("weights must be a sequence of numbers, not a tensor")
    if len(weights) != teachers:
        raise ValueError(f"weights must hold one number for each of {teachers} teachers, got {len(weights)}")
    total = math.fsum(weights)
    if not (all(w >= 0.0 for w in weights) and 0.0 < total < math.inf):
        raise ValueError(f"weights must be non-negative with a positive, finite sum, got {list(weights)}")
    return [float(w) / total for w in weights]


def check_k(k: int, classes: int) -> None:
    if not 1 <= k <= min(classes, MAX_K):
        raise ValueError(f"k must be from 1 to {min(classes, MAX_K)} for {classes} classes, got {k}")


def check_sparse(student: Tensor, ids: Tensor, probabilities: Tensor, remainder: str) -> None:
    if ids.ndim != 2 or ids.dtype not in ID_DTYPES:
        raise ValueError(f"ids must be uint16, int32 or int64 [B, k], got {ids.dtype} {list(ids.shape)}")
    if not probabilities.dtype.is_floating_point:
        raise ValueError(f"probabilities must be floating point, got {probabilities.dtype}")
    check_same("probabilities", probabilities, "ids", ids)
    if ids.shape[0] != student.shape[0]:
        raise ValueError(f"ids {list(ids.shape)} and student_logits {list(student.shape)} differ in batch size")
    if ids.device != student.device:
        raise ValueError(f"ids on {ids.device} and student_logits on {student.device} are on different devices")
    check_k(ids.shape[1], student.shape[1])
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder must be one of {', '.join(REMAINDERS)}, got {remainder!r}")
