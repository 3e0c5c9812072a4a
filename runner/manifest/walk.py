"""One YAML file as a tree.

`yaml.compose` with libyaml's parser gives nodes with marks; one walk turns them into data, `{path: place}` of keys and
values, and diagnostics for what PyYAML lets pass: duplicate keys (it keeps the last), unknown tags, bombs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import yaml

from runner.errors import Diagnostic, ManifestError
from runner.manifest.foreign import foreign
from runner.manifest.scalars import read_scalar
from runner.manifest.source import Source
from runner.manifest.syntax import MAPPING, PLAIN, SEQUENCE, TEXT, SyntaxLoader, explain, refuse_deep_nesting
from runner.manifest.tree import KeyPath, Place, Problem, Tree, diagnostic_at, dotted, is_secret

MAX_DEPTH: Final = 32
MAX_NODES: Final = 200_000
MAX_ALIASES: Final = 20_000
RESET: Final = "!reset"
OVERRIDE: Final = "!override"
_SCALAR_TAGS: Final = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null"))


def read_tree(source: Source) -> Tree:
    """Parse one file; `${…}` stay as they are.

    Raises ManifestError on a syntax error, duplicate keys, unknown tags, or a document beyond the caps.
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
    walk = _Walk(source)
    walk.tree.data = walk.value(node, ())
    if walk.errors:  # shown only now, because excerpts hide the secrets that the walk has found
        raise ManifestError(list(dict.fromkeys(diagnostic_at(place, problem) for place, problem in walk.errors)))
    return walk.tree


class _Walk:
    """Turns nodes into data. Errors are collected, but for caps, which end it."""

    def __init__(self, source: Source) -> None:
        self.tree = Tree((source,))
        self.errors: list[tuple[Place, Problem]] = []
        self._source = source
        self._nodes = 0
        self._aliases = 0
        self._seen: set[int] = set()
        self._open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """The data of one node, which is at `path`."""
        self._count(node, path)
        self.tree.values[path] = self._place(node)
        if node.tag in (RESET, OVERRIDE):
            self.tree.tags[path] = node.tag
        if node.tag == RESET:
            return self._reset(node, path)
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
        if node.tag not in (tag, OVERRIDE):
            self._wrong("E110", node, path, f"the tag {_written(node)} means nothing here", "remove it")

    def _pairs(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Keys and values of a mapping, its own before those that `<<` merges in, each key once."""
        own: dict[str, yaml.Node] = {}
        merges: list[yaml.Node] = []
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                template = foreign(self._source.text, key_node.start_mark.line + 1)
                message = template.message if template else "a key should be a name"
                self._wrong("E111", key_node, path, message, template.hint if template else "put quotes around it")
                continue
            key = key_node.value
            if key_node.tag not in (PLAIN, TEXT, *_SCALAR_TAGS):
                hint = "write it after the colon" if key_node.tag in (RESET, OVERRIDE) else "remove it"
                self._wrong("E110", key_node, path, f"the tag {_written(key_node)} means nothing before a key", hint)
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

    def _reset(self, node: yaml.Node, path: KeyPath) -> None:
        empty = read_scalar(node.value) is None if isinstance(node, yaml.ScalarNode) else not node.value
        if not empty:
            message = "!reset takes the key away, so it has no value"
            self._wrong("E114", node, path, message, "remove the value; !override replaces what earlier files say")

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text: str = node.value
        if is_secret(path):
            self._hide(node)
        if node.style in ("'", '"'):
            self._check_end(node, path)
        read = node.tag == PLAIN or node.tag in _SCALAR_TAGS or (node.tag == OVERRIDE and not node.style)
        if not read and node.tag != OVERRIDE:
            self._check_tag(node, TEXT, path)
        if "$" in text:
            self.tree.references[path] = text
            return text
        return read_scalar(text) if read else text

    def _check_end(self, node: yaml.ScalarNode, path: KeyPath) -> None:
        """A quote that is not closed goes on to the next one, and libyaml drops a # right after that with its line."""
        if self._source.character(node.end_mark.line, node.end_mark.column) == "#":
            message = 'a text in quotes that ends right before a "#"'
            self._wrong("E105", node, path, message, 'close the quotes, or put a space before the "#"')

    def _hide(self, node: yaml.ScalarNode) -> None:
        start, end = node.start_mark, node.end_mark
        for line in range(start.line, end.line + 1):
            first = start.column if line == start.line else 0
            self._source.secrets.append((line, first, end.column if line == end.line else 1 << 30))


def _written(node: yaml.Node) -> str:
    """A node's tag as the document has it."""
    return str(node.tag).replace("tag:yaml.org,2002:", "!!")
