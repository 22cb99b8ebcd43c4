"""SGD as a run uses it: its schedule, gradient scaling, and steps that are skipped without the host's knowing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from mealfast.errors import UsageError
from mealfast.machine.processes import Runtime
from mealfast.method.student import Student
from mealfast.recipe import Recipe


class Optimiser:
    """Zeroes gradients, scales losses and updates weights; a step with a gradient that is not finite changes nothing.

    `begin`, `backward` and `finish` are what a CUDA graph of the step replays; `set_lr` comes before it.
    """

    lr: float  # of the step taken last; set by `set_lr`

    def __init__(self, recipe: Recipe, runtime: Runtime, student: Student, lr_factor: Callable[[int], float]) -> None:
        """`lr_factor(step)` is what the learning rates are multiplied by in a step. Raises UsageError."""
        groups = [{"params": list(student.normalised.parameters()), "base_lr": recipe.lr}]
        if student.discriminator is not None:
            lr = recipe.lr if recipe.discriminator_lr is None else recipe.discriminator_lr
            groups.append({"params": list(student.discriminator.parameters()), "base_lr": lr})
        self._update: Callable[[torch.Tensor], None]
        settings: dict[str, Any] = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
        self._sgd: Any  # Apex's class has no types
        if recipe.optimizer == "sgd":
            self._sgd, self._update = torch.optim.SGD(groups, fused=True, **settings), self._update_fused
        else:
            self._sgd, self._update = apex_fused_sgd(runtime.device)(groups, **settings), self._update_apex
        self._parameters = [parameter for group in self._sgd.param_groups for parameter in group["params"]]
        if recipe.momentum > 0:
            # Zeros now are what the first step would make; a first step that is skipped would leave them uninitialised.
            for parameter in self._parameters:
                self._sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self._scaler = torch.amp.GradScaler(runtime.device.type, enabled=student.dtype == torch.float16)
        if self._scaler.is_enabled():
            self._update = self._update_scaled
        self.lr = recipe.lr
        self._lr_factor = lr_factor
        # A graph reads the learning rate from the device; elsewhere it is a number.
        on_device = recipe.cuda_graphs == "step"
        self._lrs = [torch.zeros((), device=runtime.device) if on_device else None for _ in groups]
        self._statistics = student.statistics()
        self._before: torch.Tensor | None = None  # the statistics as the step that is under way found them

    def set_lr(self, step: int) -> None:
        """Sets the learning rates of `step`, counted from 0."""
        factor = self._lr_factor(step)
        self.lr = self._sgd.param_groups[0]["base_lr"] * factor
        for group, tensor in zip(self._sgd.param_groups, self._lrs, strict=True):
            lr = group["base_lr"] * factor
            group["lr"] = lr if tensor is None else tensor.fill_(lr)

    def begin(self) -> None:
        """Forgets the gradients, and keeps a copy of BatchNorm's running statistics."""
        self._sgd.zero_grad(set_to_none=True)
        self._before = _flat(self._statistics) if self._statistics else None

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a scalar."""
        self._scaler.scale(loss).backward()

    def finish(self) -> torch.Tensor:
        """Updates the weights, unless a gradient is not finite: decided on the device, so that nothing waits.

        Returns whether the step was skipped, a bool scalar there. The running statistics, which the forward pass has
        written before anyone knew, are then what they were.
        """
        skipped = ~torch.isfinite(get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        self._update(skipped)
        if self._before is not None:
            self._put_back(torch.where(skipped, self._before, _flat(self._statistics)))
            self._before = None
        return skipped

    def undo(self) -> None:
        """Puts the running statistics back of a step that began and failed before `finish`."""
        if self._before is not None:
            self._put_back(self._before)
            self._before = None

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._sgd.zero_grad(set_to_none=True)

    # -- the three ways to update, all of them without the host's knowing whether they did ---------------------------

    def _update_fused(self, skipped: torch.Tensor) -> None:
        self._sgd.found_inf = skipped.float()
        self._sgd.step()

    def _update_scaled(self, skipped: torch.Tensor) -> None:
        self._scaler.step(self._sgd)  # skips by itself, and lowers its scale
        self._scaler.update()

    def _update_apex(self, skipped: torch.Tensor) -> None:
        self._sgd._dummy_overflow_buf.copy_(skipped)  # the flag on which Apex's kernel does nothing
        self._sgd.step()

    def _put_back(self, statistics: torch.Tensor) -> None:
        pieces = statistics.split([buffer.numel() for buffer in self._statistics])
        torch._foreach_copy_(self._statistics, [p.view_as(b) for p, b in zip(pieces, self._statistics, strict=True)])

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: "optimizer" and "scaler", as torch's have them."""
        state = self._sgd.state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])  # on the device under a CUDA graph
        return {"optimizer": state, "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave; a captured step must be captured anew. Raises ValueError, or what torch
        raises, where it does not fit."""
        # The groups' settings are the recipe's, which is the same; a file of others need not be believed in them.
        groups = self._sgd.state_dict()["param_groups"]
        self._sgd.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        for parameter, momentum in self._sgd.state.items():
            if any(buffer is not None and buffer.shape != parameter.shape for buffer in momentum.values()):
                raise ValueError("a momentum buffer has another shape than its weight")
        self._scaler.load_state_dict(state["scaler"])


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def apex_fused_sgd(device: torch.device) -> Any:
    """NVIDIA Apex's class FusedSGD. Raises UsageError where it is not installed, or is PyPI's package of that name."""
    if device.type != "cuda":
        raise UsageError("--optimizer apex-fused-sgd needs a GPU: use --optimizer sgd, which is fused too")
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise UsageError(
            "--optimizer apex-fused-sgd: NVIDIA Apex is not installed (PyPI's `apex` is another package): "
            "build it from NVIDIA's source with its CUDA extensions, or use --optimizer sgd"
        ) from error
    return FusedSGD
