"""Numbers with their nouns."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """ "1 image", "1,200 images", "2 classes", "0 bytes"; `noun` is the singular of a regular one."""
    if number == 1:
        return f"1 {noun}"
    hisses = noun.endswith(("s", "sh", "ch", "x")) and noun != "epoch"
    return f"{number:,} {noun}{'es' if hisses else 's'}"
