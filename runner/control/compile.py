"""`python -m runner.control.compile FD`: the process behind `runner.control.compiler`."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

from runner.control.compiled import Compiled, Request
from runner.errors import Diagnostic, ManifestError, NotDownloaded
from runner.machine import machine_memory
from runner.manifest.checks import is_path
from runner.manifest.load import Loaded, load_manifest
from runner.options import Options, configured, state_dir
from runner.plan.digests import DigestCache
from runner.plan.resolve import resolve


def compile_manifest(request: Request) -> Compiled:
    """One request's answer; whatever is wrong with the manifest is part of it."""
    path, name, digests = request
    digests = digests or DigestCache()
    try:
        options = _options()
        loaded = load_manifest(path, os.environ)
    except ManifestError as error:
        return Compiled(path, diagnostics=tuple(error.diagnostics), digests=digests)
    known: dict[str, Any] = {
        "path": loaded.path,
        "name": loaded.manifest.name,
        "files": (*loaded.files, *_local_sources(loaded)),
        "options": options,
        "digests": digests,
    }
    try:
        _check_name(loaded, name)
        desired = resolve(loaded, machine_memory=machine_memory(), cache=digests)
    except ManifestError as error:
        missing = (error.repo, error.revision) if isinstance(error, NotDownloaded) else None
        return Compiled(diagnostics=tuple(error.diagnostics), missing=missing, **known)
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
                Diagnostic("environment", 0, 0, f"MLX_RUN_{'_'.join(map(str, e['loc'])).upper()}", e["msg"])
                for e in error.errors(include_url=False, include_input=False)
            ]
        ) from None


def _check_name(loaded: Loaded, name: str | None) -> None:
    if name is not None and loaded.manifest.name != name:
        message = f"is {loaded.manifest.name!r}, but this runner was started as {name!r}"
        hint = f"keep the name, or `mlx-run down {name}` first"
        raise ManifestError([loaded.at(("name",), message, hint)])


def _local_sources(loaded: Loaded) -> tuple[Path, ...]:
    """Folders whose contents are part of the deployment, whether they are there (yet) or not."""
    models = loaded.manifest.models.values()
    sources = [s for m in models for s in (m.source, *(a.source for a in m.adapters.values())) if is_path(s)]
    return tuple(dict.fromkeys(loaded.path.parent / Path(source).expanduser() for source in sources))


def main(descriptor: int) -> int:
    """Answer requests until the other side is gone."""
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
        while True:
            try:
                request = pickle.load(stream)  # noqa: S301 - from the process that started this one
            except EOFError:
                return 0
            pickle.dump(compile_manifest(request), stream)
            stream.flush()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
