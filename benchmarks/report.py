"""The results of benchmarks as tables for reading, a plot, and a section of a page (docs/speed.md has it).

    python benchmarks/report.py RESULTS.jsonl [MORE.jsonl ...] [--plot FILE.png] [--readme docs/speed.md]

    python benchmarks/report.py RESULTS.jsonl --against COMMIT|FILE [--tolerance 5]

Reads what throughput.py and loaders.py wrote with `--out`: results are appended there, and none is replaced. Figures of
different hardware, size or batch are kept apart; in tables the newest counts where one was measured more than once, in
`--history` all of them, over time. `--readme` replaces what lies between the lines `<!-- benchmarks -->` and
`<!-- /benchmarks -->`. `--against` compares the newest figures with those of a commit in RESULTS, or with those in
another file: slower, and exit status 1, is what is slower by more than the tolerance, beyond what the baseline has lost
from one run to the other, and whose quartiles lie apart.
Figures of other hardware or versions are not compared. On a machine with other work only against.py can tell.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
CONTENDERS = ("baseline", "timm-style", "mealfast", "mealfast-replayed", "models-alone", "mealfast-cached")
LOADERS = ("bare-dali", "mealfast-dali", "mealfast-pillow", "torchvision", "torchvision-uint8")
WORDS = {
    "baseline": "the paper's way: Pillow, float32, NCHW, eager",
    "timm-style": "timm-style loop: autocast, channels-last, the same teachers",
    "mealfast": "**mealfast**",
    "mealfast-replayed": "mealfast, one batch in memory",
    "models-alone": "the models' passes alone, without loss and optimiser",
    "mealfast-cached": "mealfast from a label cache (no teacher runs)",
    "bare-dali": "bare DALI pipeline (file reader, random crop)",
    "mealfast-dali": "**mealfast, DALI**",
    "mealfast-pillow": "mealfast, Pillow",
    "torchvision": "torchvision ImageFolder, as many workers as cores",
    "torchvision-uint8": "the same, normalised by the model",
}

VERSIONS = ("gpu", "driver", "cuda", "cpu", "cores", "torch", "triton", "precision", "compiled", "cuda_graph")

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of JSON lines")
    parser.add_argument("--plot", type=Path, help="bars of images/s, as PNG or SVG")
    parser.add_argument("--history", type=Path, help="images/s over time, a line a contender, as PNG or SVG")
    parser.add_argument("--against", metavar="COMMIT|FILE", help="compare with an earlier result")
    parser.add_argument("--tolerance", type=float, default=5.0, help="percent that may be lost (default: 5)")
    parser.add_argument("--readme", type=Path, help="file whose benchmark section is written anew")
    args = parser.parse_args()
    rows = [row for path in args.results for row in read(path)]
    if args.against:
        text, slower = compare(rows, args.against, args.tolerance)
        print(text)
        sys.exit(int(slower))
    text = "\n\n".join(tables(rows))
    print(text)
    if args.plot:
        plot(rows, args.plot)
    if args.history:
        history(rows, args.history)
    if args.readme:
        fill(args.readme, text)


def read(path: Path) -> list[Row]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks/report.py: {path}: cannot be read as JSON lines ({error})") from None
    # What the other benchmarks measured, they print in tables of their own.
    return [row for row in rows if row["name"] in (*CONTENDERS, *LOADERS) or row["name"].startswith("stage: ")]


def tables(rows: Iterable[Row]) -> list[str]:
    """One Markdown table a kind, hardware, size and batch."""
    found = []
    for (kind, *_), group in groups(rows).items():
        base = {"step": "baseline", "stage": "stage: step, one batch replayed", "loader": "torchvision"}[kind]
        reference = group.get(base)
        title = {"step": "training step", "stage": "stage of the step", "loader": "loader"}[kind]
        last = {"stage": "share of the step"}.get(kind, f"x {base}")
        lines = [heading(kind, next(iter(group.values()))), "", f"| {title} | images/s | quartiles | {last} |"]
        lines.append("|---|---|---|---|")
        for name, row in group.items():
            words = WORDS.get(name, name.removeprefix("stage: "))
            if name == "baseline":  # which is as precise as the process lets it be
                words = words.replace("float32", row["precision"])
            ratio = "" if reference is None else relation(kind, row, reference)
            low, high = row["spread"]["p25"], row["spread"]["p75"]
            lines.append(f"| {words} | {row['images_per_second']:,.1f} | {low:,.1f} to {high:,.1f} | {ratio} |")
        found.append("\n".join(lines))
    return found


def relation(kind: str, row: Row, reference: Row) -> str:
    ratio = ratio_of(row, reference)
    return f"{100 / ratio:.0f}%" if kind == "stage" else f"{ratio:.2f}"


def groups(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """Rows by (kind, hardware, size, batch, models), within each by name in the tables' order; the newest wins."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        name = row["name"]
        kind = "stage" if name.startswith("stage: ") else "loader" if name in LOADERS else "step"
        models = (row.get("student"), *row.get("teachers", ()))
        key = (kind, hardware(row), row["size"], row.get("batch", row.get("batch_size")), models)
        found.setdefault(key, {})[name] = row
    order = {name: number for number, name in enumerate((*CONTENDERS, *LOADERS))}
    return {key: dict(sorted(group.items(), key=lambda item: order.get(item[0], 0))) for key, group in found.items()}


def compare(rows: list[Row], against: str, tolerance: float) -> tuple[str, bool]:
    """A Markdown table of the newest rows beside those of a commit or file, and whether one is slower."""
    if Path(against).is_file():
        old, new = read(Path(against)), rows
    else:
        old = [row for row in rows if of_commit(row, against)]
        new = [row for row in rows if not of_commit(row, against)]
    before, after = groups(old), groups(new)
    lines = ["| | before | now | now / before | |", "|---|---|---|---|---|"]
    any_slower, others = False, set()
    for key in before.keys() & after.keys():
        # What the baseline of the same runs has lost, the machine has lost.
        baselines = [group["baseline"] for group in (after[key], before[key]) if "baseline" in group]
        drift = min(1.0, ratio_of(*baselines)) if len(baselines) == 2 else 1.0
        for name, row in after[key].items():
            then = before[key].get(name, {})
            others.update(differing := [what for what in VERSIONS if then and row.get(what) != then.get(what)])
            if differing or not then:
                continue
            ratio = ratio_of(row, then)
            apart = row["spread"]["p75"] < then["spread"]["p25"]
            slower = name != "baseline" and apart and ratio < drift * (1 - tolerance / 100)
            any_slower |= slower
            where = f"{name}, {row['size']} px, batch {row.get('batch', row.get('batch_size'))}"
            then_and_now = f"{then['images_per_second']:,.1f} | {row['images_per_second']:,.1f}"
            lines.append(f"| {where} | {then_and_now} | {ratio:.3f} | {'**slower**' if slower else ''} |")
    if len(lines) == 2:
        why = f"they differ in {', '.join(sorted(others))}" if others else "none has the hardware and models of another"
        raise SystemExit(f"benchmarks/report.py: --against {against}: no two results can be compared: {why}")
    return "\n".join(lines), any_slower


def ratio_of(row: Row, reference: Row) -> float:
    """Images/s of one by the other's."""
    return row["images_per_second"] / reference["images_per_second"]


def of_commit(row: Row, commit: str) -> bool:
    """Whether a row is of the commit that this begins to name; `git describe` writes v1-3-gCOMMIT."""
    own = (row.get("commit") or "").rpartition("-g")[2]
    return bool(own) and (own.startswith(commit) or commit.startswith(own))


def hardware(row: Row) -> str:
    return row["gpu"] or f"{row['cores']} cores of {row['cpu']}"


def heading(kind: str, row: Row) -> str:
    batch = row.get("batch", row.get("batch_size"))
    models = f", student {row['student']}, teachers {' + '.join(row['teachers'])}" if "student" in row else ""
    # The baseline is float32 whatever mealfast computes in: its rows say so.
    precision = f", {row['precision']}" if kind == "stage" else ""
    driver = f", driver {row['driver']}" if row.get("driver") else ""
    return (
        f"{hardware(row)}{driver}, torch {row['torch'].partition('+')[0]}, {row['size']} px, batch {batch}"
        f"{precision}{models} ({row['date'][:10]}, commit {row['commit']}):"
    )


def plot(rows: Iterable[Row], path: Path) -> None:
    """Bars of the training steps, a panel a hardware, size and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {key: group for key, group in groups(rows).items() if key[0] == "step"}
    if not panels:
        raise SystemExit("benchmarks/report.py: --plot: the results hold no training step")
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 0.9 + 2.4 * len(panels)), squeeze=False)
    for axis, group in zip(axes[:, 0], panels.values(), strict=True):
        names = list(group)[::-1]
        values = [group[name]["images_per_second"] for name in names]
        low = [group[name]["images_per_second"] - group[name]["spread"]["p25"] for name in names]
        high = [group[name]["spread"]["p75"] - group[name]["images_per_second"] for name in names]
        colours = ["#c1440e" if name.startswith("mealfast") else "#8a8a8a" for name in names]
        bars = axis.barh(names, values, xerr=[low, high], color=colours, error_kw={"elinewidth": 1})
        axis.bar_label(bars, [f" {value:,.0f}" for value in values], padding=4, fontsize=8)
        axis.margins(x=0.12)
        row = next(iter(group.values()))
        axis.set_title(f"{hardware(row)}, {row['size']} px, batch {row['batch']}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("images/s, median and quartiles")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def history(rows: Iterable[Row], path: Path) -> None:
    """Images/s of every measurement of a step over time, a panel a hardware, size and batch, a line a contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.dates
    import matplotlib.pyplot as plt

    panels: dict[tuple, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        for key in groups([row]):
            if key[0] == "step":
                panels.setdefault(key, {}).setdefault(row["name"], []).append(row)
    if not panels:
        raise SystemExit("benchmarks/report.py: --history: the results hold no training step")
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 0.9 + 2.8 * len(panels)), squeeze=False)
    for axis, (key, lines) in zip(axes[:, 0], panels.items(), strict=True):
        for name, measured in lines.items():
            dates = matplotlib.dates.date2num([datetime.fromisoformat(row["date"]) for row in measured])
            values = [row["images_per_second"] for row in measured]
            below = [row["images_per_second"] - row["spread"]["p25"] for row in measured]
            above = [row["spread"]["p75"] - row["images_per_second"] for row in measured]
            axis.errorbar(dates, values, yerr=[below, above], marker="o", markersize=3, capsize=2, label=name)
        axis.xaxis_date()
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
        axis.set_title(f"{key[1]}, {key[2]} px, batch {key[3]}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_ylabel("images/s, median and quartiles")
    figure.autofmt_xdate()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def fill(readme: Path, text: str) -> None:
    """Replaces the benchmark section of a page."""
    before = readme.read_text(encoding="utf-8")
    head, start, rest = before.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"benchmarks/report.py: --readme {readme}: has no lines {START} and {END}")
    readme.write_text(f"{head}{START}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
