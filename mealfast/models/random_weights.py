"""Random weights only where they are wanted: a teacher that knows nothing spoils a run without a word."""

from __future__ import annotations

from collections.abc import Sequence

import timm

from mealfast.errors import UsageError
from mealfast.machine.files import brief
from mealfast.models.spec import ModelSpec, parse

ASKED = "weights=random"  # the key of a spec that asks for them


def require_weights(specs: Sequence[str], option: str) -> None:
    """Refuses a spec that names no weights and does not ask for random ones: the tag that timm takes by default is
    proposed. Raises UsageError, which begins with `option`."""
    for text in specs:
        spec = parse(text)
        if spec.tag or spec.checkpoint or spec.random or not timm.is_model(spec.architecture):
            continue  # what is no architecture is refused when it is built, or is a file
        raise UsageError(
            f"{option} {brief(text)}: names no weights; {_proposal(spec)} For random weights say "
            f"{brief(text)}{'&' if '?' in text else '?'}{ASKED}"
        )


def _proposal(spec: ModelSpec) -> str:
    name, query, arguments = spec.text.partition("?")
    config = timm.models.get_pretrained_cfg(spec.architecture)
    if config is None or not config.tag or config.tag not in _tags(spec.architecture):
        return f"give a checkpoint as {brief(spec.text)}@FILE."
    return f"did you mean {brief(f'{name}.{config.tag}{query}{arguments}')}, or a checkpoint, {brief(spec.text)}@FILE?"


def _tags(architecture: str) -> list[str]:
    return [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
