"""From a server of the manifest to the listener that it asks for: models, keys and where they come from, TLS."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Final

from runner.errors import Diagnostic
from runner.manifest.drift import Changes
from runner.manifest.load import Loaded
from runner.manifest.presence import from_home
from runner.manifest.servers import Server, Tls
from runner.manifest.tree import KeyPath
from runner.plan.spec import ListenerSpec
from runner.plan.tls import BadCertificate, read_tls

_REFERENCE: Final = r"\$\{(?:file:(?P<file>[^${}]+)|(?P<variable>\w+)(?::?\?[^${}]*)?)\}"
"""A scalar that is nothing but a reference to a secret: what is around one could be a part of the secret."""


def listener_spec(
    loaded: Loaded, name: str, server: Server, changes: Changes
) -> tuple[ListenerSpec, Diagnostic | None]:
    """What a server asks for, and what is wrong with its certificate, which is then left out."""
    spec = _without_tls(loaded, name, server, changes)
    if server.tls is None:
        return spec, None
    try:
        return replace(spec, tls=read_tls(*certificate(loaded, name, server.tls))), None
    except BadCertificate as error:
        at = ("servers", name, "tls", error.file)
        return spec, loaded.at(at, error.message, error.hint, code="E511")


def certificate(loaded: Loaded, server: str, tls: Tls) -> tuple[Path, Path]:
    """Where the certificate of a server and its key are."""
    at = ("servers", server, "tls")
    cert, key = (loaded.folder((*at, name)) / from_home(file) for name, file in (("cert", tls.cert), ("key", tls.key)))
    return cert, key


def _without_tls(loaded: Loaded, name: str, server: Server, changes: Changes) -> ListenerSpec:
    at = ("servers", name, "auth", "api_keys")
    keys = server.auth.api_keys if server.auth else None
    models = tuple(server.models if server.models is not None else loaded.manifest.models)
    models += tuple(m for m, servers in changes.servers.items() if name in servers and m not in models)
    return ListenerSpec(
        name=name,
        host="127.0.0.1" if server.host == "localhost" else server.host,
        port=server.port,
        models=models,
        apis=tuple(server.apis),
        api_keys=tuple(key.get_secret_value() for key in keys or ()),
        api_key_sources=tuple(_source(loaded, (*at, index)) for index, _ in enumerate(keys or ())),
        allow_origins=tuple(server.cors.allow_origins) if server.cors else (),
    )


def _source(loaded: Loaded, path: KeyPath) -> str:
    """Where a secret comes from, as in `ListenerSpec.api_key_sources`."""
    variables = loaded.tree.variables
    match = re.fullmatch(_REFERENCE, variables[path].text) if path in variables else None
    if match is None:
        return ""
    if match["variable"]:
        return f"variable:{match['variable']}"
    return f"file:{loaded.folder(path) / from_home(match['file'])}"
