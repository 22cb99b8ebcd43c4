"""Curves of one or more runs from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mealfast.errors import UsageError
from mealfast.machine.files import parsed_object, replacing


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The "eval" lines of a run's metrics.jsonl. Raises UsageError if there are none, or some are no evaluation's."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"{run}: is no run directory (it has no metrics.jsonl)")
    try:
        lines = [parsed_object(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"{path}: is damaged") from error
    found = [line for line in lines if line.get("kind") == "eval"]
    if not all(map(_is_evaluation, found)):
        raise UsageError(f"{path}: is damaged (its evaluations)")
    if not found:
        raise UsageError(f"{path}: holds no evaluation yet")
    return found


def _is_evaluation(line: dict[str, Any]) -> bool:
    return (
        type(line.get("step")) is int
        and isinstance(line.get("top1"), (int, float))
        and (line.get("kl", "") is None or isinstance(line.get("kl"), (int, float)))
    )


def draw_curves(runs: Mapping[str, list[dict[str, Any]]], out: Path, levels: Mapping[str, float] | None = None) -> None:
    """Writes a figure: top-1 (percent) against steps, `levels` as dashed lines, and KL (nats) where there is one.

    `runs`: evaluations, as `read_evaluations` gives them, by the name of their curve. Raises UsageError without
    matplotlib; OSError.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install 'mealfast[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with_kl = {name: [line for line in lines if line["kl"] is not None] for name, lines in runs.items()}
    with_kl = {name: lines for name, lines in with_kl.items() if lines}
    figure, axes = pyplot.subplots(1, 1 + bool(with_kl), figsize=(6 + 5 * bool(with_kl), 4.2), squeeze=False)
    colours = {name: f"C{number}" for number, name in enumerate(runs)}
    _curves(axes[0][0], runs, "top1", "validation top-1, %", colours)
    for number, (name, level) in enumerate((levels or {}).items()):
        axes[0][0].axhline(
            level, linestyle="--", linewidth=1, color=f"C{len(runs) + number}", label=f"{name} {level:.1f}"
        )
    axes[0][0].legend(fontsize=8)
    if with_kl:
        _curves(axes[0][1], with_kl, "kl", "KL to the ensemble on validation images, nats", colours)
        axes[0][1].set_ylim(bottom=0)
        axes[0][1].legend(fontsize=8)
    figure.tight_layout()
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=150, format=out.suffix[1:])
    pyplot.close(figure)


def _curves(
    axis: Any, runs: Mapping[str, list[dict[str, Any]]], key: str, title: str, colours: Mapping[str, str]
) -> None:
    for name, lines in runs.items():
        steps, values = [line["step"] for line in lines], [line[key] for line in lines]
        axis.plot(steps, values, marker="o", markersize=3, label=f"{name} {values[-1]:.3g}", color=colours[name])
    axis.set_xlabel("optimiser steps")
    axis.set_ylabel(title)
    axis.grid(alpha=0.3)
