"""A YAML document as plain data that remembers where everything came from.

`yaml.compose` with libyaml's parser gives nodes with marks; one walk turns them into data, `{path: place}` of keys and
values, and diagnostics for what PyYAML lets pass: duplicate keys (it keeps the last), unknown tags, bombs.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from runner.errors import Diagnostic, ManifestError
from runner.manifest.interpolate import InterpolationError, interpolate
from runner.manifest.scalars import read_scalar
from runner.manifest.source import Source
from runner.manifest.syntax import MAPPING, PLAIN, SEQUENCE, TEXT, SyntaxLoader, explain, refuse_deep_nesting

KeyPath = tuple[str | int, ...]
"""Where something is in the document: keys, and indices of lists."""

MAX_DEPTH: Final = 32
MAX_NODES: Final = 200_000
MAX_ALIASES: Final = 20_000
_MAX_SECRET_BYTES: Final = 64 * 1024
_SCALAR_TAGS: Final = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null"))


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
    """`keys` and `values` give the place of each key and value, `variables` the scalars that were interpolated,
    `problems` those that could not be. `files` are what was read for `${file:…}`."""

    source: Source
    data: Any = field(default=None, repr=False)
    keys: dict[KeyPath, Place] = field(default_factory=dict, repr=False)
    values: dict[KeyPath, Place] = field(default_factory=dict, repr=False)
    variables: dict[KeyPath, Variable] = field(default_factory=dict, repr=False)
    problems: list[Problem] = field(default_factory=list, repr=False)
    files: dict[Path, bytes] = field(default_factory=dict, repr=False)

    def diagnostic(self, problem: Problem) -> Diagnostic:
        """A problem with its place in the file."""
        return _at(self.place(problem.path, key=problem.at_key), problem)

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """Where `path` is, or the nearest thing above it that is in the document."""
        while path:
            found = (self.keys.get(path) if key else None) or self.values.get(path)
            if found is not None:
                return found
            path = path[:-1]
        return self.values.get((), Place(self.source, 0, 0))


def _at(place: Place, problem: Problem) -> Diagnostic:
    path = dotted(problem.path)
    return place.source.diagnostic(problem.code, place.line, place.column, path, problem.message, problem.hint)


def dotted(path: KeyPath) -> str:
    """`("models", "chat", "aliases", 0)` as `models.chat.aliases[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_tree(source: Source, env: Mapping[str, str]) -> Tree:
    """Parse and interpolate one file.

    Raises ManifestError on a syntax error, duplicate keys, unknown tags, or a document beyond the caps. Problems with
    `${…}` are left in `Tree.problems`, since they do not matter under a key that is the user's own.
    """
    refuse_deep_nesting(source)
    try:
        node = yaml.compose(source.text, SyntaxLoader)
    except yaml.YAMLError as error:
        raise ManifestError([explain(source, error)]) from None
    except RecursionError:
        raise ManifestError([source.diagnostic("E113", 0, 0, "", "is nested too deeply")]) from None
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == PLAIN and read_scalar(node.value) is None):
        hint = "it needs name, servers and models"
        raise ManifestError([source.diagnostic("E104", 0, 0, "", "the manifest is empty", hint)])
    walk = _Walk(source, env)
    walk.tree.data = walk.value(node, ())
    if walk.errors:  # shown only now, because excerpts hide the secrets that the walk has found
        raise ManifestError(list(dict.fromkeys(_at(place, problem) for place, problem in walk.errors)))
    return walk.tree


class _Walk:
    """Turns nodes into data. Errors are collected, but for caps, which end it."""

    def __init__(self, source: Source, env: Mapping[str, str]) -> None:
        self.tree = Tree(source)
        self.errors: list[tuple[Place, Problem]] = []
        self._source = source
        self._env = env
        self._nodes = 0
        self._aliases = 0
        self._seen: set[int] = set()
        self._open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """The data of one node, which is at `path`."""
        self._count(node, path)
        self.tree.values[path] = self._place(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._open.add(id(node))
        data: Any
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, SEQUENCE, path)
            data = [self.value(child, (*path, index)) for index, child in enumerate(node.value)]
        else:
            assert isinstance(node, yaml.MappingNode)
            self._check_tag(node, MAPPING, path)
            data = {}
            for key, key_node, child in self._pairs(node, path):
                here = (*path, key)
                self.tree.keys[here] = self._place(key_node)
                data[key] = self.value(child, here)
        self._open.discard(id(node))
        return data

    def _count(self, node: yaml.Node, path: KeyPath) -> None:
        self._nodes += 1
        if id(node) in self._seen:
            self._aliases += 1
        self._seen.add(id(node))
        if id(node) in self._open:
            raise self._cap(node, path, "an alias (*) cannot be inside what it stands for")
        if self._nodes > MAX_NODES or self._aliases > MAX_ALIASES:
            raise self._cap(node, path, "the aliases (*) expand to more than a manifest can have")
        if len(path) > MAX_DEPTH:
            raise self._cap(node, path, f"is nested more than {MAX_DEPTH} deep")

    def _cap(self, node: yaml.Node, path: KeyPath, message: str) -> ManifestError:
        place = self._place(node)
        file = self._source.name
        return ManifestError([Diagnostic(file, place.line, place.column, dotted(path[:4]), message, code="E113")])

    def _place(self, node: yaml.Node) -> Place:
        return Place(self._source, node.start_mark.line + 1, node.start_mark.column + 1)

    def _wrong(self, code: str, node: yaml.Node, path: KeyPath, message: str, hint: str) -> None:
        self.errors.append((self._place(node), Problem(code, path, message, hint)))

    def _check_tag(self, node: yaml.Node, tag: str, path: KeyPath) -> None:
        if node.tag != tag:
            written = node.tag.replace("tag:yaml.org,2002:", "!!")
            self._wrong("E110", node, path, f"the tag {written} means nothing here", "remove it")

    def _pairs(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Keys and values of a mapping, its own before those that `<<` merges in, each key once."""
        own: dict[str, yaml.Node] = {}
        merges: list[yaml.Node] = []
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._wrong("E111", key_node, path, "a key should be a name", "put quotes around it")
                continue
            key = key_node.value
            if key in own:
                first = own[key].start_mark.line + 1
                message = f'"{key}" is given twice (first in line {first})'
                self._wrong("E109", key_node, (*path, key), message, "keep one")
            own.setdefault(key, key_node)
            if key == "<<" and not key_node.style:
                merges.append(child)
            else:
                yield key, key_node, child
        for merge in merges:
            yield from self._merged(merge, path, set(own))

    def _merged(self, merge: yaml.Node, path: KeyPath, taken: set[str]) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        for source in merge.value if isinstance(merge, yaml.SequenceNode) else [merge]:
            if not isinstance(source, yaml.MappingNode):
                self._wrong("E112", source, (*path, "<<"), "should be an alias of a mapping", "such as *base")
                continue
            self._count(source, (*path, "<<"))
            self._open.add(id(source))
            for key, key_node, child in self._pairs(source, path):
                if key not in taken:
                    taken.add(key)
                    yield key, key_node, child
            self._open.discard(id(source))

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text: str = node.value
        if is_secret(path):
            self._hide(node)
        read = node.tag == PLAIN or node.tag in _SCALAR_TAGS
        if not read:
            self._check_tag(node, TEXT, path)
        if "$" in text:
            return self._interpolated(node, text, path)
        return read_scalar(text) if read else text

    def _hide(self, node: yaml.ScalarNode) -> None:
        start, end = node.start_mark, node.end_mark
        for line in range(start.line, end.line + 1):
            first = start.column if line == start.line else 0
            self._source.secrets.append((line, first, end.column if line == end.line else 1 << 30))

    def _interpolated(self, node: yaml.ScalarNode, text: str, path: KeyPath) -> str:
        def read_file(name: str) -> str:
            if not _is_api_key(path):
                message = "${file:…} is for secrets, and works in auth.api_keys only"
                raise InterpolationError("E504", message, "give the value")
            return self._secret_file(name)

        try:
            filled = interpolate(text, self._env, read_file)
        except InterpolationError as error:
            self.tree.problems.append(Problem(error.code, path, error.message, error.hint))
            return text
        self.tree.variables[path] = Variable(text, filled)
        return filled

    def _secret_file(self, name: str) -> str:
        path = self._source.path.parent / name
        try:
            path = self._source.path.parent / Path(name).expanduser()
            if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device could wait for ever
                raise ValueError("not a regular file")
            with path.open("rb") as file:
                content = file.read(_MAX_SECRET_BYTES + 1)
            text = content.decode().rstrip("\r\n")
        except (OSError, ValueError, RuntimeError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
            message = f'the secret file "{name}" cannot be read: {reason}'
            raise InterpolationError("E503", message, f"looked at {path}") from None
        if len(content) > _MAX_SECRET_BYTES:
            message = f'the secret file "{name}" is larger than {_MAX_SECRET_BYTES // 1024} KiB'
            raise InterpolationError("E503", message)
        self.tree.files[path] = content
        return text


def is_secret(path: KeyPath) -> bool:
    """Whether what is here may be a key, rightly or in the wrong shape."""
    return path[:1] == ("servers",) and path[2:3] == ("auth",) and path[3:4] != ("allow_unauthenticated",)


def _is_api_key(path: KeyPath) -> bool:
    return len(path) == 5 and is_secret(path) and path[3] == "api_keys"
