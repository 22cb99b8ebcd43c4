"""What a model computes in: float32 throughout, or autocast to a shorter dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from mealfast.errors import UsageError


def precision(option: str, device: torch.device) -> torch.dtype:
    """`--amp` as the dtype of most arithmetic on that device; float32: no autocast. Raises UsageError."""
    if option == "off":
        return torch.float32
    if option == "fp16":
        if device.type == "cpu":
            raise UsageError("--amp fp16 needs a GPU: on the CPU use --amp bf16 or --amp off")
        return torch.float16
    if option == "bf16":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UsageError("--amp bf16: this GPU has no bfloat16 arithmetic; use --amp fp16 or --amp off")
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if has_amx() or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else torch.float32


def has_amx() -> bool:
    """Whether the CPU has tiles, with which bf16 is 4 times as fast as float32, whatever the network."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def name_of(dtype: torch.dtype) -> str:
    """ "float32", "bfloat16" or "float16"."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Autocast to `dtype` on the device; nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)
