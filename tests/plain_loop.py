"""MEAL V2's training loop in plain PyTorch, float32, Pillow and timm: nothing of mealfast but its view plan."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from . import released_code


def views(plan, paths: list[Path], labels: np.ndarray, batch_size: int, step: int):
    """uint8 images [B, H, W, 3] and labels [B] of one step, as the plan orders and crops them."""
    epoch, number = divmod(step, len(paths) // batch_size)
    boxes, flips = plan.views(epoch)
    rows = plan.order(epoch)[number * batch_size : (number + 1) * batch_size]
    images = []
    for row in rows:
        x, y, w, h = boxes[row].tolist()
        crop = Image.open(paths[row]).convert("RGB").crop((x, y, x + w, y + h))
        crop = crop.resize((plan.size, plan.size), Image.Resampling.BILINEAR)
        images.append(np.asarray(crop)[:, ::-1] if flips[row] else np.asarray(crop))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(labels[rows])


class PlainModel:
    """A timm model behind its own mean and std."""

    def __init__(self, architecture: str, checkpoint: Path, num_classes: int) -> None:
        fixed_size = {"img_size": 32} if "vit" in architecture else {}
        self.model = timm.create_model(architecture, num_classes=num_classes, **fixed_size)
        self.model.load_state_dict(torch.load(checkpoint, weights_only=True))
        config = timm.data.resolve_model_data_config(self.model)
        self.mean, self.std = torch.tensor(config["mean"]), torch.tensor(config["std"])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((((images.float() / 255) - self.mean) / self.std).permute(0, 3, 1, 2).contiguous())


class PlainLoop:
    """Student, teachers and the released discriminator, trained by torch's unfused SGD."""

    def __init__(self, student, teachers, layers, mode, lr, momentum, weight_decay, hard_weight=0.0) -> None:
        self.student, self.teachers, self.mode, self.hard_weight = student, teachers, mode, hard_weight
        self.layers = [tuple(p.detach().clone().requires_grad_() for p in layer) for layer in layers]
        self.student.model.train()
        for teacher in teachers:
            teacher.model.eval()
        self.base_lr = lr
        self.parameters = parameters = [*student.model.parameters(), *(p for layer in self.layers for p in layer)]
        self.optimizer = torch.optim.SGD(
            parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=False, foreach=False
        )

    def step(self, images, labels, factor: float) -> dict[str, float]:
        """One step at `factor` times the learning rate; its losses."""
        with torch.no_grad():
            teachers = [teacher(images) for teacher in self.teachers]
        student = self.student(images)
        soft = released_code.soft_cross_entropy(student, teachers)
        loss = (1 - self.hard_weight) * soft
        if self.hard_weight:
            loss = loss + self.hard_weight * torch.nn.functional.cross_entropy(student, labels)
        found = {"soft_ce": soft, "kl": released_code.kl(student, teachers)}
        if self.mode != "off":
            found["discriminator_loss"] = added = released_code.discriminator_loss(student, teachers, self.layers)
            loss = loss + added
        found["loss"] = loss
        self.optimizer.zero_grad()
        if self.mode == "adversarial":
            # Eq. 5's two players: the student ascends what the discriminator descends.
            ours = list(self.student.model.parameters())
            theirs = [p for layer in self.layers for p in layer]
            for p, g in zip(ours, torch.autograd.grad(loss - 2 * added, ours, retain_graph=True), strict=True):
                p.grad = g
            for p, g in zip(theirs, torch.autograd.grad(added, theirs), strict=True):
                p.grad = g
        else:
            loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * factor
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in found.items()}
