"""From a tree to a validated manifest: pydantic does the work, and its errors become problems in plain words."""

from __future__ import annotations

import types
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from runner.manifest.models import Manifest
from runner.manifest.scalars import read_scalar
from runner.manifest.tree import KeyPath, Problem, Tree

_NOT_TEXT: Final = frozenset({"int_type", "float_type", "bool_type", "literal_error"})
_NOT_WHOLE: Final = frozenset({"int_type", "int_from_float", "literal_error"})


def validate(tree: Tree) -> tuple[Manifest | None, list[Problem]]:
    """The manifest, or what is wrong with its shape. Amends `tree.data` on the way (see `_amend`)."""
    while True:
        try:
            return Manifest.model_validate(tree.data), []
        except ValidationError as error:
            details = error.errors(include_url=False)
        amended = sum(_amend(tree, detail) for detail in details)
        if not amended:
            from runner.manifest.words import problems_of  # noqa: PLC0415 - only a wrong manifest pays for its words

            return None, problems_of(tree, details)


def _amend(tree: Tree, detail: ErrorDetails) -> bool:
    """Whether this error was no error: validation then begins anew without it.

    Done on errors rather than ahead of validation, because only the models know which mappings have fixed keys and
    which scalars are numbers: the user's own `x-` keys and keys with no value are taken out, what `${…}` gave is read
    as YAML where text does not fit, and 1e3 is a whole number, as JSON Schema has it.
    """
    path = path_in_tree(tree, detail["loc"])
    parent = _look_up(tree.data, path[:-1])
    if not path or not isinstance(parent, dict | list):
        return False
    last: Any = path[-1]
    if isinstance(parent, dict) and last not in parent:  # taken out in this very round
        return False
    if detail["type"] == "extra_forbidden":
        if not str(last).startswith("x-"):
            return False
        del parent[last]
        return True
    if detail["type"] == "missing" or detail["loc"][-1] == "[key]":
        return False
    if parent[last] is None and isinstance(parent, dict) and is_section(type_at(path[:-1])):
        del parent[last]
        return True
    if isinstance(parent[last], float) and detail["type"] in _NOT_WHOLE and parent[last].is_integer():
        parent[last] = int(parent[last])
        return True
    if path in tree.variables and isinstance(parent[last], str) and detail["type"] in _NOT_TEXT:
        value = read_scalar(parent[last].strip())
        if isinstance(value, int | float):
            parent[last] = value
            return True
    return False


def path_in_tree(tree: Tree, location: tuple[int | str, ...]) -> KeyPath:
    """pydantic's location without the parts that are not in the document (union tags, `[key]`, a missing field)."""
    path: KeyPath = ()
    for part in location:
        if (*path, part) in tree.values:
            path = (*path, part)
    return path


def _look_up(data: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def type_at(path: KeyPath) -> Any:
    """The model class, dict type or plain type at a path of the document; None where there is none."""
    found: Any = Manifest
    for part in path:
        if is_section(found):
            fields = found.model_fields
            found = bare(fields[part].annotation) if part in fields else None
        else:
            inner = get_args(found)
            found = bare(inner[-1]) if get_origin(found) in (dict, list) else None
    return found


def bare(annotation: Any) -> Any:
    """Without Annotated and `| None`."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            annotation = next(a for a in get_args(annotation) if a is not type(None))
        else:
            return annotation


def is_section(found: Any) -> bool:
    """Whether this is a mapping with fixed keys."""
    return isinstance(found, type) and issubclass(found, BaseModel)
