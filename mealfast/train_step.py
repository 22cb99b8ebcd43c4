"""One optimiser step, top to bottom.

Shape legend: B images of this process, H and W pixels.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn.utils import get_total_norm

from mealfast import cutmix
from mealfast.assembly import Parts
from mealfast.loaders import Batch
from mealfast.lr_schedule import lr_factor
from mealfast.objective import TERMS
from mealfast.recipe import Recipe
from mealfast.runtime import Runtime


class TrainStep:
    """Trains on one batch, and keeps the sums that logging reads. No host sync."""

    def __init__(self, recipe: Recipe, runtime: Runtime, parts: Parts, steps_per_epoch: int) -> None:
        self.recipe, self.runtime, self.parts = recipe, runtime, parts
        self.steps_per_epoch = steps_per_epoch
        self.parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
        # Sums of TERMS over the steps since the last log, then how many steps, skipped ones apart; and how many were
        # skipped in all.
        self.meter = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=runtime.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=runtime.device)

    def __call__(self, batch: Batch, step: int) -> None:
        parts, accumulate = self.parts, self.recipe.accumulate
        self._set_lr(step)
        tensors, kept = self._inputs(batch, step)
        parts.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros_like(self.meter[:-1])
        for number in range(accumulate):
            images, *labels = (rows.chunk(accumulate)[number] for rows in tensors)
            reduce_gradients = number == accumulate - 1 or self.runtime.world_size == 1
            with nullcontext() if reduce_gradients else parts.wrapped.no_sync():
                teacher_logits = parts.teachers(images) if parts.teachers else []
                loss, terms = parts.wrapped(images, teacher_logits, kept, *labels)
                parts.scaler.scale(loss / accumulate).backward()
            sums += terms / accumulate
        bad = self._update()
        self.skipped += bad
        self.meter += torch.cat((sums, sums.new_ones(1))).masked_fill(bad, 0.0)

    def _inputs(self, batch: Batch, step: int) -> tuple[list[torch.Tensor], float]:
        """Images and labels, under CutMix mixed images and both labels; and the area kept from each image itself."""
        if not self.recipe.cutmix:
            return [batch.images, batch.labels], 1.0
        _, height, width, _ = batch.images.shape
        box = cutmix.draw_box(self.recipe.seed, step, self.runtime.rank, height, width)
        return [cutmix.mix(batch.images, box), batch.labels, cutmix.partner(batch.labels)], box.kept

    def _set_lr(self, step: int) -> None:
        factor = lr_factor(step // self.steps_per_epoch, self.recipe.lr_decay_epochs, self.recipe.lr_decay)
        for group in self.parts.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def _update(self) -> torch.Tensor:
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
