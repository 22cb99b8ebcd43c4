"""Atomic writes and the escaping of what files say, for all of mealfast; they live in `mealfast.loaders.files`."""

from mealfast.loaders.files import printable, replacing, sync_folder, words, write_json

__all__ = ["printable", "replacing", "sync_folder", "words", "write_json"]
