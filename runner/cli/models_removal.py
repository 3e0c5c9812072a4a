"""`mlx-run models rm` and `prune`: what goes, asked first, and what it frees."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runner.cli.text import format_bytes
from runner.control import copies
from runner.control.copies import Copy
from runner.control.uses import Uses, known_uses
from runner.errors import RunnerError, UsageError
from runner.hub.cache import hub_cache
from runner.hub.store import Stored, leftovers, remove, stored
from runner.options import Options, state_dir


class Going(NamedTuple):
    """What is to be removed: commits of the hub's cache, downloads that were given up, quantised copies, and of those
    what was cut off."""

    commits: Sequence[Stored] = ()
    partial: Sequence[Path] = ()
    copies: Sequence[Copy] = ()
    cut_off: Sequence[Path] = ()

    @property
    def names(self) -> list[str]:
        """As `--json` has them."""
        return [f"{held.repo}@{held.commit}" for held in self.commits] + [str(copy.folder) for copy in self.copies]

    @property
    def size(self) -> int:
        """Bytes."""
        whole = sum(held.size for held in self.commits) + sum(copy.size for copy in self.copies)
        return whole + sum(copies.size_of(path) for path in (*self.partial, *self.cut_off))

    def lines(self) -> list[str]:
        """For people."""
        shown = [
            f"{held.repo}@{held.commit[:12]}  {format_bytes(held.size)}  {', '.join(held.refs)}".rstrip()
            for held in self.commits
        ]
        shown += [
            f"{copy.folder.name}, a copy of {copy.source or 'a model'}  {format_bytes(copy.size)}"
            for copy in self.copies
        ]
        shown += [f"{len(self.partial)} downloads that were given up"] if self.partial else []
        return shown + ([f"{len(self.cut_off)} copies that were cut off"] if self.cut_off else [])


def rm(arguments: argparse.Namespace) -> int:
    """0. Raises RunnerError and UsageError."""
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
    used = {use.folder: use.where for use in uses_of(arguments).uses}
    in_use = [used[held.folder] for held in asked if held.folder in used]
    if in_use:
        where = ", ".join(in_use)
        raise RunnerError(f"{arguments.target} is used by {where}", hint="Take it out of that manifest first.")
    if any(copies.is_held(held.folder) for held in asked):
        raise RunnerError(f"{arguments.target} is used by an engine", hint="Stop the runner that has it first.")
    return _remove(arguments, cache, Going(asked))


def prune(arguments: argparse.Namespace) -> int:
    """0. Raises RunnerError and UsageError."""
    cache, known = hub_cache(os.environ), uses_of(arguments)
    say_notes(known)
    if known.notes and not arguments.dry_run:
        raise RunnerError("not all manifests can be read, so it is not known what they use", hint="Correct them first.")
    used = {use.folder for use in (*known.uses, *known.copies)}
    unused = {held.folder: held for held in stored(cache) if held.folder not in used}
    idle = {copy.folder: copy for copy in copies.copies(converted_copies()) if copy.folder not in used}
    for folder in [folder for folder in (*unused, *idle) if copies.is_held(folder)]:
        print(f"note: {folder} stays: an engine uses it", file=sys.stderr)
        unused.pop(folder, None)
        idle.pop(folder, None)
    cut_off = copies.leftovers(converted_copies())
    return _remove(arguments, cache, Going([*unused.values()], leftovers(cache), [*idle.values()], cut_off))


def _remove(arguments: argparse.Namespace, cache: Path, going: Going) -> int:
    """Show what goes, ask, and remove it."""
    lines = going.lines()
    doing = not arguments.dry_run and bool(lines)
    if lines and not arguments.json:
        print("\n".join(lines))
    if doing and not arguments.yes:
        _ask(f"Remove {'them' if len(going.names) != 1 else 'it'}, {format_bytes(going.size)}?")
    freed = _free(cache, going) if doing else 0
    if arguments.json:
        removed, would = (going.names, []) if doing else ([], going.names)
        print(json.dumps({"removed": removed, "would_remove": would, "bytes": freed}))
    elif not lines:
        print(f"Nothing to remove: all that is in {cache} is used.")
    else:
        print(f"{format_bytes(freed)} are free again." if doing else "Dry run: nothing was removed.")
    return 0


def _free(cache: Path, going: Going) -> int:
    """Remove it. Returns how many bytes that were; what came into use meanwhile stays."""
    try:
        freed = sum(copies.size_of(path) for path in (*going.partial, *going.cut_off))
        for path in going.partial:
            path.unlink()
        if going.cut_off:
            copies.sweep(converted_copies())
        freed += sum(copy.size for copy in going.copies if copies.remove(copy.folder))
        return freed + remove(cache, going.commits)
    except BlockingIOError:
        raise RunnerError("one of them is being fetched just now", hint="Try again when that is done.") from None
    except OSError as error:
        raise RunnerError(f"cannot remove {error.filename}: {error.strerror}") from None


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


def uses_of(arguments: argparse.Namespace) -> Uses:
    """What the runners of this user and the given manifest use."""
    files = tuple(Path(name).absolute() for name in arguments.files or ())
    return known_uses(state_dir(), hub_cache(os.environ), converted_copies(), [files] if files else ())


def converted_copies() -> Path:
    """Where quantised copies are."""
    return Options(state_dir()).converted


def say_notes(known: Uses) -> None:
    """What is not known, on stderr."""
    for note in known.notes:
        print(f"note: {note}", file=sys.stderr)
