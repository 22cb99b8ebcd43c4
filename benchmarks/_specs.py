"""Models for measurements: an architecture alone stands for its random weights, whose speed is the same."""

from mealfast.models.random_weights import ASKED
from mealfast.models.spec import parse


def bare(text: str) -> str:
    """The same without `weights=random`, as results name models."""
    return text.replace(f"?{ASKED}", "").replace(f"&{ASKED}", "")


def measured(spec: str) -> str:
    """The spec, with `weights=random` where it names none."""
    parsed = parse(spec)
    if parsed.tag or parsed.checkpoint or parsed.random:
        return spec
    return f"{spec}{'&' if '?' in spec else '?'}{ASKED}"
