"""From a recipe to the objects of a run: models on their device, optimiser, wrapped for the processes there are.

Shape legend: B images of this process, H and W pixels, C classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mealfast.errors import UsageError
from mealfast.labels.fit import open_label_cache
from mealfast.loaders import LabelCache
from mealfast.machine.cuda_graphs import on_side_stream
from mealfast.machine.precision import autocast, has_amx, name_of, precision
from mealfast.machine.processes import Runtime
from mealfast.method.discriminator import Discriminator
from mealfast.method.objective import Objective
from mealfast.models import normalised as models
from mealfast.models.ensemble import FrozenEnsemble
from mealfast.recipe import Recipe


class Trainee(nn.Module):
    """What is trained, as one module: student, and in the objective the discriminator. One module is one DDP."""

    def __init__(self, student: models.NormalizedModel, objective: Objective, dtype: torch.dtype) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self._dtype = dtype

    def forward(self, images: torch.Tensor, teacher_logits: Sequence[torch.Tensor], *rest: Any) -> Any:
        """uint8 images [B, H, W, 3], K teachers' logits [B, C], what else the objective takes -> (loss, terms)."""
        return self.objective(self.logits(images), teacher_logits, *rest)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """The student's logits [B, C] of uint8 images [B, H, W, 3], in its precision."""
        with autocast(images.device, self._dtype):
            return self.student(images)

    @property
    def precision(self) -> str:
        """What the student computes in: "float32", "bfloat16" or "float16"."""
        return name_of(self._dtype)


@dataclass
class Parts:
    """The objects of a run. `wrapped` is the trainee behind DDP where there are several processes."""

    trainee: Trainee
    wrapped: nn.Module
    loaded_teachers: list[models.NormalizedModel]  # as loaded, until they are made ready
    teachers: FrozenEnsemble | None  # ready to be called: teacher_setup.prepare
    teacher_digests: list[str]
    live_teachers: tuple[str, ...]  # specs of those that run
    label_cache: LabelCache | None  # that stands in for the teachers throughout
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    compiled: bool

    @property
    def student(self) -> models.NormalizedModel:
        return self.trainee.student


def assemble(recipe: Recipe, runtime: Runtime, *, writes_cache: bool = False) -> Parts:
    """Builds everything; the teachers too where the run writes a label cache.

    Raises UsageError for wrong specs, weights, sizes and combinations.
    """
    label_cache = None if writes_cache else open_label_cache(recipe)
    live_teachers = recipe.teachers if writes_cache else recipe.live_teachers
    _check_cuda_graphs(recipe, runtime, writes_cache)
    torch.manual_seed(
        recipe.seed
    )  # random weights; the student comes first, so that they do not depend on the teachers
    student = models.build(recipe.student, recipe.size)
    teachers = [models.build(spec, recipe.size) for spec in live_teachers]
    models.check_classes(live_teachers, teachers, recipe.student, student.num_classes)
    digests = [models.digest(teacher) for teacher in teachers]
    models.check_distinct(live_teachers, digests)
    for model, spec in zip((student, *teachers), (recipe.student, *live_teachers), strict=True):
        models.probe(model, spec, recipe.size)

    mode = recipe.discriminator_mode
    discriminator = None if mode == "off" else Discriminator(student.num_classes, mode)
    compile = runtime.device.type == "cuda" if recipe.compile is None else recipe.compile
    trainee = Trainee(
        student, Objective(recipe.hard_label_weight, discriminator), _student_precision(student, recipe, runtime)
    )
    trainee.to(runtime.device, memory_format=torch.channels_last).train()
    if compile:
        trainee.student.compile(dynamic=False)  # in place: the state dict keeps timm's keys
    optimizer = make_optimizer(recipe, trainee, runtime)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=precision(recipe.amp, runtime.device) == torch.float16)
    wrapped = _distributed(trainee, recipe, runtime)
    # From here on random numbers are each process's own (dropout, drop path).
    torch.manual_seed(recipe.seed + 1 + runtime.rank)
    return Parts(trainee, wrapped, teachers, None, digests, live_teachers, label_cache, optimizer, scaler, compile)


def _student_precision(student: nn.Module, recipe: Recipe, runtime: Runtime) -> torch.dtype:
    """What the student computes in; what each teacher does is measured."""
    # On a CPU with AVX512-BF16 alone bf16 is twice as fast as float32 for ResNets, and half to three quarters as fast
    # for MobileNets and EfficientNets.
    depthwise = any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in student.modules())
    if recipe.amp == "auto" and runtime.device.type == "cpu" and depthwise and not has_amx():
        return torch.float32
    return precision(recipe.amp, runtime.device)


def _check_cuda_graphs(recipe: Recipe, runtime: Runtime, writes_cache: bool) -> None:
    if recipe.cuda_graphs in (None, "off"):
        return
    option = f"--cuda-graphs {recipe.cuda_graphs}"
    if runtime.device.type != "cuda":
        raise UsageError(f"{option} needs a GPU: leave it out on the CPU")
    if recipe.cuda_graphs == "step" and precision(recipe.amp, runtime.device) == torch.float16:
        raise UsageError(f"{option} cannot scale float16 gradients: use --amp bf16, or --cuda-graphs ensemble")
    if recipe.cuda_graphs == "step" and writes_cache:
        raise UsageError(
            f"{option}: a run that writes its label cache has steps of two kinds; use --cuda-graphs ensemble"
        )
    if recipe.cuda_graphs == "step" and recipe.optimizer != "sgd":
        raise UsageError(f"{option} needs --optimizer sgd, whose learning rate can lie on the GPU")


def make_optimizer(recipe: Recipe, trainee: Trainee, runtime: Runtime) -> torch.optim.Optimizer:
    """SGD over the student and, in a group with its own learning rate, the discriminator. Raises UsageError."""
    groups = [{"params": list(trainee.student.parameters()), "base_lr": recipe.lr}]
    if trainee.objective.discriminator is not None:
        lr = recipe.lr if recipe.discriminator_lr is None else recipe.discriminator_lr
        groups.append({"params": list(trainee.objective.discriminator.parameters()), "base_lr": lr})
    settings = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, fused=True, **settings)
    else:
        optimizer = apex_fused_sgd(runtime.device)(groups, **settings)
    if recipe.momentum > 0:
        # Zeros now are what the first step would make; a first step that is skipped would leave them uninitialised.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def apex_fused_sgd(device: torch.device) -> type[torch.optim.Optimizer]:
    """NVIDIA Apex's FusedSGD. Raises UsageError where it is not installed, or is PyPI's package of that name."""
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


def _distributed(trainee: Trainee, recipe: Recipe, runtime: Runtime) -> nn.Module:
    if runtime.world_size == 1:
        return trainee
    signature = inspect.signature(DistributedDataParallel).parameters  # renamed in torch 2.15
    # DDP lays its buckets out anew after its first step, by the order of the gradients it saw, and with another layout
    # sums over three or more processes round differently: a resumed run's first step would not be what it would have
    # been. Looking for unused parameters keeps the first layout; on a GPU, where nothing is bit-identical, speed wins.
    on_cpu = runtime.device.type == "cpu"
    if on_cpu:  # one that is unused, in no optimiser and no state dict: DDP warns where it finds none
        trainee.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature else "broadcast_buffers"
    wrap = partial(
        DistributedDataParallel,
        trainee,
        device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None,
        # Running statistics are never read in training mode: they are broadcast where they are (evaluation), not here.
        **{sync_buffers: False},
        gradient_as_bucket_view=True,
        static_graph=recipe.accumulate == 1 and not on_cpu,
        find_unused_parameters=on_cpu,
    )
    # DDP keeps what adds up gradients, on the stream where it was made, and the default one cannot be captured.
    return on_side_stream(wrap) if recipe.cuda_graphs == "step" else wrap()
