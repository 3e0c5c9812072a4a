"""The admin API's request bodies as types: decoded and validated in one pass, unknown fields refused.

`generation` is the one that the caller has looked at: where another is current by now, nothing is done (409).
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

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
