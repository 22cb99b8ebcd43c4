"""README.md of an exported model: what it is, what it reaches, what it was made from, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from mealfast.downstream.trained import Trained, data_config
from mealfast.machine.files import brief, words

_FRONT = """\
---
tags:
- image-classification
- timm
- mealfast
pipeline_tag: image-classification
library_name: {library}
---
"""


def card(trained: Trained, library: str, usage: str, directory: str) -> str:
    """The whole text. `usage` is its code; DIR, ARCHITECTURE, CLASSES and S in it are filled in."""
    teachers = _teachers(trained)
    how = "distilled from an ensemble of teachers (MEAL V2)" if teachers else "trained"
    title = f"{trained.model.architecture}, {how} by mealfast" if trained.config else trained.model.architecture
    usage = usage.replace("DIR", directory).replace("ARCHITECTURE", trained.model.architecture)
    usage = usage.replace("CLASSES", str(trained.model.num_classes))
    sections = {
        "": _facts(trained),
        "How to load it": [usage],
        "Scores": _scores(trained.summary),
        "Teachers": teachers,
        "Data": _data(trained.config),
        "Made with": _versions(trained.config),
    }
    text = [_FRONT.format(library=library), f"# {_plain(title)}\n\n"]
    for heading, lines in sections.items():
        if lines:
            text.append((f"\n## {heading}\n\n" if heading else "") + "\n".join(lines) + "\n")
    return "".join(text)


def _plain(value: object) -> str:
    """Text from files for a line of Markdown: one line, and nothing in it that Markdown or HTML would act on."""
    text = brief(words(value))
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(c, c) for c in text)


def without_folder(spec: str) -> str:
    """A model spec whose file is named without its folder: where it lay is nobody else's business."""
    name, at, path = spec.partition("@")
    return f"{name}{at}{PurePath(path).name}"


def _facts(trained: Trained) -> list[str]:
    data, size = data_config(trained), trained.views.size
    classes = f"- {trained.model.num_classes} classes"
    if trained.model.classes is not None:
        shown = ", ".join(_plain(name) for name in trained.model.classes[:10])
        classes += f": {shown}" + (", ..." if len(trained.model.classes) > 10 else "")
    arguments = "".join(
        f", {_plain(key)} {_plain(value)}" for key, value in trained.model.kwargs.items() if key != "num_classes"
    )
    return [
        f"- architecture: timm's {_plain(trained.model.architecture)}{arguments}",
        classes,
        f"- input: RGB, {size} x {size} pixels; the shorter side is resized to {trained.views.resize} pixels "
        f"({trained.views.interpolation}), then the centre is cropped",
        f"- mean {words(data['mean'])}, std {words(data['std'])} of pixels in [0, 1]",
    ]


def _scores(summary: Mapping[str, Any]) -> list[str]:
    """A table of summary.json; what in it is no score is left out."""
    rows: list[tuple[str, Any]] = [
        ("this model", summary.get("final")),
        ("its start", summary.get("start")),
        ("the teachers' ensemble", summary.get("ensemble")),
    ]
    teachers = summary.get("teachers")
    for teacher in teachers if isinstance(teachers, list) else []:
        if isinstance(teacher, dict):
            rows.append((_plain(without_folder(str(teacher.get("model")))), teacher))
    lines = [
        f"| {name} | {row['top1']:.2f} | {row['top5']:.2f} | {row['images']:,} |"
        for name, row in rows
        if isinstance(row, dict) and all(type(row.get(key)) in (int, float) for key in ("top1", "top5", "images"))
    ]
    return ["| on the run's val/ | top-1 % | top-5 % | images |", "|---|---|---|---|", *lines] if lines else []


def _teachers(trained: Trained) -> list[str]:
    digests = trained.config.get("teacher_digests")
    found = digests.items() if isinstance(digests, dict) else ()
    return [f"- {_plain(without_folder(spec))}, weights' SHA-256 {_plain(digest)}" for spec, digest in found]


def _data(config: Mapping[str, Any]) -> list[str]:
    counts, digests = config.get("images"), config.get("image_digests")
    if not isinstance(counts, dict) or not isinstance(digests, dict):
        return []
    return [f"- {_plain(part)}: {_plain(counts[part])} images, digest {_plain(digests.get(part))}" for part in counts]


def _versions(config: Mapping[str, Any]) -> list[str]:
    versions = config.get("versions")
    if not isinstance(versions, dict):
        return []
    named = {"mealfast": config.get("mealfast"), **{name: versions.get(name) for name in ("torch", "timm")}}
    return ["- " + ", ".join(f"{name} {_plain(version)}" for name, version in named.items())]
