"""MEAL V2 as the paper's released code runs it, written anew: what mealfast is measured against.

Pillow decodes in DataLoader workers, everything is float32 and NCHW, the teachers run eagerly one after the other and
their softmaxes are made and averaged apart, the loss is a product of two [B, C] tensors, the discriminator is a stack
of 1x1 convolutions on the stacked logits, SGD loops over its parameters. On several GPUs the released code uses
DataParallel; this is one device's part of it.

Shape legend: B images, C classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of every model there


class Baseline:
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
    ) -> None:
        self.device = device
        self.student = timm.create_model(student).to(device).train()
        self.teachers = [timm.create_model(name).to(device).eval() for name in teachers]
        classes = self.student.num_classes
        self.discriminator = nn.Sequential(
            nn.Conv2d(classes, classes // 8, 1), nn.ReLU(), nn.Conv2d(classes // 8, classes // 64, 1), nn.ReLU(),
            nn.Conv2d(classes // 64, 2, 1), nn.ReLU(),
        ).to(device)  # fmt: skip
        self.optimizer = torch.optim.SGD(
            [*self.student.parameters(), *self.discriminator.parameters()], lr=0.01, momentum=0.9, foreach=False
        )
        images = ImageFolder(str(root), augmentation(size))
        self._loader = DataLoader(
            images,
            batch_size=batch,
            # One epoch without end: at the end of a short one all workers stand still, which ImageNet's hardly do.
            sampler=RandomSampler(images, replacement=True, num_samples=1 << 40),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        self._batches = endless(self._loader)

    def step(self) -> None:
        images = self.next_batch().to(self.device, non_blocking=True)  # float32 [B, 3, H, W]
        with torch.no_grad():
            teacher_logits = [teacher(images) for teacher in self.teachers]
            target = sum(torch.softmax(logits, dim=1) for logits in teacher_logits) / len(teacher_logits)
            mean_logits = sum(teacher_logits) / len(teacher_logits)
        logits = self.student(images)
        loss = -(target * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
        both = torch.cat((logits, mean_logits))[:, :, None, None]  # [2B, C, 1, 1]
        labels = torch.zeros(len(both), 2, device=self.device)
        labels[: len(logits), 0] = 1
        labels[len(logits) :, 1] = 1
        said = self.discriminator(both).flatten(1)
        loss = loss + nn.functional.binary_cross_entropy_with_logits(said, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()  # its progress meter reads the loss of every step

    def next_batch(self) -> torch.Tensor:
        return next(self._batches)

    def close(self) -> None:
        self._batches.close()


def endless(loader: DataLoader) -> Iterator[torch.Tensor]:
    """The images of a loader of images and labels, epoch after epoch."""
    while True:
        for images, _ in loader:
            yield images


def augmentation(size: int) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
