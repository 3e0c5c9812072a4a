"""`mlx-run lock`: pins what a manifest's sources are, in a file beside it that goes under version control."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

from runner.cli.locate import add_manifest, manifests
from runner.cli.pull import is_repository
from runner.control.atomic import write_atomically
from runner.control.fetching import download_failed
from runner.errors import RunnerError, UsageError
from runner.hub.cache import hub_cache, is_offline
from runner.hub.download import Refused, listings
from runner.hub.jobs import Job, Listing
from runner.inspect.files import DigestCache
from runner.manifest.load import Loaded, load_manifest
from runner.manifest.lock import lock_path, lock_text
from runner.plan.locking import differences, make_lock, moved
from runner.plan.spec import Download

_ALL: Final = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_manifest(parser)
    parser.add_argument("--check", action="store_true", help="write nothing: 1, and what differs, if the lock is off")
    parser.add_argument(
        "--upgrade",
        nargs="?",
        action="append",
        const=_ALL,
        metavar="MODEL",
        help="ask the hub what branches mean now, of this model or of all (repeatable)",
    )
    parser.add_argument("--json", action="store_true", help="print what differs as JSON")
    parser.epilog = (
        "Writes NAME.lock.yaml beside NAME.yaml (of several files: beside the last): for each model, adapter and\n"
        "draft the commit, the size and digest of each file, and a digest of the tokenizer. Nothing is downloaded.\n"
        "What is locked stays so until --upgrade, or until the manifest asks for another source or revision.\n\n"
        "`apply` takes repositories as they are locked, and refuses files that differ. A folder is yours to change:\n"
        "that goes live with a warning. With `apply --frozen` it is an error, as is what the lock does not have.\n\n"
        "--check compares the lock with the manifest, and reads every file of it that is on this machine.\n\n"
        "example:\n  mlx-run lock prod.yaml\n  mlx-run lock --check prod.yaml\n"
        "  mlx-run lock --upgrade chat -f prod.yaml"
    )


def run(arguments: argparse.Namespace) -> int:
    """0; with --check 1 where something differs. Raises ManifestError, also where the hub does not answer."""
    wanted = [model for model in arguments.upgrade or () if model != _ALL]
    if wanted and not arguments.files and _is_file(wanted[-1]):
        arguments.files = [wanted.pop()]  # --upgrade FILE
    loaded = load_manifest(manifests(arguments), os.environ)
    if arguments.check:
        if arguments.upgrade:
            raise UsageError("--check writes nothing, so there is nothing to upgrade", hint="Give one of the two.")
        return _check(loaded, as_json=arguments.json)
    if unknown := [model for model in wanted if model not in loaded.manifest.models]:
        known = ", ".join(loaded.manifest.models)
        raise RunnerError(f"the manifest has no model {unknown[0]!r}", hint=f"Its models: {known}.")
    upgrade = () if not arguments.upgrade else (wanted or None)
    ask = None if is_offline(os.environ) else partial(_ask, loaded)
    made = make_lock(loaded, hub_cache(os.environ), DigestCache(), ask, upgrade)
    path = lock_path(loaded.paths)
    changed = list(moved(loaded.lock, made))
    if changed or loaded.lock is None:
        try:
            write_atomically(path, lock_text(loaded.paths[-1].name, made).encode(), mode=0o644)
        except OSError as error:
            raise RunnerError(f"cannot write {path}: {error.strerror}") from None
    if arguments.json:
        print(json.dumps({"file": str(path), "changed": [difference._asdict() for difference in changed]}))
    elif changed:
        print("\n".join(map(str, changed)))
        print(f"{path.name}: {len(made)} sources are locked.")
    else:
        print(f"{path.name}: nothing to do, {len(made)} sources are locked.")
    return 0


def _is_file(word: str) -> bool:
    return Path(word).is_file() or not is_repository(f"a/{word}")


def _ask(loaded: Loaded, downloads: list[Download]) -> Mapping[tuple[str, str], Listing]:
    try:
        jobs = [Job(d.repo, d.revision, d.kinds, code=d.code) for d in downloads]
        return asyncio.run(listings(jobs, token=loaded.hub_token))
    except Refused as refused:
        raise download_failed(downloads, refused.failures) from None


def _check(loaded: Loaded, *, as_json: bool) -> int:
    found = list(differences(loaded, hub_cache(os.environ), DigestCache()))
    if as_json:
        print(json.dumps({"ok": not found, "differences": [difference._asdict() for difference in found]}))
    elif found:
        print("\n".join(map(str, found)))
    else:
        held = loaded.lock.sources if loaded.lock is not None else {}
        print(f"{lock_path(loaded.paths).name}: ok ({len(held)} sources)")
    return int(bool(found))
