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
        images, labels, cached, kept = self._inputs(batch, step)
        parts.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros_like(self.meter[:-1])
        for number in range(accumulate):
            part, *rest = (rows.chunk(accumulate)[number] for rows in (images, *labels, *cached))
            part_labels, part_cached = rest[: len(labels)], rest[len(labels) :]
            reduce_gradients = number == accumulate - 1 or self.runtime.world_size == 1
            with nullcontext() if reduce_gradients else parts.wrapped.no_sync():
                teacher_logits = parts.teachers(part) if parts.teachers else []
                partner_labels = part_labels[1] if len(part_labels) > 1 else None
                loss, terms = parts.wrapped(part, teacher_logits, kept, part_labels[0], partner_labels, part_cached)
                parts.scaler.scale(loss / accumulate).backward()
            sums += terms / accumulate
        bad = self._update()
        self.skipped += bad
        self.meter += torch.cat((sums, sums.new_ones(1))).masked_fill(bad, 0.0)

    def _inputs(self, batch: Batch, step: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], float]:
        """Images, labels, cached targets (if any); under CutMix mixed images, and labels and targets of both; and the
        area kept from each image itself."""
        labels, cached = [batch.labels], list(batch.targets or ())
        if not self.recipe.cutmix:
            return batch.images, labels, cached, 1.0
        _, height, width, _ = batch.images.shape
        box = cutmix.draw_box(self.recipe.seed, step, self.runtime.rank, height, width)
        for rows in (labels, cached):
            rows += [cutmix.partner(own) for own in rows]
        return cutmix.mix(batch.images, box), labels, cached, box.kept

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
