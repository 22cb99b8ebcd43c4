"""Recipes: typed, named configurations of one training run. Imports no torch, so that `--help` is instant.

Every field of `Recipe` is an option of `mealfast train`: `learning_rate` would be `--learning-rate`. Bad values and bad
combinations are refused at construction, in one line that names the option to change.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any

from mealfast.errors import UsageError, alternatives

# Pinned: timm's untagged names have moved over the years, and the 380 pair without tags is one teacher twice.
TEACHERS_224 = ("senet154.gluon_in1k", "resnet152s.gluon_in1k")
TEACHERS_380 = ("tf_efficientnet_b4.ns_jft_in1k", "tf_efficientnet_b4.aa_in1k")


def option(default: Any, group: str, help: str, **extra: Any) -> Any:
    """A dataclass field that carries what the command line needs to know of it."""
    return field(default=default, metadata={"group": group, "help": help, **extra})


VAL_SHARE = 0.1  # of the images, where there is no validation folder

# What is made to fit the number of images where neither a recipe nor an option says it; see `training/fit.py`.
FITTED = ("batch_size", "epochs", "lr_decay_epochs", "log_every", "eval_every", "lr", "student_bn")


@dataclass(frozen=True)
class Recipe:
    """One run. Defaults are the paper's (MEAL V2, arXiv 2009.08453) where the paper says anything."""

    # Models
    teachers: tuple[str, ...] = option(
        (), "models", "model specs of the ensemble (default: none, which trains on labels alone)", metavar="SPEC"
    )
    student: str = option(
        "", "models", "model spec of the student (required, unless --recipe names one)", metavar="SPEC"
    )

    # Data
    data: str = option(
        "",
        "data",
        "folder with train/ and val/, each with one folder of images per class, or of the class folders alone "
        "(required)",
        metavar="DIR",
    )
    val: str = option(
        "",
        "data",
        "folder of validation images, one folder per class (default: val, validation, valid or test beside train/, "
        "else --val-share of the images)",
        metavar="DIR",
    )
    val_share: float = option(
        VAL_SHARE,
        "data",
        "share of the images to keep for validation, chosen by a hash of their names, where there is no folder of them",
        metavar="S",
    )
    class_map: str = option(
        "",
        "data",
        "for models and label caches that do not name their classes: a text file with a class name a line, in the "
        "order of their outputs; or natural (timm's order of class folders) or byte (torchvision's) (default: found "
        "out)",
        metavar="FILE|natural|byte",
    )
    size: int = option(224, "data", "side of the square crops, in pixels")
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0),
        "data",
        "smallest and largest area of a training crop, as a share of the image",
        metavar=("MIN", "MAX"),
    )
    crop_ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3), "data", "smallest and largest width / height of a training crop", metavar=("MIN", "MAX")
    )
    flip: float = option(0.5, "data", "probability that a training image is flipped horizontally")
    interpolation: str = option("bilinear", "data", "how training crops are resized", choices=("bilinear", "bicubic"))
    eval_crop_pct: float | None = option(
        None,
        "data",
        "evaluation resizes the shorter side to size / P, then crops the centre (default: to int(256 / 224 * "
        "size), as the paper does)",
        metavar="P",
    )
    eval_interpolation: str = option(
        "bilinear", "data", "how evaluation images are resized", choices=("bilinear", "bicubic")
    )
    loader: str = option(
        "dali", "data", "what decodes the images; pillow is the slower reference", choices=("dali", "pillow")
    )
    loader_threads: int | None = option(
        None, "data", "decoding threads of each process (default: its share of the cores)", metavar="N"
    )

    loader_timeout: int = option(
        300, "data", "seconds without one image after which the run saves and ends", metavar="SECONDS"
    )

    # Method
    discriminator: str | None = option(
        None,
        "method",
        "regulariser on the logits (default: cooperative, as in the released code; off without teachers)",
        choices=("cooperative", "adversarial", "off"),
    )
    discriminator_lr: float | None = option(
        None, "method", "learning rate of the discriminator (default: the student's)", metavar="LR"
    )
    student_bn: str = option(
        "train",
        "method",
        "how the student's BatchNorms normalise: train by each batch, as the paper does; eval by the running "
        "statistics that it began with, for small batches or few images",
        choices=("train", "eval"),
    )
    cutmix: bool = option(False, "method", "apply CutMix to every batch (beta 1); the teachers see the mixed images")
    label_cache: str = option(
        "",
        "method",
        "folder of targets to read instead of running the teachers; with --teachers, a cache that is missing "
        "or incomplete is written during the first epochs (default: none)",
        metavar="CACHE",
    )
    label_cache_views: int | None = option(
        None,
        "method",
        "views of each image to write into a new --label-cache (default: as many as --epochs)",
        metavar="V",
    )
    label_cache_top_k: int | None = option(
        None, "method", "probabilities of each target to keep in a new --label-cache (default: 10)", metavar="K"
    )
    hard_label_weight: float = option(
        0.0,
        "method",
        "weight w of the cross-entropy with the labels: the loss is (1 - w) soft + w hard, and 1 needs no teachers",
    )

    # Optimisation
    epochs: int = option(
        180, "optimisation", "number of epochs; fewer for a small set, where neither this nor --recipe is given"
    )
    batch_size: int = option(
        512,
        "optimisation",
        "images per step, over all processes together; fewer for a small set, where neither this nor --recipe is given",
    )
    accumulate: int = option(
        1, "optimisation", "number of parts in which each process computes its share of a batch, to save memory"
    )
    lr: float = option(0.01, "optimisation", "learning rate")
    lr_decay_epochs: tuple[int, ...] = option(
        (100,), "optimisation", "epochs at which the learning rate is multiplied by --lr-decay", metavar="EPOCH"
    )
    lr_decay: float = option(0.1, "optimisation", "factor of each decay")
    momentum: float = option(0.9, "optimisation", "momentum of SGD")
    weight_decay: float = option(0.0, "optimisation", "weight decay")
    optimizer: str = option(
        "sgd",
        "optimisation",
        "torch's fused SGD, or NVIDIA Apex's FusedSGD where it is installed",
        choices=("sgd", "apex-fused-sgd"),
    )
    max_steps: int | None = option(
        None,
        "optimisation",
        "stop after this many steps in total; a later run can go on with the same schedule (default: no limit)",
        metavar="N",
    )

    # Machine
    device: str = option("auto", "machine", "auto uses the GPUs if there are any", choices=("auto", "cuda", "cpu"))
    amp: str = option(
        "auto",
        "machine",
        "mixed precision; auto is bf16 on GPUs that support it, on CPUs with AMX, and on CPUs with "
        "AVX512-BF16 unless the student has depthwise convolutions, and off elsewhere",
        choices=("auto", "bf16", "fp16", "off"),
    )
    compile: bool | None = option(None, "machine", "compile the models with torch.compile (default: on GPUs only)")
    collective_timeout: int = option(
        600, "machine", "seconds after which a process stops waiting for the others", metavar="SECONDS"
    )
    cuda_graphs: str | None = option(
        None,
        "machine",
        "replay the teachers (ensemble) or the whole step (step) as one CUDA graph (default: ensemble on GPUs)",
        choices=("off", "ensemble", "step"),
    )
    tune_teachers: bool | str = option(
        True,
        "machine",
        "measure which memory format suits each teacher on this device, once; again: forget what is remembered; off: "
        "channels-last",
        word="again",
    )

    # Run
    seed: int = option(0, "run", "seed of the views, of CutMix and of random weights")
    run_dir: str = option(
        "",
        "run",
        "folder that the run writes into (default: runs/RECIPE, without a recipe runs/STUDENT-DATA-HASH)",
        metavar="DIR",
    )
    resume: str = option(
        "auto",
        "run",
        "auto continues the run that the run directory holds; never refuses to; RUN, a run directory, continues that "
        "run with its own options, which need not be given; FILE continues from that checkpoint",
        metavar="auto|never|RUN|FILE",
    )
    stage_report: bool = option(
        False, "run", "measure each stage for a second before the first step, as `mealfast forecast` does"
    )
    log_every: int = option(50, "run", "steps between lines in metrics.jsonl and points in TensorBoard")
    checkpoint_every: int = option(1000, "run", "steps between checkpoints; there is always one at the end")
    eval_every: int = option(1, "run", "epochs between evaluations; 0 evaluates only at the start and at the end")
    eval_start: bool = option(True, "run", "evaluate before the first step")
    keep: int = option(2, "run", "number of newest checkpoints to keep, besides best.pt")
    max_bad_steps: int = option(
        20,
        "run",
        "end the run after this many steps in a row with a non-finite loss or gradient; such steps are skipped",
        metavar="N",
    )

    left_open: tuple[str, ...] = field(default=(), compare=False)  # of FITTED; no option

    def __post_init__(self) -> None:
        for option_field in option_fields():
            self._check_choice(option_field)
        for name in (
            "size", "epochs", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep",
            "collective_timeout", "max_bad_steps", "loader_timeout",
        ):  # fmt: skip
            self._refuse(getattr(self, name) < 1, name, "must be 1 or more")
        for name in ("loader_threads", "max_steps", "label_cache_views", "label_cache_top_k"):
            value = getattr(self, name)
            self._refuse(value is not None and value < 1, name, "must be 1 or more")
        for name in ("eval_every", "seed"):
            self._refuse(getattr(self, name) < 0, name, "must be 0 or more")
        self._refuse(self.seed >= 2**63, "seed", "must be below 2^63")
        for name in ("lr", "lr_decay", "momentum", "weight_decay", "discriminator_lr"):
            value = getattr(self, name)
            self._refuse(value is not None and not (math.isfinite(value) and value >= 0), name, "must be 0 or more")
        self._refuse(self.tune_teachers not in (True, False, "again"), "tune_teachers", "must be on, off or again")
        self._refuse(self.momentum >= 1, "momentum", "must be below 1")
        for name in ("flip", "hard_label_weight"):
            self._refuse(not 0 <= getattr(self, name) <= 1, name, "must be between 0 and 1")
        low, high = self.crop_scale
        self._refuse(not 0 < low <= high <= 1, "crop_scale", "must be two areas with 0 < MIN <= MAX <= 1")
        low, high = self.crop_ratio
        self._refuse(
            not (0 < low <= high and math.isfinite(high)), "crop_ratio", "must be two ratios with 0 < MIN <= MAX"
        )
        self._refuse(not 0 < self.val_share < 1, "val_share", "must be more than 0 and less than 1")
        pct = self.eval_crop_pct
        self._refuse(pct is not None and not 0.1 <= pct <= 2, "eval_crop_pct", "must be between 0.1 and 2")
        self._refuse(any(e < 0 for e in self.lr_decay_epochs), "lr_decay_epochs", "must be 0 or more")
        self._check_combinations()

    def _check_choice(self, option_field: Any) -> None:
        choices = option_field.metadata.get("choices")
        value = getattr(self, option_field.name)
        if choices and value is not None:
            self._refuse(value not in choices, option_field.name, f"must be one of {', '.join(choices)}")

    def _check_combinations(self) -> None:
        if self.teachers and self.hard_label_weight == 1:
            raise UsageError(
                "--hard-label-weight 1 trains on labels alone: leave --teachers empty, or lower the weight"
            )
        for name, largest in (("label_cache_views", 1_000_000), ("label_cache_top_k", 4096)):
            value = getattr(self, name)
            self._refuse(value is not None and not self.label_cache, name, "needs --label-cache, the folder to write")
            self._refuse(value is not None and value > largest, name, f"must be at most {largest:,}")
        if self.label_cache and self.hard_label_weight == 1:
            raise UsageError(
                "--hard-label-weight 1 trains on labels alone: leave --label-cache out, or lower the weight"
            )
        if not self.distils and self.hard_label_weight < 1:
            raise UsageError(
                "--teachers names no model: name one or more, or train on labels with --hard-label-weight 1"
            )
        if not self.distils and self.discriminator not in (None, "off"):
            raise UsageError(
                f"--discriminator {self.discriminator} needs teachers: add --teachers, or --discriminator off"
            )
        if self.discriminator_lr is not None and self.discriminator_mode == "off":
            raise UsageError("--discriminator-lr has no effect without a discriminator: leave it out")
        if not self.student:
            raise UsageError("--student names no model: give a model spec, or a --recipe that has one")

    def _refuse(self, bad: bool, name: str, right: str) -> None:
        if bad:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: {right}")

    @property
    def discriminator_mode(self) -> str:
        """The mode in force: the paper's regulariser unless there is no teacher to tell the student from."""
        return self.discriminator or ("cooperative" if self.distils else "off")

    @property
    def live_teachers(self) -> tuple[str, ...]:
        """The teachers that run: none where a label cache holds what they said (all where it is yet to be written)."""
        return () if self.label_cache else self.teachers

    @property
    def distils(self) -> bool:
        """Whether there is a target besides labels: from teachers or from a label cache."""
        return bool(self.teachers or self.label_cache)

    def to_json(self) -> dict[str, Any]:
        """Every option as JSON has it: tuples are lists."""
        values = {name: value for name, value in asdict(self).items() if name != "left_open"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def option_fields() -> list[Field[Any]]:
    """The fields of `Recipe` that are options, in their order."""
    return [one for one in fields(Recipe) if one.metadata]


# Fields that decide neither the weights nor the metrics, only how far a run goes, or what is due from now on: a resumed
# run may change them (more --epochs, not fewer).
RESUMABLE_FIELDS = frozenset(
    {
        "data", "val", "label_cache", "loader_threads", "max_steps", "device", "run_dir", "resume", "checkpoint_every",
        "keep",
        "collective_timeout", "max_bad_steps",
        "cuda_graphs", "tune_teachers", "stage_report", "loader_timeout",
        "epochs", "log_every", "eval_every",
    }
)  # fmt: skip


def _paper(student: str, **changes: Any) -> dict[str, Any]:
    return {"student": student, "teachers": TEACHERS_224, **changes}


# The rows of the paper's tables with timm's pinned names: the fields that differ from `Recipe`'s defaults.
RECIPES: dict[str, dict[str, Any]] = {
    "resnet50-224": _paper("resnet50.ram_in1k"),
    "resnet50-224-cutmix": _paper("resnet50.ram_in1k", cutmix=True),
    "resnet50-380": _paper("resnet50.ram_in1k", teachers=TEACHERS_380, size=380),
    "resnet18-224": _paper("resnet18.tv_in1k"),
    "mobilenetv3-small-075-224": _paper("tf_mobilenetv3_small_075.in1k"),
    "mobilenetv3-small-100-224": _paper("tf_mobilenetv3_small_100.in1k"),
    "mobilenetv3-large-224": _paper("tf_mobilenetv3_large_100.in1k"),
    "efficientnet-b0-224": _paper("tf_efficientnet_b0.aa_in1k"),
    # 32-pixel digits on a laptop's CPU: no flips (a mirrored 2 is no digit), mild crops, float32 on every machine.
    "demo": {
        "student": "test_efficientnet?num_classes=10",
        "size": 32,
        "crop_scale": (0.7, 1.0),
        "flip": 0.0,
        "eval_crop_pct": 1.0,
        "epochs": 16,
        "batch_size": 50,
        "lr": 0.05,
        "lr_decay_epochs": (12,),
        "amp": "off",
        "compile": False,
        "log_every": 24,
        "eval_every": 2,
    },
}


def make_recipe(name: str | None = None, **changes: Any) -> Recipe:
    """The recipe called `name` (None: the defaults) with some fields changed; what of FITTED nothing sets is left open.

    Its run directory is runs/NAME, and without a name one of its own (`own_name`). Raises UsageError.
    """
    if name is not None and name not in RECIPES:
        raise UsageError(f"--recipe {name}: unknown; {alternatives(name, RECIPES)}")
    values = {**(RECIPES[name] if name else {}), **changes}
    if name is None:
        values["left_open"] = tuple(one for one in FITTED if one not in changes)
    recipe = Recipe(**values)
    return recipe if recipe.run_dir else replace(recipe, run_dir=f"runs/{name or own_name(recipe)}")


def own_name(recipe: Recipe) -> str:
    """STUDENT-DATA-HASH: the same for the same command, so that it finds its run again; another where an option differs
    that decides the result, or the data. Fields with their default values do not count: versions may add some."""
    deciding = {
        one.name: getattr(recipe, one.name)
        for one in option_fields()
        if one.name not in RESUMABLE_FIELDS
        and (getattr(recipe, one.name) != one.default or (one.name in FITTED and one.name not in recipe.left_open))
    }
    places = {name: os.path.abspath(path) for name in ("data", "val", "label_cache") if (path := getattr(recipe, name))}
    sha = hashlib.sha256(json.dumps([deciding, places], sort_keys=True).encode("utf-8", "surrogateescape"))
    student = re.split("[?@]", recipe.student)[0].rstrip("/")
    parts = [os.path.basename(one) for one in (student, os.path.abspath(recipe.data) if recipe.data else "")]
    words = [re.sub(r"[^\w.]+", "-", one).strip("-.")[:40] for one in parts]
    return "-".join([*filter(None, words), sha.hexdigest()[:8]])
