"""Several files as one manifest, merged left to right as Docker Compose merges its own.

Mappings merge key by key; a scalar or a list replaces what earlier files say. (Compose appends to some lists; here none
is, so that what a list holds is always to be read in one place.) `!reset` takes a key of earlier files away,
`!override` replaces a mapping instead of merging into it. A key without a value changes nothing, as everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runner.errors import Diagnostic
from runner.manifest.suggest import suggest
from runner.manifest.tree import KeyPath, Place, Problem, Tree, diagnostic_at, dotted
from runner.manifest.walk import OVERRIDE, RESET


def merge(trees: Sequence[Tree]) -> Tree:
    """The trees as one, with the place of everything in its own file. The first becomes the result."""
    base = trees[0]
    for path, tag in base.tags.items():
        if tag == RESET:
            base.wrong.append(_nothing_to_reset(base.values[path], path))
    for over in trees[1:]:
        base.sources += over.sources
        _Merge(base, over).value((), base.data, over.data)
        base.wrong += over.wrong
        base.warnings += over.warnings
    return base


def _nothing_to_reset(place: Place, path: KeyPath, hint: str = "") -> Diagnostic:
    message = f"no earlier file says {dotted(path)}, so there is nothing to reset"
    return diagnostic_at(place, Problem("E114", path, message, hint or "remove it"))


class _Merge:
    """Merges one tree into another. Methods take a path and its data on both sides."""

    def __init__(self, base: Tree, over: Tree) -> None:
        self._base = base
        self._over = over

    def value(self, path: KeyPath, base: Any, over: Any) -> None:
        if isinstance(base, dict) and isinstance(over, dict) and self._over.tags.get(path) != OVERRIDE:
            for key, value in over.items():
                self._key((*path, key), base, value)
            return
        self._drop(path, base)
        self._adopt(path, over)
        self._base.set(path, over)

    def _key(self, path: KeyPath, base: dict[str, Any], value: Any) -> None:
        key = str(path[-1])
        if self._over.tags.get(path) == RESET:
            if key in base:
                self._drop(path, base.pop(key))
            else:
                self._base.wrong.append(_nothing_to_reset(self._over.values[path], path, suggest(key, base)))
        elif key not in base:
            base[key] = value
            self._adopt(path, value)
        elif value is None:
            self._changes_nothing(path, base[key])
        else:
            if _has_short_form(path) and isinstance(value, dict) != isinstance(base[key], dict):
                base[key] = _long_form(self._base, path, base[key])
                value = _long_form(self._over, path, value)
            self.value(path, base[key], value)

    def _changes_nothing(self, path: KeyPath, base: Any) -> None:
        if base is None:
            return
        message = "has no value, so it changes nothing of what earlier files say"
        problem = Problem("W101", path, message, f"write {path[-1]}: !reset to take it away")
        found = diagnostic_at(self._over.keys[path], problem)
        self._base.warnings.append(found._replace(severity="warning"))

    def _adopt(self, path: KeyPath, data: Any) -> None:
        """Take over the places of what is new."""
        base, over = self._base, self._over
        base.values[path] = over.values[path]
        if path in over.keys:
            base.keys[path] = over.keys[path]
        if path in over.references:
            base.references[path] = over.references[path]
        if over.tags.get(path) == RESET:
            base.wrong.append(_nothing_to_reset(over.values[path], path))
        for part in _parts(data):
            self._adopt((*path, part), data[part])

    def _drop(self, path: KeyPath, data: Any) -> None:
        """Forget the places of what is replaced."""
        for places in (self._base.keys, self._base.values):
            places.pop(path, None)
        self._base.references.pop(path, None)
        for part in _parts(data):
            self._drop((*path, part), data[part])


def _parts(data: Any) -> Sequence[Any]:
    if isinstance(data, dict):
        return list(data)
    return range(len(data)) if isinstance(data, list) else ()


def _has_short_form(path: KeyPath) -> bool:
    return len(path) == 4 and path[0] == "models" and path[2] == "adapters" and path[3] != "from"


def _long_form(tree: Tree, path: KeyPath, value: Any) -> Any:
    """`pirate: ./pirate` as `pirate: {source: ./pirate}`, so that it merges with what says more."""
    if not isinstance(value, str):
        return value
    inner = (*path, "source")
    tree.values[inner] = tree.values[path]
    tree.keys[inner] = tree.values[path]
    if path in tree.references:
        tree.references[inner] = tree.references.pop(path)
    return {"source": value}
