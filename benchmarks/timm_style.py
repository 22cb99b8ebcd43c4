"""Distillation as one writes it today with timm: its loader, autocast, channels-last models, softmaxes averaged.

Shape legend: B images, C classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from baseline import endless


class TimmStyle:
    """`step()` trains on the next batch."""

    def __init__(
        self,
        root: Path,
        student: str,
        teachers: Sequence[str],
        size: int,
        batch: int,
        device: torch.device,
        workers: int,
        amp_dtype: torch.dtype,
    ) -> None:
        self.device, self.amp_dtype = device, amp_dtype
        self.student = timm.create_model(student).to(device, memory_format=torch.channels_last).train()
        self.teachers = [
            timm.create_model(name).to(device, memory_format=torch.channels_last).eval() for name in teachers
        ]
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9)
        gpu = device.type == "cuda"
        self._loader = timm.data.create_loader(
            timm.data.ImageDataset(str(root)),
            (3, size, size),
            batch,
            is_training=True,
            use_prefetcher=gpu,
            color_jitter=None,
            interpolation="bilinear",
            num_workers=workers,
            pin_memory=gpu,
            device=device,
        )
        self._batches = endless(self._loader)

    def step(self) -> None:
        images = self.next_batch().to(self.device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32):
            with torch.no_grad():
                softmaxes = [teacher(images).float().softmax(dim=1) for teacher in self.teachers]
                target = torch.stack(softmaxes).mean(dim=0)  # [B, C]
            logits = self.student(images)
            loss = F.kl_div(logits.float().log_softmax(dim=1), target, reduction="batchmean")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def next_batch(self) -> torch.Tensor:
        return next(self._batches)

    def close(self) -> None:
        self._batches.close()
