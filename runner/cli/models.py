"""`mlx-run models`: what is in the hub's cache and in manifests' folders, what the hub has, and how to make room."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from runner.cli.locate import add_files
from runner.cli.models_removal import converted_copies, prune, rm, say_notes, uses_of
from runner.cli.models_text import card, listing, matches
from runner.cli.text import count, format_bytes
from runner.control.fetching import download_failed
from runner.control.searching import search_hub
from runner.control.uses import available_here
from runner.errors import UsageError
from runner.hub.cache import hub_cache
from runner.hub.download import Refused, listings
from runner.hub.jobs import Job
from runner.inspect.files import DigestCache
from runner.machine import this_machine
from runner.manifest.load import load_manifest
from runner.plan.available import Available, available, of_folder, verdict
from runner.plan.candidates import examine
from runner.plan.spec import Download
from runner.plan.verdict import budget, verdict_of_files

MIXED: Final = True
"""Words and options in any order."""

_ACTIONS: Final = ("list", "search", "show", "rm", "prune")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("action", nargs="?", default="list", choices=_ACTIONS, metavar="|".join(_ACTIONS))
    parser.add_argument("target", nargs="*", metavar="QUERY|SOURCE", help="search: words; show and rm: a source")
    add_files(parser, about="a manifest whose sources count, too (overlays after it)")
    parser.add_argument("--limit", type=count, default=20, metavar="N", help="search: so many (default: 20)")
    parser.add_argument("-y", "--yes", action="store_true", help="rm, prune: do not ask")
    parser.add_argument("--dry-run", action="store_true", help="rm, prune: show what would go, and remove nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = (
        "list    models and adapters: of the hub's cache, of the folders that manifests use, and quantised copies\n"
        "search  repositories of the hub, with the exact size of their weights and whether that fits this machine\n"
        "show    one of them: a repository (ORG/NAME or ORG/NAME@COMMIT), here or on the hub, or a folder\n"
        "rm      take a repository, or one commit of it, out of the hub's cache; not what is used\n"
        "prune   take out what no manifest uses, quantised copies of models too, and downloads that were given up\n\n"
        "Used is what a runner serves, what the manifests of this user's runners ask for (as they are locked), and\n"
        "what -f FILE asks for. A copy that an engine has loaded stays, too; one that went is made again when needed.\n"
        "Other programs that share the hub's cache are not known here: look before you prune.\n\n"
        "example:\n  mlx-run models\n  mlx-run models search llama 3.2 1b 4bit\n  mlx-run models prune --dry-run"
    )


def run(arguments: argparse.Namespace) -> int:
    """0. Raises UsageError, RunnerError and DownloadFailed."""
    arguments.target = " ".join(arguments.target)
    needs = arguments.action in ("search", "show", "rm")
    if needs and not arguments.target:
        raise UsageError(f"models {arguments.action} of what?", hint="Give a name, such as org/name.")
    if not needs and arguments.target:
        raise UsageError(f"models {arguments.action} takes no {arguments.target!r}")
    return _RUN[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    known = uses_of(arguments)
    found = available_here(hub_cache(os.environ), converted_copies(), known)
    if arguments.json:
        print(json.dumps({"models": [one.as_json for one in found], "notes": list(known.notes)}, indent=2))
    else:
        print(listing(found, hub_cache(os.environ)))
        say_notes(known)
    return 0


def _search(arguments: argparse.Namespace) -> int:
    token = _token(arguments)
    try:
        found = asyncio.run(search_hub(arguments.target, max(1, arguments.limit), token))
    except Refused as refused:
        raise download_failed((), refused.failures) from None
    if arguments.json:
        print(json.dumps([one.as_json for one in found], indent=2))
    else:
        print(matches(found) if found else f"The hub has nothing for {arguments.target!r}.")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    held = _held(arguments)
    if held is None:
        return _show_from_the_hub(arguments)
    judgement = None
    if held.kind == "model":
        candidate = examine(held.folder, DigestCache(), source=held.source)
        judgement = verdict(candidate, this_machine())
    if arguments.json:
        fits = None if judgement is None else {"fits": judgement.fits, "why": judgement.why}
        print(json.dumps({**held.as_json, "verdict": fits}, indent=2))
    else:
        print(card(held, judgement))
    return 0


def _held(arguments: argparse.Namespace) -> Available | None:
    """What is here of the source that is asked for; of a repository main, else what came last."""
    uses, digests = uses_of(arguments).uses, DigestCache()
    folder = Path(arguments.target).expanduser()
    if folder.is_dir():
        whole = folder.absolute()
        where = tuple(use.where for use in uses if use.folder == whole)
        return of_folder(whole, where, digests)
    repo, _, revision = arguments.target.partition("@")
    found = [one for one in available(hub_cache(os.environ), uses, digests) if one.source == repo and one.commit]
    if revision:
        return next((one for one in found if one.commit.startswith(revision) or revision in one.refs), None)
    return next((one for one in found if "main" in one.refs), max(found, key=lambda one: one.used, default=None))


def _show_from_the_hub(arguments: argparse.Namespace) -> int:
    repo, _, revision = arguments.target.partition("@")
    job = Job(repo, revision or "main")
    try:
        (found,) = asyncio.run(listings([job], token=_token(arguments))).values()
    except Refused as refused:
        raise download_failed([Download(job.repo, job.revision, None, ())], refused.failures) from None
    judgement = verdict_of_files(found.files, this_machine()) if "model" in found.kinds else None
    if arguments.json:
        shown = {"source": repo, "revision": job.revision, "commit": found.commit, "kinds": list(found.kinds)}
        files = [file._asdict() for file in found.files]
        fits = None if judgement is None else {"fits": judgement.fits, "why": judgement.why}
        print(json.dumps({**shown, "here": False, "files": files, "verdict": fits}, indent=2))
        return 0
    total = sum(file.size for file in found.files)
    print(f"{repo} ({job.revision}) is on the hub, and not in the cache: commit {found.commit}")
    print(f"  {found.kinds[0]}, {format_bytes(total)} in {len(found.files)} files to download")
    if judgement is not None:
        room = format_bytes(budget(this_machine()))
        print(f"  {judgement.why} ({format_bytes(judgement.needed)} of weights, {room} for models)")
    return 0


def _token(arguments: argparse.Namespace) -> str:
    if not arguments.files:
        return ""
    return load_manifest([Path(name) for name in arguments.files], os.environ).hub_token


_RUN: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "list": _list,
    "search": _search,
    "show": _show,
    "rm": rm,
    "prune": prune,
}
