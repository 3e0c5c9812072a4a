"""Which values a field may have, by the type that its body is decoded to: for the answer to one that has another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from msgspec import inspect

_PARTS: Final = re.compile(r"\[[^\]]*\]|[^.\[\]]+")


def allowed(kind: Any, path: str) -> list[str]:
    """The values that the field at `path` (`messages[0].role`) of a `kind` may have; empty where all of a type."""
    found = [inspect.type_info(kind)]
    *above, last = _PARTS.findall(path) or [""]
    for part in above:
        found = [inner for outer in found for inner in _within(outer, part)]
    values: dict[str, None] = {}
    for outer in found:
        for one in _alternatives(outer):
            if isinstance(one, inspect.StructType) and one.tag_field == last:
                values[str(one.tag)] = None
        for inner in _within(outer, last):
            for one in _alternatives(inner):
                if isinstance(one, inspect.LiteralType):
                    values |= dict.fromkeys(map(str, one.values))
    return sorted(values)


def _alternatives(kind: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(kind, inspect.UnionType):
        for one in kind.types:
            yield from _alternatives(one)
    elif isinstance(kind, inspect.Metadata):
        yield from _alternatives(kind.type)
    else:
        yield kind


def _within(outer: inspect.Type, part: str) -> Iterator[inspect.Type]:
    """What stands at one part of a path: a field, or an item of an array or of a mapping."""
    for one in _alternatives(outer):
        if isinstance(one, inspect.StructType):
            yield from (field.type for field in one.fields if field.encode_name == part)
        elif part.startswith("[") and isinstance(one, inspect.CollectionType):
            yield one.item_type
        elif part.startswith("[") and isinstance(one, inspect.DictType):
            yield one.value_type
