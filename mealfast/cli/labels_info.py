"""`mealfast labels info`: what a label cache holds and what it was made of."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mealfast.cli.options import Parser
from mealfast.machine.files import printable
from mealfast.machine.wording import counted
from mealfast.record.console import size_text

if TYPE_CHECKING:  # importing it takes torch
    from mealfast.loaders import CacheHeader


def make_parser() -> Parser:
    """The options of `mealfast labels info`."""
    parser = Parser(
        prog="mealfast labels info",
        usage="mealfast labels info CACHE [--json]",
        description="Describes a label cache: what it holds, and what it was made from.",
    )
    parser.add_argument("cache", metavar="CACHE", help="folder of the cache")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def info_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises DataError."""
    options = make_parser().parse_args(argv)
    from mealfast.loaders import LabelCache

    found = facts(options.cache, LabelCache(options.cache).header)
    print(json.dumps(found) if options.json else text(found))
    return 0


def facts(folder: str, header: CacheHeader) -> dict[str, Any]:
    """The content of `info --json` on the cache in `folder`."""
    complete = header.complete
    count = max(len(complete), 1)
    return {
        "cache": str(folder),
        "images": header.images,
        "views": header.views,
        "complete_views": len(complete),
        "complete": header.is_complete,
        "top_k": header.top_k,
        "classes": header.classes,
        "temperature": header.temperature,
        "bytes": len(complete) * header.bytes_per_view,
        "bytes_when_complete": header.views * header.bytes_per_view,
        "bytes_per_view_and_image": header.row.itemsize,
        "mean_kept": sum(view.mean_kept for view in complete) / count if complete else None,
        "mean_entropy": sum(view.mean_entropy for view in complete) / count if complete else None,
        "teachers": [dict(teacher) for teacher in header.teachers],
        "plan": header.plan,
        "images_digest": header.images_digest,
        "made_with": header.made_with,
    }


def text(facts: dict[str, Any]) -> str:
    """What `facts` found, for people; a header may come from a stranger, so its text is escaped."""
    plan = facts["plan"]
    lines = [
        f"{printable(facts['cache'])}: {facts['complete_views']} of {counted(facts['views'], 'view')} of "
        f"{counted(facts['images'], 'image')}, top {facts['top_k']} of {counted(facts['classes'], 'class')}",
        f"  {size_text(facts['bytes'])} of {size_text(facts['bytes_when_complete'])}, "
        f"{counted(facts['bytes_per_view_and_image'], 'byte')} a view and image",
        *(
            f"  teacher {printable(teacher['spec'])}  sha256 {printable(teacher['digest'][:16])}"
            for teacher in facts["teachers"]
        ),
        "  views " + "  ".join(f"{name} {plan[name]}" for name in ("seed", "size", "scale", "ratio", "flip"))
        if "seed" in plan
        else "  views of its own crop boxes and flips, which any --size fits",
    ]
    if facts["mean_kept"] is not None:
        lines.append(
            f"  kept by the top {facts['top_k']}: {100 * facts['mean_kept']:.2f}% of the probability; mean entropy "
            f"{facts['mean_entropy']:.3f} nats"
        )
    return "\n".join(lines)
