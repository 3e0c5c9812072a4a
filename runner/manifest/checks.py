"""What the models cannot say: references, collisions, and who may reach a server."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from runner.manifest.models import Adapter, Draft, Model
from runner.manifest.names import PLAIN_MODEL
from runner.manifest.servers import Server
from runner.manifest.suggest import suggest
from runner.manifest.tree import KeyPath, Problem


def check(servers: Mapping[str, Server], models: Mapping[str, Model], names: Collection[str] | None) -> list[Problem]:
    """Everything wrong between parts whose shape is right.

    `names` are all models of the document, also those left out of `models` for errors of their own; None where the
    document has no readable section of models, so that references cannot be checked.
    """
    found: list[Problem] = []
    for name, model in models.items():
        found += _adapters(name, model)
        found += _source(("models", name), model)
        if model.draft is not None:
            found += _source(("models", name, "draft"), model.draft)
        for adapter, entry in model.adapters.items():
            found += _source(("models", name, "adapters", adapter), entry)
    aliases: dict[str, str] = {}
    found += _aliases(models, names or (), aliases)
    for name, server in servers.items():
        if names is not None:
            found += _references(name, server, names, aliases)
        found += _access(name, server)
        found += _administration(name, server)
        found += _repeated(("servers", name, "models"), server.models or ())
        found += _repeated(("servers", name, "apis"), server.apis)
    found += _addresses(servers)
    return found


def is_path(source: str) -> bool:
    """Whether a source can only be a folder. Others have the form `org/name`, and may be a folder all the same."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+", source) is None


def _source(path: KeyPath, entry: Model | Draft | Adapter) -> Iterator[Problem]:
    if entry.revision is not None and is_path(entry.source):
        message = "is for hub repositories (org/name), and this source is none"
        yield Problem("E307", (*path, "revision"), message, "remove it", at_key=True)
    if entry.source.startswith("~") and not entry.source.startswith("~/"):
        message = f'"{entry.source}" is the folder of another user'
        yield Problem("E605", (*path, "source"), message, "write ~/ for your own, or the whole path")


def _adapters(name: str, model: Model) -> Iterator[Problem]:
    path = ("models", name)
    for adapter in model.adapters:
        if adapter in PLAIN_MODEL:
            message = f'"{adapter}" asks for the model without an adapter, so no adapter can have this name'
            yield Problem("E306", (*path, "adapters", adapter), message, "give it another name", at_key=True)
    wanted = model.default_adapter
    if wanted is not None and wanted not in model.adapters:
        known = ", ".join(model.adapters)
        hint = suggest(wanted, model.adapters) or (f"its adapters: {known}" if known else "this model has no adapters")
        yield Problem("E302", (*path, "default_adapter"), f'there is no adapter "{wanted}"', hint)


def _aliases(models: Mapping[str, Model], names: Collection[str], taken: dict[str, str]) -> Iterator[Problem]:
    """Collisions; fills `taken` with alias → model as far as they are free."""
    for name, model in models.items():
        for index, alias in enumerate(model.aliases):
            path = ("models", name, "aliases", index)
            if alias in names:
                what = "this model's own name" if alias == name else "the name of another model"
                yield Problem("E303", path, f'"{alias}" is {what}', "remove the alias, or choose another")
            elif alias in taken:
                owner = taken[alias]
                again = "is given twice" if owner == name else f'is an alias of model "{owner}" already'
                yield Problem("E303", path, f'"{alias}" {again}', "keep one of the two")
            else:
                taken[alias] = name


def _references(name: str, server: Server, names: Collection[str], aliases: Mapping[str, str]) -> Iterator[Problem]:
    for index, model in enumerate(server.models or ()):
        if model in names:
            continue
        if model in aliases:
            hint = f'"{model}" is an alias: write "{aliases[model]}"'
        else:
            hint = suggest(model, names) or f"models: {', '.join(list(names)[:8])}"
        yield Problem("E301", ("servers", name, "models", index), f'there is no model "{model}"', hint)


def _repeated(path: KeyPath, entries: Sequence[str]) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        if entry in seen:
            yield Problem("E305", (*path, index), f'"{entry}" is listed twice', "keep one of the two")
        seen.add(entry)


def _access(name: str, server: Server) -> Iterator[Problem]:
    path = ("servers", name)
    auth = server.auth
    if auth is not None and auth.api_keys and auth.allow_unauthenticated:
        message = "api_keys and allow_unauthenticated: true contradict each other"
        yield Problem("E507", (*path, "auth"), message, "keep one of the two", at_key=True)
    elif auth is not None and not auth.api_keys and not auth.allow_unauthenticated:
        message = "says neither who may use the server nor that everybody may"
        yield Problem("E507", (*path, "auth"), message, "give api_keys, or allow_unauthenticated: true", at_key=True)
    elif auth is None and not is_loopback(server.host):
        yield Problem(
            "E506",
            (*path, "host"),
            f"{server.host} can be reached from other machines, so this server needs auth",
            'add auth: {api_keys: ["${MLX_RUN_API_KEY}"]}, or auth: {allow_unauthenticated: true} to leave it open',
        )


def _administration(name: str, server: Server) -> Iterator[Problem]:
    """Whoever may use the admin API decides what this machine loads, so it is never left open by a general setting."""
    if "admin" not in server.apis or (server.auth is not None and server.auth.api_keys):
        return
    at = ("servers", name, "apis", server.apis.index("admin"))
    if not is_loopback(server.host):
        message = f"the admin API can be reached from other machines at {server.host}, and asks for no key"
        yield Problem("E512", at, message, 'add auth: {api_keys: ["${MLX_RUN_API_KEY}"]}, or serve admin on 127.0.0.1')
    elif server.cors is not None:
        message = "the admin API can be called by web pages (cors), and asks for no key"
        yield Problem("E512", at, message, 'add auth: {api_keys: ["${MLX_RUN_API_KEY}"]}, or give admin its own server')


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    packed = _packed(host)
    return packed == _LOOPBACK_6 if len(packed) == 16 else packed[0] == 127


def _packed(host: str) -> bytes:
    """An address as 4 or 16 bytes."""
    if host == "localhost":
        host = "127.0.0.1"
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


_LOOPBACK_6: Final = bytes(15) + b"\x01"


def _addresses(servers: Mapping[str, Server]) -> Iterator[Problem]:
    by_port: dict[int, list[tuple[str, str]]] = {}
    for name, server in servers.items():
        for other, host in by_port.get(server.port, ()):
            if _overlap(_packed(host), _packed(server.host)):
                why = f"{host} and {server.host} overlap" if host != server.host else f"both listen on {host}"
                message = f'port {server.port} is taken by server "{other}" ({why})'
                yield Problem("E304", ("servers", name, "port"), message, "give one of the two another port")
                break
        by_port.setdefault(server.port, []).append((name, server.host))


def _overlap(one: bytes, other: bytes) -> bool:
    """Whether two addresses cannot be bound with one port: equal, or one is a wildcard that covers the other."""
    if one == other:
        return True
    for wildcard, address in ((one, other), (other, one)):
        if not any(wildcard) and (len(wildcard) == len(address) or len(wildcard) == 16):
            return True  # :: takes IPv4 too, on systems with dual-stack sockets
    return False
