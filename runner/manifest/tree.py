"""A manifest as plain data that remembers where everything in it was written: in one file, or in several, merged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from runner.errors import Diagnostic
from runner.manifest.source import Source

KeyPath = tuple[str | int, ...]
"""Where something is in the document: keys, and indices of lists."""


class Place(NamedTuple):
    """A place in a file; line and column count from 1."""

    source: Source
    line: int
    column: int


class Problem(NamedTuple):
    """Something wrong at a path; `at_key` points at the key rather than at its value. Codes are in `codes.toml`."""

    code: str
    path: KeyPath
    message: str
    hint: str = ""
    at_key: bool = False


class Variable(NamedTuple):
    """A scalar that was interpolated: its text in the document, and what it came to."""

    text: str
    value: str


@dataclass(slots=True)
class Tree:
    """`sources` are the files that the data is from, in the order of the merge.

    `keys` and `values` give the place of each key and value. `references` are the scalars with a `$` that are still as
    they were written, `variables` those that were filled in, `problems` those that could not be. `tags` are the
    `!reset` and `!override` that the next merge is told, `found` the adapters that no one wrote (`adapter_folders`).
    `wrong` and `warnings` are what was noticed on the way.
    """

    sources: tuple[Source, ...]
    data: Any = field(default=None, repr=False)
    keys: dict[KeyPath, Place] = field(default_factory=dict, repr=False)
    values: dict[KeyPath, Place] = field(default_factory=dict, repr=False)
    references: dict[KeyPath, str] = field(default_factory=dict, repr=False)
    variables: dict[KeyPath, Variable] = field(default_factory=dict, repr=False)
    problems: list[Problem] = field(default_factory=list, repr=False)
    tags: dict[KeyPath, str] = field(default_factory=dict, repr=False)
    found: set[KeyPath] = field(default_factory=set, repr=False)
    wrong: list[Diagnostic] = field(default_factory=list, repr=False)
    warnings: list[Diagnostic] = field(default_factory=list, repr=False)

    def diagnostic(self, problem: Problem) -> Diagnostic:
        """A problem with its place in the file."""
        return diagnostic_at(self.place(problem.path, key=problem.at_key), problem)

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """Where `path` is, or the nearest thing above it that is in the document."""
        while path:
            found = (self.keys.get(path) if key else None) or self.values.get(path)
            if found is not None:
                return found
            path = path[:-1]
        return self.values.get((), Place(self.sources[0], 0, 0))

    def folder(self, path: KeyPath) -> Path:
        """Where relative paths start that are written at `path`: the folder of their file."""
        return self.place(path).source.path.parent

    def set(self, path: KeyPath, value: Any) -> None:
        """Put another value at a path that is there."""
        if not path:
            self.data = value
            return
        parent = self.data
        for part in path[:-1]:
            parent = parent[part]
        parent[path[-1]] = value

    def in_order(self, found: list[Diagnostic]) -> list[Diagnostic]:
        """Each diagnostic once: file by file as they were merged, others last, and down each file."""
        rank = {source.name: at for at, source in reversed(list(enumerate(self.sources)))}
        return sorted(dict.fromkeys(found), key=lambda d: (rank.get(d.file, len(rank)), d.file, d.line, d.column))


def diagnostic_at(place: Place, problem: Problem) -> Diagnostic:
    """A problem with a place of its own."""
    path = dotted(problem.path)
    return place.source.diagnostic(problem.code, place.line, place.column, path, problem.message, problem.hint)


def dotted(path: KeyPath) -> str:
    """`("models", "chat", "aliases", 0)` as `models.chat.aliases[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def is_secret(path: KeyPath) -> bool:
    """Whether what is here may be a key, rightly or in the wrong shape."""
    return path[:1] == ("servers",) and path[2:3] == ("auth",) and path[3:4] != ("allow_unauthenticated",)
