"""What a manifest may say already, but this version cannot do yet.

It is refused, never ignored. Whoever builds one of these deletes its line here, and nothing else in this room.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from runner.manifest.tree import KeyPath, Problem

# (path, with * for any key or index; values that are refused, or None for all)
NOT_YET: Final[tuple[tuple[str, tuple[str, ...] | None], ...]] = (("servers.*.apis.*", ("admin",)),)


def not_yet(data: Any) -> Iterator[Problem]:
    """A problem for everything in `data` that has to wait."""
    for pattern, refused in NOT_YET:
        for path, value in _matches(data, tuple(pattern.split(".")), ()):
            if refused is None or value in refused:
                what = path[-1] if refused is None else value
                message = f'"{what}" is not supported yet by this version'
                yield Problem("E401", path, message, "remove it", at_key=refused is None)


def _matches(data: Any, pattern: tuple[str, ...], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if not pattern:
        if data is not None:
            yield path, data
        return
    key, rest = pattern[0], pattern[1:]
    if isinstance(data, list):
        if key == "*":
            for index, child in enumerate(data):
                yield from _matches(child, rest, (*path, index))
    elif isinstance(data, dict):
        for child_key in data if key == "*" else (key,) if key in data else ():
            yield from _matches(data[child_key], rest, (*path, child_key))
