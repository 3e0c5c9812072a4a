"""`mlx-run models`: what is in the hub's cache and in manifests' folders, what the hub has, and how to make room."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from runner.cli.locate import add_files
from runner.cli.models_text import card, listing, matches
from runner.cli.text import format_bytes
from runner.control.fetching import download_failed
from runner.control.searching import search_hub
from runner.control.uses import Uses, known_uses
from runner.errors import RunnerError, UsageError
from runner.hub.cache import hub_cache
from runner.hub.download import Refused, listings
from runner.hub.jobs import Job
from runner.hub.store import Stored, leftovers, remove, stored
from runner.inspect.files import DigestCache
from runner.machine import this_machine
from runner.manifest.load import load_manifest
from runner.options import state_dir
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
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="search: so many (default: 20)")
    parser.add_argument("-y", "--yes", action="store_true", help="rm, prune: do not ask")
    parser.add_argument("--dry-run", action="store_true", help="rm, prune: show what would go, and remove nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = (
        "list    models and adapters: of the hub's cache, and of the folders that manifests use\n"
        "search  repositories of the hub, with the exact size of their weights and whether that fits this machine\n"
        "show    one of them: a repository (ORG/NAME or ORG/NAME@COMMIT), here or on the hub, or a folder\n"
        "rm      take a repository, or one commit of it, out of the hub's cache; not what is used\n"
        "prune   take out what no manifest uses, and downloads that were given up\n\n"
        "Used is what a runner serves, what the manifests of this user's runners ask for (as they are locked), and\n"
        "what -f FILE asks for. Other programs that share the cache are not known here: look before you prune.\n\n"
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
    known = _uses(arguments)
    found = available(hub_cache(os.environ), known.uses, DigestCache())
    if arguments.json:
        print(json.dumps({"models": [one.as_json for one in found], "notes": list(known.notes)}, indent=2))
    else:
        print(listing(found, hub_cache(os.environ)))
        _say_notes(known)
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
    uses, digests = _uses(arguments).uses, DigestCache()
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


def _rm(arguments: argparse.Namespace) -> int:
    if Path(arguments.target).expanduser().is_dir():
        raise RunnerError(f"{arguments.target} is a folder of yours", hint="Remove it with the tools of your system.")
    cache = hub_cache(os.environ)
    repo, _, revision = arguments.target.partition("@")
    asked = [
        held
        for held in stored(cache)
        if held.repo == repo and (not revision or held.commit.startswith(revision) or revision in held.refs)
    ]
    if not asked:
        raise RunnerError(f"{arguments.target} is not in {cache}", hint="`mlx-run models` shows what is.")
    used = {use.folder: use.where for use in _uses(arguments).uses}
    in_use = [used[held.folder] for held in asked if held.folder in used]
    if in_use:
        where = ", ".join(in_use)
        raise RunnerError(f"{arguments.target} is used by {where}", hint="Take it out of that manifest first.")
    return _remove(arguments, cache, asked, [])


def _prune(arguments: argparse.Namespace) -> int:
    cache, known = hub_cache(os.environ), _uses(arguments)
    used = {use.folder for use in known.uses}
    _say_notes(known)
    if known.notes and not arguments.dry_run:
        raise RunnerError("not all manifests can be read, so it is not known what they use", hint="Correct them first.")
    return _remove(arguments, cache, [held for held in stored(cache) if held.folder not in used], leftovers(cache))


def _remove(arguments: argparse.Namespace, cache: Path, commits: Sequence[Stored], partial: Sequence[Path]) -> int:
    """Show what goes, ask, and remove it."""
    size = sum(held.size for held in commits) + sum(path.stat().st_size for path in partial)
    names = [f"{held.repo}@{held.commit}" for held in commits]
    doing = not arguments.dry_run and bool(commits or partial)
    if not arguments.json:
        for held in commits:
            print(f"{held.repo}@{held.commit[:12]}  {format_bytes(held.size)}  {', '.join(held.refs)}".rstrip())
        if partial:
            print(f"{len(partial)} downloads that were given up")
    if doing and not arguments.yes:
        _ask(f"Remove {'them' if len(names) != 1 else 'it'}, {format_bytes(size)}?")
    freed = 0
    if doing:
        try:
            freed = sum(path.stat().st_size for path in partial)
            for path in partial:
                path.unlink()
            freed += remove(cache, commits)
        except BlockingIOError:
            raise RunnerError("one of them is being fetched just now", hint="Try again when that is done.") from None
        except OSError as error:
            raise RunnerError(f"cannot remove {error.filename}: {error.strerror}") from None
    if arguments.json:
        print(json.dumps({"removed": names if doing else [], "would_remove": [] if doing else names, "bytes": freed}))
    elif not commits and not partial:
        print(f"Nothing to remove: all that is in {cache} is used.")
    else:
        print(f"{format_bytes(freed)} are free again." if doing else "Dry run: nothing was removed.")
    return 0


def _ask(question: str) -> None:
    """Raises RunnerError where the answer is no, and UsageError where there is nobody to give one."""
    if not sys.stdin.isatty():
        raise UsageError("there is nobody to ask", hint="Say --yes to remove it, or --dry-run to see what it would be.")
    try:
        answer = input(f"{question} [no]: ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise RunnerError("nothing was removed")


def _uses(arguments: argparse.Namespace) -> Uses:
    files = tuple(Path(name).absolute() for name in arguments.files or ())
    return known_uses(state_dir(), hub_cache(os.environ), [files] if files else ())


def _token(arguments: argparse.Namespace) -> str:
    if not arguments.files:
        return ""
    return load_manifest([Path(name) for name in arguments.files], os.environ).hub_token


def _say_notes(known: Uses) -> None:
    for note in known.notes:
        print(f"note: {note}", file=sys.stderr)


_RUN: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "list": _list,
    "search": _search,
    "show": _show,
    "rm": _rm,
    "prune": _prune,
}
