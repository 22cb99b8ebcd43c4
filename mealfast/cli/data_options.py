"""The options that say which images of `--data` are trained on, for commands that take no recipe."""

from __future__ import annotations

import argparse

from mealfast.errors import UsageError
from mealfast.recipe import VAL_SHARE


def add_val_options(parser: argparse._ActionsContainer) -> None:
    """Adds --val and --val-share, as `mealfast train` has them."""
    parser.add_argument(
        "--val", default="", metavar="DIR", help="folder of validation images, as `mealfast train` was given it"
    )
    parser.add_argument(
        "--val-share", type=float, metavar="S",
        help="share that `mealfast train` keeps for validation, where there is no folder of such images (default: "
        f"{VAL_SHARE:g})",
    )  # fmt: skip


def check_val_share(options: argparse.Namespace) -> None:
    """Raises UsageError for a share that leaves nothing on one side."""
    if options.val_share is not None and not 0 < options.val_share < 1:
        raise UsageError(f"--val-share {options.val_share:g}: must be more than 0 and less than 1")
