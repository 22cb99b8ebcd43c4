"""Numbers with their nouns."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """ "1 image", "1,200 images", "2 classes", "3 epochs"; `noun` is the singular of a regular one."""
    if number == 1:
        return f"1 {noun}"
    hisses = noun.endswith(("s", "sh", "ch", "x")) and noun != "epoch"  # whose ch is a k
    return f"{number:,} {noun}{'es' if hisses else 's'}"
