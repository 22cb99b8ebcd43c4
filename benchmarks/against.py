"""Is this working tree slower than a commit? The only comparison that holds on a machine with other work.

    python benchmarks/against.py BASE -- --sizes 224 --batch 32 --student resnet18 --teachers resnet34 resnet26

Installs both beside each other, starts throughput.py of both, with the options after `--`, and has them take turns,
round by round; each pair of processes takes ROUNDS rounds, and then another pair starts, since a process can be a
little fast or slow throughout. Of every round the ratio tree / base counts. Slower is what is slower by more than the
tolerance in the median, in every pair of processes, and in so many rounds that chance does that once in 200 times (a
sign test); the exit status is 1 then. BASE must have throughput.py's --on-request.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from _record import record, write

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("mealfast", "mealfast-replayed", "mealfast-cached")  # what is measured unless --names says otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit, branch or tag to compare with")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of processes (default: 3)")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of a pair (default: 8)")
    parser.add_argument("--tolerance", type=float, default=1.0, help="percent that a median may be slower (default: 1)")
    parser.add_argument("--out", type=Path, help="file to which one JSON line a contender is appended")
    own, options = split(sys.argv[1:])
    args = parser.parse_args(own)
    if min(args.pairs, args.rounds) < 1:
        parser.error("--pairs and --rounds must be 1 or more")
    with tempfile.TemporaryDirectory(prefix="mealfast-against-") as scratch:
        sides = [install(checkout(args.base, Path(scratch) / "base")), install(working_tree(Path(scratch) / "tree"))]
        pairs = []
        for number in range(args.pairs):
            print(f"pair {number + 1} of {args.pairs}", file=sys.stderr, flush=True)
            pairs.append(measure(sides, options, args.rounds))
    rows = [verdict(name, [pair[name] for pair in pairs], args.tolerance) for name in pairs[0]]
    print(table(rows))
    if args.out:
        write(args.out, [record("against", base=args.base, options=options, **row) for row in rows])
    sys.exit(int(any(row["slower"] for row in rows)))


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is before `--`, and after it."""
    place = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


def checkout(commit: str, folder: Path) -> Path:
    """The files of a commit, below `folder`."""
    folder.mkdir()
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"benchmarks/against.py: {commit}: {archive.stderr.decode().strip() or 'no such commit'}")
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    if "--on-request" not in (folder / "benchmarks" / "throughput.py").read_text():
        raise SystemExit(f"benchmarks/against.py: {commit}: its throughput.py has no --on-request; name a later commit")
    return folder


def working_tree(folder: Path) -> Path:
    """The files of this tree as they are, those that git ignores left out."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def install(source: Path) -> Path:
    """Installs the package of a tree into a folder of its own; returns the tree."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", source / "site", source], check=True)
    return source


def measure(sides: Sequence[Path], options: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Contender -> images/s of the tree / images/s of the base, of every round of one pair of processes."""
    ratios: dict[str, list[float]] = {}
    with ExitStack() as stack:
        base, tree = (stack.enter_context(asked(side, options)) for side in sides)
        for number in range(rounds):
            if number % 2 == 0:
                before = base()
                after = tree()
            else:
                after = tree()
                before = base()
            for name, rate in after.items():
                ratios.setdefault(name, []).append(rate / before[name])
    return ratios


@contextmanager
def asked(source: Path, options: Sequence[str]) -> Iterator[Callable[[], dict[str, float]]]:
    """throughput.py of an installed tree, warmed up: a call is one round, images/s by contender."""
    names = [] if "--names" in options else ["--names", *NAMES]
    command = [sys.executable, source / "benchmarks" / "throughput.py", "--on-request", "--no-stages", *options, *names]
    environment = {**os.environ, "PYTHONPATH": str(source / "site")}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=source
    ) as process:
        _answer(process.stdout)  # it is warm

        def call() -> dict[str, float]:
            print(file=process.stdin, flush=True)
            return _answer(process.stdout)

        try:
            yield call
        finally:
            process.kill()


def _answer(stream: IO[str] | None) -> dict[str, float]:
    assert stream is not None
    for line in stream:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("benchmarks/against.py: throughput.py ended; what it said is above")


def verdict(name: str, pairs: Sequence[Sequence[float]], tolerance: float) -> dict[str, object]:
    """Median and quartiles of the ratios of all pairs of processes, and whether they say that the tree is slower."""
    ratios = [ratio for pair in pairs for ratio in pair]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    losses = sum(ratio < 1 for ratio in ratios)
    by_chance = sum(math.comb(len(ratios), k) for k in range(losses, len(ratios) + 1)) / 2 ** len(ratios)
    throughout = all(statistics.median(pair) < 1 for pair in pairs)
    slower = middle < 1 - tolerance / 100 and throughout and by_chance < 0.005
    return {
        "contender": name, "ratio": round(middle, 4), "p25": round(low, 4), "p75": round(high, 4),
        "rounds": len(ratios), "lost": losses, "slower": slower,
    }  # fmt: skip


def table(rows: Sequence[dict[str, object]]) -> str:
    """As Markdown."""
    lines = ["| contender | tree / base | quartiles | rounds lost | |", "|---|---|---|---|---|"]
    for row in rows:
        spread, lost = f"{row['p25']:.3f} to {row['p75']:.3f}", f"{row['lost']} of {row['rounds']}"
        word = "**slower**" if row["slower"] else ""
        lines.append(f"| {row['contender']} | {row['ratio']:.3f} | {spread} | {lost} | {word} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
