"""Which output of a model is which class: names are compared, and a number means something only where a name says what.

Shape legend: C outputs, which all models that meet have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mealfast.errors import UsageError
from mealfast.machine.files import brief
from mealfast.machine.wording import counted
from mealfast.models.class_names import Names, check_names, imagenet, natural_order, read_class_map, said

_ALL_SAY = "every model names its classes, or is new"

Order = tuple[int, ...]  # [C]: for each class of the first model, the output of another that means it


@dataclass(frozen=True)
class Named:
    """A model or a label cache, as far as its classes go."""

    what: str  # as a line calls it: "--teachers SPEC"
    classes: Names | None  # of its outputs, in their order; None: not known
    new: bool = False  # its outputs are random and mean nothing yet


@dataclass(frozen=True)
class Agreed:
    """How models and class folders go together."""

    names: Names | None  # of the first model's outputs; None: neither a model nor a folder says
    orders: tuple[Order | None, ...]  # of each model; None: its outputs are the first one's, in the same order
    labels: dict[str, int]  # class folder -> output of the first model
    notes: tuple[str, ...] = ()  # for the user


@dataclass(frozen=True)
class _Tree:
    """What the class folders say."""

    classes: Names | None  # all C, where the folders or a model tell them: in the order that a new model takes
    labels: dict[str, int]  # folder -> place in `classes`
    fixed: bool = False  # output i of every model that says nothing else is classes[i]
    notes: tuple[str, ...] = ()


def agree(
    models: Sequence[Named], outputs: int, folders: Sequence[str], root: Path, class_map: str = ""
) -> Agreed:  # fmt: skip
    """Brings models of C `outputs` each and the class folders of `root` together; the first model's order is the one
    that all are brought into. `class_map` is --class-map: a file, "natural" or "byte", for models that say nothing.

    Raises UsageError where the classes are not the same, or where it cannot be told which output is which class.
    """
    unnamed = any(one.classes is None and not one.new for one in models)
    rule = class_map if class_map in ("natural", "byte") else ""
    if class_map and not rule:
        given = read_class_map(class_map)
        _check_class_map(class_map, given, outputs)
        models = [
            replace(one, classes=given, what=f"{one.what} (--class-map {class_map})")
            if one.classes is None and not one.new
            else one
            for one in models
        ]
    known = [one for one in models if one.classes is not None]
    for one in known:
        _check_known(one, known[0], models, outputs)
    tree = _read(folders, known[0] if known else None, models[0], outputs, root)
    if tree.classes is None:
        return Agreed(None, (None,) * len(models), {})
    first = known[0].classes if tree.fixed and known and models[0].classes is None else None
    names = first or _own(models[0], tree, known, root, rule) or tree.classes
    orders = tuple(_order(_own(one, tree, known, root, rule) or names, names) for one in models)
    by_name = {name: output for output, name in enumerate(names)}
    labels = {folder: by_name[tree.classes[place]] for folder, place in tree.labels.items()}
    unused = () if not class_map or unnamed else (f"note: --class-map {brief(class_map)}: not used; {_ALL_SAY}",)
    return Agreed(names, orders, labels, (*tree.notes, *unused))


def as_before(names: Names, models: int, folders: Sequence[str], root: Path) -> Agreed:
    """How a run goes on whose first model has these names: nothing is decided anew, all outputs are as they were."""
    tree = _read(folders, Named("the run", names), Named("the run", names), len(names), root)
    by_name = {name: output for output, name in enumerate(names)}
    labels = {folder: by_name[(tree.classes or names)[place]] for folder, place in tree.labels.items()}
    return Agreed(names, (None,) * models, labels)


def byte_order(folders: Sequence[str], outputs: int) -> Names:
    """The classes of a run of an earlier mealfast, which knew ImageNet-1k and byte order alone. Raises UsageError."""
    if outputs == len(imagenet()) and set(folders) <= set(imagenet()):
        return imagenet()
    if len(folders) != outputs:
        raise UsageError(f"--data: has {counted(len(folders), 'class folder')}, the run had {outputs}")
    return tuple(sorted(folders))


# -- the rules ---------------------------------------------------------------------------------------------------------


def _read(folders: Sequence[str], known: Named | None, first: Named, outputs: int, root: Path) -> _Tree:
    """What the class folders say, beside the model whose classes are known, if there is one. Raises UsageError."""
    names = known.classes if known else None
    if names is None and outputs == len(imagenet()) and set(folders) <= set(imagenet()) and folders:
        names = imagenet()
    if names is not None and set(folders) <= set(names):  # also where there are none
        classes = tuple(sorted(names))
        place = {name: number for number, name in enumerate(classes)}
        return _Tree(classes, {folder: place[folder] for folder in folders})
    if not folders:
        return _Tree(None, {})
    if numbers := _numbers(folders, outputs):
        return _numbered(numbers, names, outputs, root)
    if known is not None and names is not None:
        other = sorted(set(folders) - set(names))
        hint = f" (?num_classes={len(folders)} gives a student new ones)" if len(folders) != outputs else ""
        raise UsageError(
            f"{root}: class folder {said(other)} is none of the {counted(outputs, 'class')} of {known.what}: "
            f"{said(names)}{hint}"
        )
    if len(folders) != outputs:
        raise UsageError(
            f"{root}: has {counted(len(folders), 'class folder')}, {first.what} has {counted(outputs, 'output')}: they "
            f"must agree (?num_classes={len(folders)} in the spec), or the folders be named by ImageNet wnids, or the "
            "names of all outputs be known (--class-map FILE)"
        )
    classes = tuple(sorted(folders))
    return _Tree(classes, {name: number for number, name in enumerate(classes)})


def _numbers(folders: Sequence[str], outputs: int) -> dict[str, int]:
    """Folder -> output where the folders are plain numbers of outputs, or 1 to C; {} where they are something else."""
    if not all(folder.isascii() and folder.isdigit() and len(folder) < 10 for folder in folders):
        return {}
    numbers = {folder: int(folder) for folder in folders}
    values = sorted(numbers.values())
    if values == list(range(1, outputs + 1)):
        return {folder: number - 1 for folder, number in numbers.items()}
    if len(set(values)) < len(values) or values[-1] >= outputs:
        return {}
    return numbers


def _numbered(numbers: dict[str, int], names: Names | None, outputs: int, root: Path) -> _Tree:
    notes: tuple[str, ...] = ()
    if any(int(folder) != number for folder, number in numbers.items()):
        notes = (f"note: {root}: the class folders 1 to {outputs} are taken as the {outputs} classes in this order",)
    elif sorted(numbers) != sorted(numbers, key=numbers.__getitem__) or len(numbers) < outputs:
        notes = (f"note: {root}: the class folders are numbers, and taken as the numbers of the model's outputs",)
    if names is None:
        texts = {number: folder for folder, number in numbers.items()}
        names = tuple(texts.get(number, str(number)) for number in range(outputs))
    return _Tree(names, numbers, fixed=True, notes=notes)


def _own(model: Named, tree: _Tree, known: Sequence[Named], root: Path, rule: str) -> Names | None:
    """The classes of a model's outputs in their order; None: as the first model has them. Raises UsageError."""
    if model.classes is not None or model.new:
        return model.classes
    classes = tree.classes or ()
    natural = natural_order(classes)
    if rule == "byte":
        return tuple(sorted(classes))
    if rule == "natural" and natural is not None:
        return natural
    if tree.fixed:
        return None
    candidates = {tuple(sorted(classes)), natural, *(one.classes for one in known)}
    if set(classes) == set(imagenet()):
        return imagenet()
    if len(candidates) == 1:
        return tuple(sorted(classes))
    raise UsageError(
        f"{model.what}: does not say which output is which class, and {_example(classes, natural)}; give --class-map "
        "natural (trained by timm), --class-map byte (by torchvision or mealfast), or --class-map FILE with a class "
        "name a line"
    )


def _example(classes: Sequence[str], natural: Names | None) -> str:
    in_bytes = sorted(classes)
    if natural is None or natural == tuple(in_bytes):
        return f"the classes ({said(in_bytes)}) can be numbered in more than one way"
    output = next(n for n, (a, b) in enumerate(zip(in_bytes, natural, strict=True)) if a != b)
    return (
        f"output {output} is {brief(natural[output], 60)} in natural order but {brief(in_bytes[output], 60)} in byte "
        "order"
    )


def _order(own: Names, names: Names) -> Order | None:
    if own == names:
        return None
    place = {name: output for output, name in enumerate(own)}
    return tuple(place[name] for name in names)


def _check_known(one: Named, first: Named, models: Sequence[Named], outputs: int) -> None:
    """Raises UsageError where a model's classes are not those of the first that names its own."""
    theirs, ours = one.classes or (), first.classes or ()
    if len(theirs) != outputs:
        other = next((model.what for model in models if model is not one), "the model")
        raise UsageError(f"{one.what}: is of {counted(len(theirs), 'class')}, but {other} has {outputs:,}")
    if set(ours) == set(theirs):
        return
    both = set(ours) & set(theirs)
    only, lacks = ([name for name in names if name not in both] for names in (theirs, ours))
    parts = [f"only it has {said(only)}"] if only else []
    parts += [f"it lacks {said(lacks)}"] if lacks else []
    raise UsageError(f"{one.what}: its classes are not those of {first.what}: {'; '.join(parts)}")


def _check_class_map(path: str, names: Names, outputs: int) -> None:
    if len(names) != outputs:
        raise UsageError(
            f"--class-map {brief(path)}: holds {counted(len(names), 'name')}, the model has {counted(outputs, 'class')}"
        )
    try:
        check_names(names)
    except ValueError as error:
        raise UsageError(f"--class-map {brief(path)}: {error}") from error
