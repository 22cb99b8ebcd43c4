"""What a checkpoint holds of a run, and how a run takes it up again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mealfast.assembly import Parts
from mealfast.errors import UsageError
from mealfast.runtime import Runtime
from mealfast.train_step import TrainStep


def capture(runtime: Runtime, parts: Parts, train_step: TrainStep) -> dict[str, Any]:
    """Everything that decides the steps to come. Every process must call it; the result is for the main one to save."""
    random_states = {"cpu": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        random_states["cuda"] = torch.cuda.get_rng_state(runtime.device)
    discriminator = parts.trainee.objective.discriminator
    optimizer = parts.optimizer.state_dict()
    for group in optimizer["param_groups"]:
        group["lr"] = float(group["lr"])  # on the device under a CUDA graph
    return {
        "student": parts.student.model.state_dict(),
        "discriminator": discriminator.state_dict() if discriminator is not None else None,
        "optimizer": optimizer,
        "scaler": parts.scaler.state_dict(),
        "skipped": train_step.skipped.cpu(),
        "processes": runtime.gather({"rng": random_states, "meter": train_step.meter.cpu()}),
    }


def restore(state: dict[str, Any], runtime: Runtime, parts: Parts, train_step: TrainStep, what: str) -> None:
    """Takes up what `capture` gave. With another number of processes the meters are averaged and random numbers start
    anew (dropout only: the view plan and CutMix do not depend on them). Raises UsageError if it does not fit."""
    try:
        parts.student.model.load_state_dict(state["student"])
        if parts.trainee.objective.discriminator is not None:
            parts.trainee.objective.discriminator.load_state_dict(state["discriminator"])
        parts.optimizer.load_state_dict(state["optimizer"])
        train_step.start_anew()
        parts.scaler.load_state_dict(state["scaler"])
        train_step.skipped.copy_(state["skipped"])
        processes = state["processes"]
        if len(processes) != runtime.world_size:
            train_step.meter.copy_(sum(process["meter"] for process in processes) / len(processes))
            return
        own = processes[runtime.rank]
        train_step.meter.copy_(own["meter"])
        torch.set_rng_state(own["rng"]["cpu"])
        if runtime.device.type == "cuda" and "cuda" in own["rng"]:
            torch.cuda.set_rng_state(own["rng"]["cuda"], runtime.device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{what}: does not fit this run ({reason})") from error


def share_buffers(module: nn.Module, runtime: Runtime) -> None:
    """Gives every process the main one's buffers (BatchNorm's running statistics), for evaluation.

    Only the main process's are saved, and none is read in training, so this changes no later step.
    """
    if runtime.world_size > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
