"""Which output of student, teachers and label cache is which class of a run, and which folder of its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mealfast.errors import UsageError
from mealfast.loaders import LabelCache
from mealfast.method.data import Splits
from mealfast.models import normalised as models
from mealfast.models.class_order import Agreed, Named, Order, agree, as_before, byte_order
from mealfast.recipe import Recipe
from mealfast.training.resume import Found


def agree_on_classes(
    recipe: Recipe,
    found: Splits,
    student: models.NormalizedModel,
    teachers: Sequence[models.NormalizedModel],
    label_cache: LabelCache | None,
    checkpoint: Found | None,
) -> Agreed:
    """Brings all into the student's order: the models, in place, and the cache. A run that goes on keeps what it had.

    The result's orders are of teachers and cache. Raises UsageError where classes differ or cannot be told.
    """
    folders, root = found.train.classes or found.val.classes, Path(recipe.data)
    others, outputs = len(teachers) + (label_cache is not None), student.num_classes
    if checkpoint is None:
        agreed = agree(_all(recipe, student, teachers, label_cache), outputs, folders, root, recipe.class_map)
        orders = agreed.orders[1:]
    else:
        names = checkpoint.classes or byte_order(folders, outputs)  # an earlier mealfast kept none
        agreed = as_before(names, 1 + others, folders, root)
        orders = checkpoint.orders or (None,) * others
    if len(orders) != others or not all(order is None or _is_order(order, outputs) for order in orders):
        raise UsageError(f"{checkpoint.what if checkpoint else ''}: is damaged (its order of classes)")
    student.take_order(None, agreed.names)
    for teacher, order in zip(teachers, orders, strict=False):
        teacher.take_order(order, agreed.names)
    if label_cache is not None:
        label_cache.renumber(None if orders[-1] is None else np.argsort(orders[-1]).tolist())
    return Agreed(agreed.names, orders, agreed.labels, agreed.notes)


def _all(
    recipe: Recipe,
    student: models.NormalizedModel,
    teachers: Sequence[models.NormalizedModel],
    label_cache: LabelCache | None,
) -> list[Named]:
    everything = [models.named(f"--student {recipe.student}", student)]
    everything += [
        models.named(f"--teachers {spec}", one) for spec, one in zip(recipe.teachers, teachers, strict=False)
    ]
    if label_cache is not None:
        everything.append(Named(f"--label-cache {recipe.label_cache}", label_cache.header.class_names))
    return everything


def _is_order(order: Order, outputs: int) -> bool:
    return all(type(one) is int for one in order) and sorted(order) == list(range(outputs))
