"""Changes a YAML file's text at the places of its nodes, so that comments, order and everything else stay as they are.

`yaml.compose` says where each node begins and ends; an edit puts text between two nodes, or takes a node's text away,
and is then read back: what the file comes to has to be what was meant, else the edit is refused (CannotEdit). No YAML
is written anew, so there is no need for a library that remembers a document's form. References (`${…}`) are texts here.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import yaml

from runner.errors import ManifestError
from runner.manifest.scalars import read_scalar
from runner.manifest.source import Source
from runner.manifest.tree import dotted
from runner.manifest.walk import read_tree

Path = tuple[str, ...]

_BARE: Final = r"[A-Za-z0-9./_~-][A-Za-z0-9./_~+@-]*"
_STEP: Final = 2


class CannotEdit(Exception):  # noqa: N818 - says what stands in the way; callers turn it into an error of the tree
    """This text cannot be changed like that without writing it anew."""


class NotWritten(CannotEdit):
    """What is to be changed is not in this file."""


class _Loader(yaml.SafeLoader):
    """The parser in Python: its marks count characters, and the ends of its nodes are where they end."""


def put(source: Source, path: Path, value: Any) -> Source:
    """The file with `value` at `path`, where nothing was; mappings above it that are not there are made."""
    root = _root(source)
    at = len(path) - 1
    while (parent := _find(root, path[:at])) is None:
        at -= 1
    for key in reversed(path[at + 1 :]):
        value = {key: value}
    if _is_null(parent):
        text = _into_nothing(source.text, root, path[:at], path[at], value)
    elif not isinstance(parent, yaml.MappingNode) or path[at] in _keys(parent):
        raise CannotEdit(f"{dotted(path[: at + 1])} is there already, and is no mapping")
    else:
        text = _into_mapping(source.text, parent, path[at], value)

    def meant(data: Any) -> None:
        _put_data(data, path[:at], path[at], value)

    return _checked(source, text, meant, path)


def remove(source: Source, path: Path) -> Source:
    """The file without `path`, which is a key of a mapping."""
    parent = _find(_root(source), path[:-1])
    if not isinstance(parent, yaml.MappingNode) or path[-1] not in _keys(parent):
        raise NotWritten(f"{dotted(path)} is not written here")
    at = _keys(parent).index(path[-1])
    text = _without(source.text, parent, [key for key, _ in parent.value], [value for _, value in parent.value], at)

    def meant(data: Any) -> None:
        inside = _data_at(data, path[:-1])
        del inside[path[-1]]

    return _checked(source, text, meant, path, emptied=path[:-1])


def add_item(source: Source, path: Path, item: str) -> Source:
    """The file with one more text in the list at `path`."""
    node = _find(_root(source), path)
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise NotWritten(f"{dotted(path)} is no list with entries")
    last = _end(node.value[-1], source.text)
    if node.flow_style:
        text = source.text[:last] + f", {_scalar(item)}" + source.text[last:]
    else:
        begin = source.text.rfind("\n", 0, node.value[-1].start_mark.index) + 1
        indent = source.text[begin : source.text.index("-", begin)]
        text = _lines_after(source.text, last, [f"{indent}- {_scalar(item)}"])

    def meant(data: Any) -> None:
        _data_at(data, path).append(item)

    return _checked(source, text, meant, path)


def drop_item(source: Source, path: Path, item: str) -> Source:
    """The file without a text in the list at `path`."""
    node = _find(_root(source), path)
    values = [child.value for child in node.value] if isinstance(node, yaml.SequenceNode) else []
    if node is None or item not in values:
        raise NotWritten(f"{dotted(path)} does not list {item}")
    text = _without(source.text, node, node.value, node.value, values.index(item))

    def meant(data: Any) -> None:
        _data_at(data, path).remove(item)

    return _checked(source, text, meant, path, emptied=path)


# ------------------------------------------------------------- what an edit came to


def _checked(
    source: Source, text: str, meant: Callable[[Any], None], path: Path, emptied: Path | None = None
) -> Source:
    """The edited file, read back. A mapping or list whose last entry went may have become nothing."""
    after = Source(source.name, source.path, text)
    wanted = copy.deepcopy(read_tree(Source(source.name, source.path, source.text)).data)
    found = None
    with contextlib.suppress(ManifestError, KeyError, TypeError, ValueError):
        meant(wanted)
        found = read_tree(Source(source.name, source.path, text)).data
    if found is not None and found != wanted and emptied and _data_at(wanted, emptied) in ({}, []):
        _put_data(wanted, emptied[:-1], emptied[-1], None)
    if found != wanted:
        raise CannotEdit(f"{dotted(path)} is part of an anchor, of a merge, or of a line that cannot be taken apart")
    return after


def _data_at(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key]
    return data


def _put_data(data: Any, above: Path, key: str, value: Any) -> None:
    if above and _data_at(data, above) is None:
        _data_at(data, above[:-1])[above[-1]] = {}
    _data_at(data, above)[key] = value


# ------------------------------------------------------------- finding


def _root(source: Source) -> yaml.MappingNode:
    root = yaml.compose(source.text, _Loader)
    if not isinstance(root, yaml.MappingNode):
        raise CannotEdit(f"{source.name} is no mapping")
    return root


def _find(root: yaml.Node, path: Path) -> yaml.Node | None:
    node: yaml.Node | None = root
    for key in path:
        if not isinstance(node, yaml.MappingNode):
            return None
        node = next((value for key_node, value in node.value if key_node.value == key), None)
    return node


def _keys(node: yaml.MappingNode) -> list[str]:
    return [key.value for key, _ in node.value]


def _is_null(node: yaml.Node | None) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.style and read_scalar(node.value) is None


def _end(node: yaml.Node, text: str) -> int:
    """Where a node's text ends: that of a block is where its last entry ends, not where the next thing begins."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last, text)
    end: int = node.end_mark.index
    begin: int = node.start_mark.index
    return begin + len(text[begin:end].rstrip())


# ------------------------------------------------------------- changing


def _into_mapping(text: str, parent: yaml.MappingNode, key: str, value: Any) -> str:
    if parent.flow_style:
        inside = f"{_scalar(key)}: {_flow(value)}"
        if not parent.value:
            at = parent.end_mark.index - 1
            return text[:at] + inside + text[at:]
        last = _end(parent.value[-1][1], text)
        return text[:last] + f", {inside}" + text[last:]
    if not parent.value:
        raise CannotEdit("an empty mapping has no place for a key")
    column = parent.value[0][0].start_mark.column
    return _lines_after(text, _end(parent.value[-1][1], text), _block(key, value, column))


def _into_nothing(text: str, root: yaml.MappingNode, above: Path, key: str, value: Any) -> str:
    """A key that has no value gets a mapping with one entry."""
    parent = _find(root, above[:-1])
    assert isinstance(parent, yaml.MappingNode), "what holds a key is a mapping"
    key_node, node = next((k, v) for k, v in parent.value if k.value == above[-1])
    begin, end = node.start_mark.index, node.end_mark.index
    if parent.flow_style or begin != end:
        return text[:begin] + f"{' ' * (begin == end)}{{{_scalar(key)}: {_flow(value)}}}" + text[end:]
    return _lines_after(text, begin, _block(key, value, key_node.start_mark.column + _STEP))


def _without(text: str, parent: Any, starts: Sequence[yaml.Node], ends: Sequence[yaml.Node], at: int) -> str:
    """The text without entry `at` of a mapping or list, whose entries begin and end with these nodes."""
    begin, end = starts[at].start_mark.index, _end(ends[at], text)
    if not parent.flow_style:
        first = text.rfind("\n", 0, begin) + 1
        if text[first:begin].strip() not in ("", "-" if isinstance(parent, yaml.SequenceNode) else ""):
            raise CannotEdit("it shares its line with something else")
        stop = text.find("\n", end)
        return text[:first] + ("" if stop < 0 else text[stop + 1 :])
    if at + 1 < len(starts):
        return text[:begin] + text[starts[at + 1].start_mark.index :]
    if at:
        return text[: _end(ends[at - 1], text)] + text[end:]
    return text[:begin] + text[parent.end_mark.index - 1 :]


def _lines_after(text: str, index: int, lines: Sequence[str]) -> str:
    """The text with whole lines after the one that `index` is in."""
    newline = "\r\n" if "\r\n" in text else "\n"
    added = "".join(line + newline for line in lines)
    stop = text.find("\n", index)
    if stop < 0:
        return text + newline + added
    return text[: stop + 1] + added + text[stop + 1 :]


# ------------------------------------------------------------- writing


def _block(key: str, value: Any, column: int) -> list[str]:
    """A key in a line of its own; its value's entries too, and what is in those on their line."""
    indent = " " * column
    if not isinstance(value, Mapping) or not value:
        return [f"{indent}{_scalar(key)}: {_flow(value)}"]
    inner = " " * (column + _STEP)
    return [f"{indent}{_scalar(key)}:", *(f"{inner}{_scalar(k)}: {_flow(v)}" for k, v in value.items())]


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        if re.fullmatch(_BARE, value) and read_scalar(value) == value:
            return value
        return json.dumps(value, ensure_ascii=not value.isprintable())
    return json.dumps(value)
