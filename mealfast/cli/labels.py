"""`mealfast labels build|import-fkd|info|verify`: run the teachers once, train as many students as you like."""

from __future__ import annotations

import sys
from importlib import import_module

from mealfast.errors import UsageError, alternatives

# Name: (module, function, what it does).
COMMANDS = {
    "build": ("mealfast.cli.labels_build", "build_command", "run the teachers over views of every training image"),
    "import-fkd": ("mealfast.cli.labels_import", "import_command", "make a label cache of the files FKD publishes"),
    "info": ("mealfast.cli.labels_info", "info_command", "describe a label cache"),
    "verify": ("mealfast.cli.labels_verify", "verify_command", "check a label cache's files, and a sample of targets"),
}


def usage() -> str:
    """What `mealfast labels --help` prints."""
    lines = [f"  {name:<11} {help_text}" for name, (_, _, help_text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mealfast labels COMMAND [OPTIONS]",
            "",
            "A label cache keeps the teachers' targets on disk: any number of students train from it.",
            "",
            *lines,
            "",
            "`mealfast labels COMMAND --help` lists a command's options.",
        ]
    )


def labels_command(argv: list[str]) -> int:
    """Runs one of the four; exit status 0. Raises UsageError or DataError."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise UsageError(f"labels {argv[0]}: no such command; {alternatives(argv[0], COMMANDS)}")
    module, function, _ = COMMANDS[argv[0]]
    status: int = getattr(import_module(module), function)(argv[1:])
    return status
