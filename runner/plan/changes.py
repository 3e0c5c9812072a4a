"""What differs between two specs, field by field, in the manifest's words and without the value of a secret.

Works on whatever fields a spec has: nested dataclasses and mappings become dotted paths. Two marks on a spec's field
matter here: one without a repr is a secret, and one whose name ends in `_bytes` is a size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from runner.plan.spec import AdapterSpec, ListenerSpec, ModelSpec

Spec = ModelSpec | ListenerSpec
Unit = Literal["", "bytes"]

_PATHS: Final = {
    "allow_origins": "cors.allow_origins",
    "api_keys": "auth.api_keys",
    "limits.max_context": "kv_cache.max_context",
    "limits.max_queue": "batching.max_queue",
    "limits.max_rows": "batching.max_rows",
    "limits.prefill_step_size": "batching.prefill_step_size",
    "limits.num_draft_tokens": "draft.num_draft_tokens",
    "limits.prefix_cache": "kv_cache.prefix_cache",
    "tls.digest": "tls.content",
    "weights_digest": "weights",
}
"""Where the manifest says something elsewhere than the spec does; what is not listed has the spec's own path."""

_UNTOLD: Final = frozenset({"name", "weights_bytes"})
"""The name is in the action's target, and the size in its memory."""

_SCALARS: Final = frozenset({str, int, float, bool})
_DIGEST_DIGITS: Final = 12
_ABSENT: Final[Any] = object()
"""Stands for a value that is not there; None is one that a field may have."""


class Change(NamedTuple):
    """One field. `old` and `new` are plain data, None where a side has nothing; both None for a secret."""

    path: str
    change: Literal["added", "changed", "removed"]
    old: Any = None
    new: Any = None
    unit: Unit = ""
    secret: bool = False


class _Kind(NamedTuple):
    """What a field's name and marks say, whatever its value. Where a thing lies on the disk and what it hashes to
    (`identity`) is told when it changed, not when it comes or goes."""

    name: str
    path: str
    default: Any
    unit: Unit
    secret: bool
    identity: bool


_Leaves = dict[str, tuple[Any, _Kind]]


def changes(old: Spec | None, new: Spec | None) -> tuple[Change, ...]:
    """Every field that differs, in the order of the spec; None is nothing at all, which goes without the defaults."""
    if old is None or new is None:
        return tuple(_whole(old or new, "removed" if new is None else "added"))
    differ = [kind for kind in _kinds_of(new) if getattr(old, kind.name) != getattr(new, kind.name)]
    return tuple(_changes(dict(_walk(old, "", differ)), dict(_walk(new, "", differ))))


def _whole(spec: Spec | None, how: Literal["added", "removed"]) -> Iterator[Change]:
    """All that a spec says, where it is not as by default."""
    for path, (value, kind) in () if spec is None else _walk(spec, "", _kinds_of(spec)):
        if value != kind.default and not kind.identity:
            old, new = (value, _ABSENT) if how == "removed" else (_ABSENT, value)
            yield _change(path, how, old, new, kind)


def _changes(had: _Leaves, has: _Leaves) -> Iterator[Change]:
    for path in dict.fromkeys((*has, *had)):
        old, kind = had.get(path, (_ABSENT, None))
        new, kind = has.get(path, (_ABSENT, kind))
        assert kind is not None, "a path comes from one of the two"
        if old == new:
            continue
        if old is not _ABSENT and new is not _ABSENT:
            yield _change(path, "changed", old, new, kind)
        elif not kind.identity:
            yield _change(path, "added" if old is _ABSENT else "removed", old, new, kind)


def _change(path: str, how: Literal["added", "changed", "removed"], old: Any, new: Any, kind: _Kind) -> Change:
    if kind.secret:
        return Change(path, how, secret=True)
    return Change(path, how, _plain(old, kind), _plain(new, kind), kind.unit)


def _walk(spec: Any, above: str, kinds: Iterable[_Kind]) -> Iterator[tuple[str, tuple[Any, _Kind]]]:
    """Path and value of every field that says something: one that is empty by default says nothing."""
    for kind in kinds:
        value = getattr(spec, kind.name)
        if not value and not isinstance(value, bool) and value == kind.default:
            continue
        path = above + kind.path
        path = _PATHS.get(path, path)
        if type(value) in _SCALARS:
            yield path, (value, kind)
        elif isinstance(value, dict):
            for key, entry in value.items():
                yield f"{path}.{key}", (entry, kind)
        elif isinstance(value, tuple) and value and isinstance(value[0], AdapterSpec):
            for adapter in value:
                yield from _walk(adapter, f"{path}.{adapter.name}.", _kinds_of(adapter))
        elif is_dataclass(value):
            yield from _walk(value, f"{path}.", _kinds_of(value))
        else:
            yield path, (value, kind)


def _kinds_of(spec: Any) -> tuple[_Kind, ...]:
    cls: Any = type(spec)
    return _kinds(cls)


@lru_cache(maxsize=32)
def _kinds(spec: type[ModelSpec]) -> tuple[_Kind, ...]:
    known = fields(spec)
    has_source = any(f.name == "source" for f in known)
    return tuple(_kind(f, has_source) for f in known if f.compare and f.name not in _UNTOLD)


def _kind(field: Any, has_source: bool) -> _Kind:
    """`has_source`: its spec says what the user wrote, so that its `path` is only where that led."""
    name: str = field.name
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return _Kind(
        name=name,
        path="source" if name == "path" and not has_source else name.removesuffix("_bytes"),
        default=default,
        unit="bytes" if name.endswith("_bytes") else "",
        secret=not field.repr,
        identity=name.endswith("digest") or (name == "path" and has_source),
    )


def _plain(value: Any, kind: _Kind) -> Any:
    if value is _ABSENT:
        return None
    if type(value) in _SCALARS and not kind.identity:
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    if kind.name.endswith("digest"):
        return value[:_DIGEST_DIGITS]
    return value
