"""`python -m runner.control.compile FD`: the process behind `runner.control.compiler`."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.control.compiled import Compiled, Request
from runner.errors import Diagnostic, ManifestError
from runner.machine import machine_memory
from runner.manifest.checks import is_path
from runner.manifest.inputs import Inputs
from runner.manifest.load import Loaded, load_manifest
from runner.manifest.models import Adapter, Draft, Model
from runner.manifest.presence import from_home
from runner.manifest.tree import KeyPath
from runner.options import Options, configured, state_dir
from runner.plan.digests import DigestCache
from runner.plan.listeners import certificate
from runner.plan.resolve import survey


def compile_manifest(request: Request, cache: DigestCache | None = None) -> Compiled:
    """One request's answer; whatever is wrong with the manifest is part of it.

    `cache` is what earlier requests to this process have read.
    """
    cache = cache or _unsealed(request.digests)
    compiled = _compile(request, cache)
    return replace(compiled, digests=pickle.dumps(cache, pickle.HIGHEST_PROTOCOL))


def _unsealed(digests: bytes | None) -> DigestCache:
    """What an earlier process has read."""
    if digests is None:
        return DigestCache()
    cache: DigestCache = pickle.loads(digests)  # noqa: S301 - from the process that started this one
    return cache


def _compile(request: Request, digests: DigestCache) -> Compiled:
    paths, name, changes = request.paths, request.name, request.changes
    inputs = Inputs()
    known: dict[str, Any] = {"paths": paths, "inputs": inputs, "changes": changes}
    try:
        known["options"] = _options()
        loaded = load_manifest(paths, os.environ, inputs, frozen=request.frozen, changes=changes)
    except ManifestError as error:
        return Compiled(diagnostics=tuple(error.diagnostics), **known)
    known |= {"name": loaded.manifest.name, "models": tuple(loaded.manifest.models), "hub_token": loaded.hub_token}
    try:
        _check_name(loaded, name)
        for folder in _local_sources(loaded):
            inputs.look(folder)
        _read_certificates(loaded, inputs)
        desired, missing = survey(loaded, machine_memory=machine_memory(), cache=digests, changes=changes)
    except ManifestError as error:
        return Compiled(diagnostics=tuple(error.diagnostics), warnings=loaded.warnings, **known)
    known["warnings"] = (*loaded.warnings, *desired.warnings)
    if missing:
        first = desired.downloads[0]
        return Compiled(diagnostics=tuple(missing), missing=(first.repo, first.revision), provisional=desired, **known)
    return Compiled(desired=desired, **known)


def _options() -> Options:
    if not configured(os.environ):
        return Options(state_dir())
    # Imported here: 60 ms on the way to an open port, and few people set any of it.
    from pydantic import ValidationError  # noqa: PLC0415

    from runner.settings import Settings  # noqa: PLC0415

    try:
        return Settings().options()
    except ValidationError as error:
        raise ManifestError(
            [
                Diagnostic(
                    "environment", 0, 0, f"MLX_RUN_{'_'.join(map(str, e['loc'])).upper()}", e["msg"], code="E510"
                )
                for e in error.errors(include_url=False, include_input=False)
            ]
        ) from None


def _check_name(loaded: Loaded, name: str | None) -> None:
    if name is not None and loaded.manifest.name != name:
        message = f"is {loaded.manifest.name!r}, but this runner was started as {name!r}"
        hint = f"keep the name, or `mlx-run down {name}` first"
        raise ManifestError([loaded.at(("name",), message, hint, code="E308")])


def _read_certificates(loaded: Loaded, inputs: Inputs) -> None:
    """So that a renewed certificate is an edit; what is wrong with one is said when it is resolved."""
    for name, server in loaded.manifest.servers.items():
        for file in certificate(loaded, name, server.tls) if server.tls else ():
            with suppress(OSError):
                inputs.read(file)


def _local_sources(loaded: Loaded) -> Iterator[Path]:
    """Folders whose contents are part of the deployment, whether they are there (yet) or not.

    `org/name` without a revision is a folder too where there is one, and one may appear.
    """
    for name, model in loaded.manifest.models.items():
        path: KeyPath = ("models", name)
        places: list[tuple[KeyPath, Model | Adapter | Draft]] = [(path, model)]
        places += [((*path, "adapters", adapter), entry) for adapter, entry in model.adapters.items()]
        if model.draft is not None:
            places.append(((*path, "draft"), model.draft))
        for at, entry in places:
            if entry.revision is None or is_path(entry.source):
                yield loaded.folder((*at, "source")) / from_home(entry.source)


def main(descriptor: int) -> int:
    """Answer requests until the other side is gone."""
    cache: DigestCache | None = None
    with (
        suppress(ConnectionError),  # it left before it had its answer
        socket.socket(fileno=descriptor) as connection,
        connection.makefile("rwb") as stream,
    ):
        while True:
            try:
                request = Request(*pickle.load(stream))  # noqa: S301 - from the process that started this one
            except EOFError:
                break
            cache = cache or _unsealed(request.digests)
            pickle.dump(compile_manifest(request, cache), stream)
            stream.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
