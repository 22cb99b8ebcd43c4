"""What a checkpoint holds of a run, and how a run takes it up again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mealfast.errors import UsageError
from mealfast.machine.processes import Runtime
from mealfast.models.layout import is_layout
from mealfast.training.job import Parts
from mealfast.training.step import TrainStep


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
        "threads": torch.get_num_threads(),
    }


def restore(state: dict[str, Any], runtime: Runtime, parts: Parts, train_step: TrainStep, what: str) -> None:
    """Takes up what `capture` gave. With another number of processes the meters are averaged and random numbers start
    anew (dropout only: the view plan and CutMix do not depend on them). Raises UsageError if it does not fit."""
    try:
        _restore(state, runtime, parts, train_step)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{what}: does not fit this run ({reason})") from error


def _restore(state: dict[str, Any], runtime: Runtime, parts: Parts, train_step: TrainStep) -> None:
    parts.student.model.load_state_dict(state["student"])
    if parts.trainee.objective.discriminator is not None:
        parts.trainee.objective.discriminator.load_state_dict(state["discriminator"])
    # The groups' settings are the recipe's, which is the same; a file of others need not be believed in them.
    own = parts.optimizer.state_dict()
    parts.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own["param_groups"]})
    train_step.start_anew()
    for parameter, momentum in parts.optimizer.state.items():
        if any(buffer is not None and buffer.shape != parameter.shape for buffer in momentum.values()):
            raise ValueError("a momentum buffer has another shape than its weight")
    parts.scaler.load_state_dict(state["scaler"])
    train_step.skipped.copy_(state["skipped"])
    processes = state["processes"]
    if any(process["meter"].shape != train_step.meter.shape for process in processes):
        raise ValueError("the sums of its losses have another shape")
    if len(processes) != runtime.world_size:
        train_step.meter.copy_(sum(process["meter"] for process in processes) / len(processes))
        return
    own = processes[runtime.rank]
    train_step.meter.copy_(own["meter"])
    torch.set_rng_state(own["rng"]["cpu"])
    if runtime.device.type == "cuda" and "cuda" in own["rng"]:
        torch.cuda.set_rng_state(own["rng"]["cuda"], runtime.device)


def check(state: dict[str, Any], what: str) -> None:
    """Raises UsageError where the plain values of a checkpoint are not what `capture` and the engine put there."""
    for name in ("recipe", "identity", "scores"):
        if not isinstance(state.get(name), dict):
            raise UsageError(f"{what}: is damaged (its {name})")
    for name in ("start", "latest", "best"):
        line = state["scores"].get(name)
        if line is not None and not (isinstance(line, dict) and isinstance(line.get("top1"), (int, float))):
            raise UsageError(f"{what}: is damaged (its {name} score)")
    layouts = state.get("layouts", {})
    if not isinstance(layouts, dict) or not all(map(is_layout, layouts.values())):
        raise UsageError(f"{what}: is damaged (its teachers' layouts)")
    if type(state.get("bad_in_a_row", 0)) is not int:
        raise UsageError(f"{what}: is damaged (its count of bad steps)")


def notes(state: dict[str, Any], runtime: Runtime) -> list[str]:
    """Lines on why a run that goes on here is not, to the bit, the one that would have been."""
    lines = []
    if len(state["processes"]) != runtime.world_size:
        lines.append(
            f"note: the checkpoint was written by {len(state['processes'])} processes, now there are "
            f"{runtime.world_size}: the global batches stay the same, BatchNorm sees other shares of them"
        )
    threads = state.get("threads", torch.get_num_threads())
    if runtime.device.type == "cpu" and threads != torch.get_num_threads():
        lines.append(
            f"note: the checkpoint was written with {threads} CPU threads a process, now there are "
            f"{torch.get_num_threads()}: sums round a little differently (OMP_NUM_THREADS={threads} would not)"
        )
    return lines


def share_buffers(module: nn.Module, runtime: Runtime) -> None:
    """Gives every process the main one's buffers (BatchNorm's running statistics), for evaluation.

    Only the main process's are saved, and none is read in training, so this changes no later step.
    """
    if runtime.world_size > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
