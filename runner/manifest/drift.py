"""What the admin API has changed of what a manifest declares: live, and written in no file.

Changes are kept as the manifest itself would say them, so that they are read, checked and resolved as an overlay is
(`overlay_text`), and can be written into it (`runner.manifest.adopt`). Pure, and without YAML: the runner holds them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from runner.errors import Conflict, NotServed

OVERLAY_NAME: Final = "the admin API"
"""What messages call the overlay, in place of a file's name."""

Entry = Mapping[str, Any]
"""A `models` or `adapters` entry, as a manifest has it."""
Declared = Mapping[str, Collection[str]]
"""The manifest's own models, each with the names of its adapters."""


@dataclass(frozen=True, slots=True)
class Changes:
    """`models` are those that were added, and `servers` the names of the servers that were asked to serve each.
    `unloaded` are the manifest's own that rest. `adapters` by (model, name): an entry, or None for one that was taken
    away.
    """

    models: Mapping[str, Entry] = field(default_factory=dict)
    servers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unloaded: tuple[str, ...] = ()
    adapters: Mapping[tuple[str, str], Entry | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.models or self.unloaded or self.adapters)


NO_CHANGES: Final = Changes()


def load_model(
    held: Changes, declared: Declared, name: str, entry: Entry | None, servers: tuple[str, ...] = ()
) -> Changes:
    """`name` is served: as `entry` says, or without one as the manifest, or an earlier load, has it.

    Raises NotServed (nobody says what it is) and Conflict (the manifest does, and says something else).
    """
    if name in declared:
        if entry is not None:
            raise Conflict(
                f"the manifest declares `{name}`; load it without `source` and `config`, under another name, or edit "
                "the manifest",
                param="model",
                code="declared_in_manifest",
            )
        return replace(held, unloaded=tuple(other for other in held.unloaded if other != name))
    if entry is None:
        if name in held.models:
            return held
        raise NotServed(
            f"neither the manifest nor an earlier load says what `{name}` is; send its `source`",
            param="model",
            code="model_not_found",
        )
    return replace(held, models={**held.models, name: entry}, servers={**held.servers, name: servers})


def unload_model(held: Changes, declared: Declared, name: str) -> Changes:
    """`name` is not served any more; what was loaded for it is forgotten. Raises NotServed."""
    _require_model(held, declared, name)
    adapters = {at: entry for at, entry in held.adapters.items() if at[0] != name}
    if name in declared:
        unloaded = (*(other for other in held.unloaded if other != name), name)
        return replace(held, unloaded=unloaded, adapters=adapters)
    models = {other: entry for other, entry in held.models.items() if other != name}
    servers = {other: names for other, names in held.servers.items() if other != name}
    return replace(held, models=models, servers=servers, adapters=adapters)


def load_adapter(held: Changes, declared: Declared, model: str, name: str, entry: Entry | None) -> Changes:
    """`model` has the adapter `name`: as `entry` says, or without one as the manifest has it. Raises NotServed, and
    Conflict as `load_model` does."""
    _require_model(held, declared, model)
    at = (model, name)
    if name in declared.get(model, ()):
        if entry is not None:
            raise Conflict(
                f"the manifest declares the adapter `{name}` of `{model}`; load it without `source`, under another "
                "name, or edit the manifest",
                param="adapter",
                code="declared_in_manifest",
            )
        return replace(held, adapters={other: kept for other, kept in held.adapters.items() if other != at})
    if entry is None:
        if held.adapters.get(at) is not None:
            return held
        if name in _own_adapters(held, model):
            return replace(held, adapters={other: kept for other, kept in held.adapters.items() if other != at})
        raise NotServed(
            f"neither the manifest nor an earlier load says what the adapter `{name}` of `{model}` is; send its "
            "`source`",
            param="adapter",
            code="adapter_not_found",
        )
    return replace(held, adapters={**held.adapters, at: entry})


def unload_adapter(held: Changes, declared: Declared, model: str, name: str) -> Changes:
    """`model` has no adapter `name` any more. Raises NotServed."""
    _require_model(held, declared, model)
    at = (model, name)
    rest = {other: entry for other, entry in held.adapters.items() if other != at}
    if name in declared.get(model, ()) or name in _own_adapters(held, model):
        return replace(held, adapters={**rest, at: None})
    if at not in held.adapters:
        raise NotServed(f"The model `{model}` has no adapter `{name}`.", param="adapter", code="adapter_not_found")
    return replace(held, adapters=rest)


def _require_model(held: Changes, declared: Declared, name: str) -> None:
    if name not in held.models and (name not in declared or name in held.unloaded):
        unloaded = " any more: it was unloaded" if name in held.unloaded else " here"
        raise NotServed(f"The model `{name}` is not served{unloaded}.", param="model", code="model_not_found")


def _own_adapters(held: Changes, model: str) -> Collection[str]:
    """Those that an added model was loaded with."""
    entry = held.models.get(model)
    adapters = entry.get("adapters") if entry is not None else None
    return adapters if isinstance(adapters, Mapping) else ()


# ------------------------------------------------------------- told, and handed on


def lines(changes: Changes) -> Iterator[str]:
    """A few words for each."""
    yield from (f"models.{name} loaded" for name in changes.models)
    yield from (f"models.{name} unloaded" for name in changes.unloaded)
    for (model, name), entry in changes.adapters.items():
        yield f"models.{model}.adapters.{name} {'unloaded' if entry is None else 'loaded'}"


def to_json(changes: Changes) -> dict[str, Any]:
    """As JSON's types."""
    return {
        "models": {
            name: {"entry": dict(entry), "servers": list(changes.servers.get(name, ()))}
            for name, entry in changes.models.items()
        },
        "unloaded": list(changes.unloaded),
        "adapters": [
            {"model": model, "adapter": name, "entry": None if entry is None else dict(entry)}
            for (model, name), entry in changes.adapters.items()
        ],
    }


def from_json(data: Mapping[str, Any]) -> Changes:
    """What `to_json` made."""
    return Changes(
        models={name: added["entry"] for name, added in data["models"].items()},
        servers={name: tuple(added["servers"]) for name, added in data["models"].items()},
        unloaded=tuple(data["unloaded"]),
        adapters={(change["model"], change["adapter"]): change["entry"] for change in data["adapters"]},
    )


def overlay_text(changes: Changes) -> str:
    """What was added, as a file that goes over the manifest: YAML, and nearly JSON. What was taken away is not in it,
    for the manifest goes on to name it: whoever resolves it leaves that out."""
    models: dict[str, Any] = {name: dict(entry) for name, entry in changes.models.items()}
    for (model, name), entry in changes.adapters.items():
        if entry is not None:
            inside = models.setdefault(model, {})
            inside["adapters"] = {**inside.get("adapters", {}), name: dict(entry)}
    return f"models: {_quoted(models)}\n" if models else "x-nothing: true\n"


def taken_away(changes: Changes, model: str) -> frozenset[str]:
    """The adapters of a model that are declared and not to be served."""
    return frozenset(name for (of, name), entry in changes.adapters.items() if of == model and entry is None)


def _quoted(value: Any) -> str:
    """JSON, which is YAML but for characters that JSON writes as two. A dollar sign means itself: whoever may ask the
    API may not read the environment."""
    text = json.dumps(value).replace("$", "$$").replace("\x7f", "\\u007f")
    return re.sub(_PAIR, lambda pair: pair[0] if pair[1] is None else _one(pair[1], pair[2]), text)


_PAIR: Final = r"\\\\|\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})"


def _one(high: str, low: str) -> str:
    """A pair of surrogates as YAML writes their character."""
    return f"\\U{0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00:08x}"
