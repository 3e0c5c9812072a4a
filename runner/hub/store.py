"""What lies in the hub's cache, commit by commit, and how to take something out of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from runner.hub.cache import repository

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_STALE: Final = 24 * 3600.0
"""Seconds after which a partial file that nobody holds was left behind."""


class Stored(NamedTuple):
    """One commit of a repository in the cache. `refs` are the branches and tags that mean it here; `size` is bytes, of
    its files, which other commits may share; `used` is when one was last read or written, seconds since the epoch."""

    repo: str
    commit: str
    folder: Path
    refs: tuple[str, ...]
    size: int
    used: float


def stored(cache: Path) -> Iterator[Stored]:
    """Every commit of every repository of models, by name, those that a ref means first."""
    for folder in sorted(cache.glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        refs = _refs(folder)
        commits = [path for path in folder.glob("snapshots/*") if _COMMIT.fullmatch(path.name)]
        for path in sorted(commits, key=lambda path: (path.name not in refs.values(), path.name)):
            names = tuple(name for name, commit in refs.items() if commit == path.name)
            yield Stored(repo, path.name, path, names, *_size_and_use(path))


def newest(commits: Collection[Stored]) -> Stored:
    """Of a repository the commit that main means here, else the one that came last."""
    main = next((held for held in commits if "main" in held.refs), None)
    return main or max(commits, key=lambda held: held.folder.stat().st_mtime_ns)


def _refs(folder: Path) -> dict[str, str]:
    root = folder / "refs"
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")):
        with contextlib.suppress(OSError, UnicodeError):
            found[str(path.relative_to(root))] = path.read_text(encoding="ascii").strip()
    return found


def _size_and_use(snapshot: Path) -> tuple[int, float]:
    size, used = 0, 0.0
    for path in snapshot.rglob("*"):
        with contextlib.suppress(OSError):
            found = path.stat()
            if path.is_file():
                size += found.st_size
                used = max(used, found.st_atime, found.st_mtime)
    return size, used


@contextlib.contextmanager
def in_use(cache: Path, repo: str, *, alone: bool) -> Iterator[None]:
    """While a repository is fetched, nobody removes of it: fetching takes a share, removing has to be `alone`. Raises
    BlockingIOError where somebody else fetches; who fetches waits for a removal."""
    path = cache / ".locks" / repository(cache, repo).name / "mlx-run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        yield


def remove(cache: Path, commits: Collection[Stored]) -> int:
    """Take commits out of the cache: their snapshots, the refs that mean them, and the blobs that no other commit of
    the repository shares. Returns how many bytes that were. Raises OSError; BlockingIOError of a repository that is
    being fetched."""
    freed = 0
    for repo in sorted({held.repo for held in commits}):
        with in_use(cache, repo, alone=True):
            freed += _remove_from(repository(cache, repo), [held for held in commits if held.repo == repo])
    return freed


def _remove_from(folder: Path, commits: Collection[Stored]) -> int:
    for held in commits:
        for ref in held.refs:
            (folder / "refs" / ref).unlink(missing_ok=True)
        _out_of_sight(held.folder)
        (folder / "trees" / f"{held.commit}.json").unlink(missing_ok=True)
    freed = _sweep(folder)
    if not any((folder / "snapshots").glob("*")) and not any((folder / "blobs").glob("*")):
        shutil.rmtree(folder)
    return freed


def _out_of_sight(snapshot: Path) -> None:
    """Gone at once for whoever looks, whatever ends this process."""
    away = snapshot.with_name(f"{snapshot.name}.{os.getpid()}.removed")
    snapshot.rename(away)
    shutil.rmtree(away)


def _sweep(folder: Path) -> int:
    """Remove the blobs that nothing shows; one that is being fetched stays."""
    shown = {_target(path) for path in folder.glob("snapshots/*/**/*") if path.is_symlink()}
    freed = 0
    for blob in (folder / "blobs").glob("*"):
        if blob.name not in shown and ".incomplete" not in blob.name:
            freed += blob.stat().st_size
            blob.unlink()
    return freed


def _target(link: Path) -> str:
    return link.readlink().name


def leftovers(cache: Path) -> list[Path]:
    """Partial files that nobody goes on with: a day old, and held by no process."""
    return [path for path in cache.glob("models--*--*/blobs/*.incomplete") if _is_left(path)]


def _is_left(path: Path) -> bool:
    try:
        if time.time() - path.stat().st_mtime < _STALE:
            return False
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
