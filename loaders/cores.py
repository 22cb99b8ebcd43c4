"""How many cores there are to work with."""

from __future__ import annotations

import os


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_share() -> int:
    """This process's share of them, one at least: torchrun starts LOCAL_WORLD_SIZE processes a machine."""
    return max(1, core_count() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))
