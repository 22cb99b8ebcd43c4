"""One optimiser step, top to bottom.

Shape legend: B images of this process, H and W pixels.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn.utils import get_total_norm

from mealfast.labels.write_through import RecordingTargets
from mealfast.loaders import Batch
from mealfast.machine.cuda_graphs import CapturedStep
from mealfast.machine.processes import Runtime
from mealfast.method import cutmix
from mealfast.method.inputs import Inputs
from mealfast.method.objective import TERMS
from mealfast.recipe import Recipe
from mealfast.training.job import Parts
from mealfast.training.lr_schedule import lr_factor


class TrainStep:
    """Trains on one batch, and keeps the sums that logging reads. No host sync."""

    def __init__(self, recipe: Recipe, runtime: Runtime, parts: Parts, steps_per_epoch: int) -> None:
        self.recipe, self.runtime, self.parts = recipe, runtime, parts
        self.steps_per_epoch = steps_per_epoch
        self.writer: RecordingTargets | None = None  # of a run that writes a label cache
        self.made: list[tuple[torch.Tensor, torch.Tensor]] = []  # the step's targets for it, [B / accumulate, k] each
        self.parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
        # Of the student in training mode: not of the preprocessing around it, which nothing writes to.
        self.buffers = [buffer for buffer in parts.student.model.buffers() if buffer.is_floating_point()]
        # Sums of TERMS over the steps since the last log, then how many steps, skipped ones apart; and how many were
        # skipped in all.
        self.meter = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=runtime.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=runtime.device)
        self.lr = recipe.lr  # of the step taken last
        self.start_anew()

    def start_anew(self) -> None:
        """Forgets a CUDA graph: for when tensors that it has captured were replaced."""
        graph = self.recipe.cuda_graphs == "step"
        self._run = CapturedStep(self.learn, self.runtime.world_size) if graph else self.learn
        groups = self.parts.optimizer.param_groups
        # A graph reads the learning rate from the device; elsewhere it is a number.
        self._lrs = [torch.zeros((), device=self.runtime.device) if graph else None for _ in groups]

    def __call__(self, batch: Batch, step: int) -> None:
        self._set_lr(step)
        self.made = []
        cached = batch.targets or self._targets_before_mixing(batch.images)
        self._run(self._mix(Inputs(batch.images, batch.labels, cached=cached), step))
        if self.writer and self.made:
            self.writer.add(step // self.steps_per_epoch, batch.indices, self.made)

    def learn(self, inputs: Inputs) -> None:
        """All of a step that the device does; what changes from step to step comes in as tensors."""
        parts, accumulate = self.parts, self.recipe.accumulate
        statistics = self._statistics()
        parts.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros_like(self.meter[:-1])
        for number in range(accumulate):
            part = inputs.part(number, accumulate)
            reduce_gradients = number == accumulate - 1 or self.runtime.world_size == 1
            with nullcontext() if reduce_gradients else parts.wrapped.no_sync():
                teacher_logits = parts.teachers(part.images) if parts.teachers and not part.cached else []
                cached = part.cached
                if self.writer and teacher_logits:
                    cached = self.writer.top_k(teacher_logits)
                    self.made.append(cached)
                loss, terms = parts.wrapped(
                    part.images, teacher_logits, part.kept, part.labels, part.partner_labels, cached
                )
                parts.scaler.scale(loss / accumulate).backward()
            sums += terms / accumulate
        bad = self.update()
        self._restore_statistics(statistics, bad)
        self.skipped += bad
        self.meter += torch.cat((sums, sums.new_ones(1))).masked_fill(bad, 0.0)

    def _targets_before_mixing(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Under CutMix a run that writes a label cache learns from what it writes: the targets of the images as they
        are, mixed by area as a run from the cache mixes them. Otherwise nothing: the teachers see the student's images.
        """
        if self.writer is None or not self.recipe.cutmix:
            return ()
        for part in images.chunk(self.recipe.accumulate):
            self.made.append(self.writer.top_k(self.parts.teachers(part)))
        return tuple(torch.cat(one) for one in zip(*self.made, strict=True))

    def _mix(self, inputs: Inputs, step: int) -> Inputs:
        """Under CutMix images with a box of their partner's, and the partner's labels and cached targets too."""
        if not self.recipe.cutmix:
            return inputs
        _, height, width, _ = inputs.images.shape
        box = cutmix.draw_box(self.recipe.seed, step, self.runtime.rank, height, width)
        return Inputs(
            cutmix.mix(inputs.images, box),
            inputs.labels,
            cutmix.partner(inputs.labels),
            (*inputs.cached, *map(cutmix.partner, inputs.cached)),
            box.kept,
        )

    def _set_lr(self, step: int) -> None:
        factor = lr_factor(step // self.steps_per_epoch, self.recipe.lr_decay_epochs, self.recipe.lr_decay)
        self.lr = self.recipe.lr * factor
        for group, tensor in zip(self.parts.optimizer.param_groups, self._lrs, strict=True):
            lr = group["base_lr"] * factor
            group["lr"] = lr if tensor is None else tensor.fill_(lr)

    def _statistics(self) -> torch.Tensor | None:
        """A copy of BatchNorm's running statistics: a step that is skipped must not leave its infinities in them."""
        return torch.cat([buffer.flatten() for buffer in self.buffers]) if self.buffers else None

    def _restore_statistics(self, before: torch.Tensor | None, bad: torch.Tensor) -> None:
        if before is not None:
            after = torch.where(bad, before, self._statistics()).split([buffer.numel() for buffer in self.buffers])
            torch._foreach_copy_(self.buffers, [part.view_as(b) for part, b in zip(after, self.buffers, strict=True)])

    def update(self) -> torch.Tensor:
        """Updates the weights, unless a gradient is not finite: decided on the device, so that nothing waits.

        Returns whether it was skipped, a bool scalar there.
        """
        optimizer, scaler = self.parts.optimizer, self.parts.scaler
        bad = ~torch.isfinite(get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if scaler.is_enabled():  # skips by itself, and lowers its scale
            scaler.step(optimizer)
            scaler.update()
        elif self.recipe.optimizer == "sgd":
            optimizer.found_inf = bad.float()
            optimizer.step()
        else:
            optimizer._dummy_overflow_buf.copy_(bad)  # the flag on which Apex's kernel does nothing
            optimizer.step()
        return bad
