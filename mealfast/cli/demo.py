"""`mealfast demo`: the whole job on real handwritten digits, with the controls that show what distillation adds."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from mealfast.cli import demo_report
from mealfast.cli.demo_data import write_digits
from mealfast.cli.demo_runs import RUNS, run_all
from mealfast.cli.options import Parser
from mealfast.cli.view_options import add_device_option
from mealfast.errors import UsageError


def make_parser() -> Parser:
    """The options of `mealfast demo`."""
    parser = Parser(
        prog="mealfast demo",
        usage="mealfast demo [OPTIONS]",
        description="Distils two teachers into a student on scikit-learn's handwritten digits, in about three minutes "
        "on two CPU cores, and compares it with its start and with students that learn from labels.",
    )
    add = parser.add_argument
    add(
        "--run-dir",
        default="runs/demo",
        metavar="DIR",
        help="folder to write into, anew each time (default: runs/demo)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the split and of every run (default: 0)")
    add("--loader", choices=("dali", "pillow"), default="dali", help="what decodes the images (default: dali)")
    add_device_option(parser)
    add("--json", action="store_true", help="print the content of DIR/demo.json as the last line")
    return parser


def demo_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError."""
    options = make_parser().parse_args(argv)
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed}: must be 0 or more")
    began = time.perf_counter()

    from mealfast.machine import lock  # takes torch, by the loaders' files: not for --help

    folder = Path(options.run_dir)
    with lock.hold(folder):
        _make_room(folder, lock.NAME)
        write_digits(folder / "data", options.seed)
        summaries = _on_one_thread(folder, options)
        result = demo_report.result(summaries, time.perf_counter() - began)
        demo_report.write(folder, result)
    print(demo_report.table(result))
    print(demo_report.what_next(folder))
    if options.json:
        print(json.dumps(result))
    return 0


def _on_one_thread(folder: Path, options: argparse.Namespace) -> demo_report.Summaries:
    """All that computes: at 32 pixels a second thread costs more than it brings."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        summaries = run_all(folder, options.seed, options.loader, options.device)
        demo_report.draw(folder, summaries)
    finally:
        torch.set_num_threads(threads)
    return summaries


def _make_room(folder: Path, lock: str) -> None:
    """Removes what an earlier demo wrote into a folder, held by the file `lock` in it, and nothing else."""
    held = {path.name for path in folder.iterdir()} - {lock}
    if held and not (folder / "data").is_dir():
        raise UsageError(f"--run-dir {folder}: holds something other than a demo; name a new or an empty folder")
    for name in ("data", *RUNS):
        shutil.rmtree(folder / name, ignore_errors=True)
    try:
        for name in demo_report.FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--run-dir {folder}: cannot be written ({error.strerror or error})") from error
