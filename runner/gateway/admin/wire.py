"""The admin API's request bodies as types: decoded and validated in one pass, unknown fields refused.

`generation` is the one that the caller has looked at: where another is current by now, nothing is done (409).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from runner.errors import InvalidRequest

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Text = Annotated[str, Meta(min_length=1, max_length=4096)]
Generation = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class _Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all that change something take."""

    generation: Generation | None = None


class LoadModel(_Change, frozen=True, kw_only=True):
    """`POST /v1/models/load`.

    Without `source` the model is one that the manifest declares, or an earlier load did. With it, it is a new one:
    `source`, `revision` and `config`, which has the other keys of a `models` entry, are as in the manifest, paths
    relative to it. `servers` are those that are to serve it, beside those that serve all models: by default the one
    that is asked.
    """

    model: Name
    source: Text | None = None
    revision: Text | None = None
    config: dict[str, Any] | None = None
    servers: Annotated[list[Name], Meta(min_length=1, max_length=64)] | None = None


class UnloadModel(_Change, frozen=True, kw_only=True):
    """`POST /v1/models/unload`."""

    model: Name


class LoadAdapter(_Change, frozen=True, kw_only=True):
    """`POST /v1/adapters/load`. Without `source` it is one that the manifest declares, or an earlier load did."""

    model: Name
    adapter: Name
    source: Text | None = None
    revision: Text | None = None
    scale: Annotated[float, Meta(ge=-1000, le=1000)] | None = None


class UnloadAdapter(_Change, frozen=True, kw_only=True):
    """`POST /v1/adapters/unload`."""

    model: Name
    adapter: Name


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/plan`. `target` and `prune` are those of `mlx-run plan`."""

    target: Annotated[list[Text], Meta(max_length=256)] = []
    prune: bool = True


class Apply(_Change, frozen=True, kw_only=True):
    """`POST /v1/apply`. What is not live after `timeout_seconds` is undone."""

    target: Annotated[list[Text], Meta(max_length=256)] = []
    prune: bool = True
    timeout_seconds: Seconds | None = None


NAMES: Final = {
    kind: {"": kind.__struct_fields__} for kind in (LoadModel, UnloadModel, LoadAdapter, UnloadAdapter, Plan, Apply)
}
"""Field names, for `runner.gateway.decode` to suggest from."""

DECODERS: Final[dict[type, msgspec.json.Decoder[Any]]] = {kind: msgspec.json.Decoder(kind) for kind in NAMES}

_MOST_FOUND: Final = 100
SEARCH: Final[Mapping[str, Mapping[str, Any]]] = {
    "q": {"type": "string", "minLength": 1, "maxLength": 256},
    "limit": {"type": "integer", "minimum": 1, "maximum": _MOST_FOUND, "default": 20},
}
"""The query of `GET /v1/models/search`, as JSON Schema; `q` is required."""


def read_search(given: Mapping[str, Any]) -> tuple[str, int]:
    """The words and the most answers that a query asks for. Raises InvalidRequest."""
    for name, value in given.items():
        if name not in SEARCH:
            raise InvalidRequest(f"unknown parameter `{name}`; there are: {', '.join(SEARCH)}", param=name)
        if not isinstance(value, str):
            raise InvalidRequest(f"`{name}` is there more than once", param=name)
    query = given.get("q", "").strip()
    if not query:
        raise InvalidRequest("`q` is missing: the words to search for", param="q", code="missing_field")
    if len(query) > SEARCH["q"]["maxLength"]:
        raise InvalidRequest(f"`q` is longer than {SEARCH['q']['maxLength']} characters", param="q")
    limit = given.get("limit", str(SEARCH["limit"]["default"]))
    if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= _MOST_FOUND:
        raise InvalidRequest(f"`limit` should be a number from 1 to {_MOST_FOUND}", param="limit")
    return query, int(limit)
