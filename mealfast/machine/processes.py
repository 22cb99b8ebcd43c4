"""Processes and device: what torchrun and the machine decide.

One process drives one device. Without torchrun there is one process.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mealfast.errors import UsageError

COLLECTIVE_TIMEOUT = 1800  # seconds
_SCAN_TIMEOUT = timedelta(days=1)  # an index of millions of files is made by one process while others wait
_groups = itertools.count()  # that this process has joined, as every other one
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_joined = False  # whether the process group is of `start`: one that a caller has made is its own to leave


Item = TypeVar("Item")


@dataclass(frozen=True)
class Runtime:
    """This process among its peers, and its device."""

    rank: int
    world_size: int
    device: torch.device
    timeout: timedelta = timedelta(seconds=COLLECTIVE_TIMEOUT)  # of waiting for other processes

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do, so that they find what it has cached."""
        if self.world_size == 1:
            yield
            return
        patient: Any = dist.new_group(backend="gloo", timeout=_SCAN_TIMEOUT)
        if not self.is_main:
            dist.barrier(patient)
        yield
        if self.is_main:
            dist.barrier(patient)
        dist.destroy_process_group(patient)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` added up over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item: Item) -> list[Item]:
        """Every process's `item`, in rank order, on every process (small picklable values only)."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items


def start(device: str = "auto", *, timeout: int = COLLECTIVE_TIMEOUT) -> Runtime:
    """Joins the process group that torchrun describes and picks the device. Raises UsageError.

    `timeout`: seconds after which waiting for another process fails.
    """
    global _joined
    _die_with_torchrun()
    patience = timedelta(seconds=timeout)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = _device(device, local_rank, local_world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        _prefer_speed()
    if world_size > 1 and not dist.is_initialized():
        found = {"timeout": patience} | _store_of_this_attempt(rank, world_size, patience)
        if chosen.type == "cuda":
            dist.init_process_group("nccl", device_id=chosen, **found)
        else:
            dist.init_process_group("gloo", **found)
        _joined = True
    return Runtime(rank, world_size, chosen, patience)


def _prefer_speed() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # static shapes: the search pays off


def stop() -> None:
    """Leaves the process group that `start` has joined, if it has."""
    global _joined
    if _joined and dist.is_initialized():
        dist.destroy_process_group()
    _joined = False


def _store_of_this_attempt(rank: int, world_size: int, timeout: timedelta) -> dict[str, Any]:
    """Where the processes find each other, as arguments of `init_process_group`; {} for its own way.

    A torchrun that shares its store with its workers hands the same one to those it starts again after a failure
    (torch 2.15), and they would connect to the addresses of the dead: each attempt gets its own part of the store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(  # type: ignore[attr-defined]  # which torch documents
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False, timeout=timeout
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {
        "store": dist.distributed_c10d.PrefixStore(f"mealfast-{attempt}-{next(_groups)}", store),
        "rank": rank,
        "world_size": world_size,
    }


def _die_with_torchrun() -> None:
    """Has the system kill this process when its torchrun is killed: nobody else would end it."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _device(option: str, local_rank: int, local_world_size: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if option == "cpu" or (option == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or check the driver")
    if local_world_size > gpus:
        raise UsageError(
            f"torchrun started {local_world_size} processes on a machine with {gpus} GPUs: "
            f"use --nproc-per-node {gpus} or fewer"
        )
    return torch.device("cuda", local_rank)


def describe(device: torch.device) -> dict[str, object]:
    """Hardware and versions, for config.json and for whoever reads the figures."""
    import platform

    import timm
    import torchvision

    facts: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    try:
        import nvidia.dali

        facts["dali"] = nvidia.dali.__version__
    except ImportError:
        facts["dali"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts
