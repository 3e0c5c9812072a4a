"""The quantised copies in a cache folder: what they are called, who holds them, and how one goes.

A copy is held by a shared lock on its folder: by the runner from when it is looked up until an engine has loaded it,
and by that engine for as long as it lives (`runner.engine.command`), whoever started it. Who removes one has it
alone. The kernel drops locks with their processes, so nothing is held by the dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from runner.machine import mlx_version
from runner.plan.spec import ModelSpec

CONVERTING: Final = "converting.lock"
"""Who makes copies in a folder has it locked: one at a time."""

PARTIAL: Final = ".partial"
REMOVED: Final = ".removed"

_FORMAT: Final = "1"
"""Of how copies are made: another is another name."""

_NOTE: Final = "made-of.json"


class Copy(NamedTuple):
    """One that is whole. `source` is what it was made of, as a manifest names it, empty where it does not say."""

    folder: Path
    source: str
    size: int


def place_of(converted: Path, spec: ModelSpec) -> Path:
    """What an engine of `spec` loads, whether it is there (yet) or not: its source, or a copy in `converted`."""
    wanted = spec.quantization
    if wanted is None:
        return spec.path
    made_of = "\0".join((_FORMAT, spec.weights_digest, wanted.key, spec.dtype, mlx_version()))
    digest = hashlib.blake2b(made_of.encode(), digest_size=12).hexdigest()
    return converted / f"{digest}-{wanted.mode}{wanted.bits}"


def note(folder: Path, source: str) -> None:
    """Write into a copy what it is one of. Raises OSError."""
    (folder / _NOTE).write_text(json.dumps({"source": source}), encoding="utf-8")


def hold(folder: Path) -> int | None:
    """A descriptor that keeps a copy from being removed until it is closed; None where it is not there (any more)."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if _share(held) and _is(held, folder):
        return held
    os.close(held)
    return None


def _share(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False  # it is being removed
    except OSError:
        return True  # a file system without locks
    return True


def _is(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def copies(converted: Path) -> Iterator[Copy]:
    """All that are whole, by name."""
    for folder in sorted(converted.iterdir()) if converted.is_dir() else ():
        if folder.is_dir() and folder.suffix not in (PARTIAL, REMOVED):
            yield Copy(folder, _source(folder), size_of(folder))


def _source(folder: Path) -> str:
    try:
        source: Any = json.loads((folder / _NOTE).read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return source if isinstance(source, str) else ""


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder's."""
    found = 0
    for file in path.rglob("*") if path.is_dir() else (path,):
        with contextlib.suppress(OSError):
            found += file.stat().st_size if file.is_file() else 0
    return found


def is_held(folder: Path) -> bool:
    """Whether a process uses a copy."""
    with _alone(folder) as alone:
        return not alone


def remove(folder: Path) -> bool:
    """Take a copy away, at once for whoever looks; False where it is used, and stays. Raises OSError."""
    with _alone(folder) as alone:
        if alone:
            away = folder.with_name(f"{folder.name}.{os.getpid()}{REMOVED}")
            folder.rename(away)
            shutil.rmtree(away)
    return alone


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether nobody else has a folder or a file locked, which holds until the end of the block."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def leftovers(converted: Path) -> list[Path]:
    """What was cut off: copies that nobody is making, and what somebody was ended while removing."""
    with _not_converting(converted) as idle:
        return _leftovers(converted) if idle else []


def sweep(converted: Path) -> None:
    """Remove `leftovers`, unless somebody makes a copy."""
    with _not_converting(converted) as idle:
        if idle:
            sweep_alone(converted)


def sweep_alone(converted: Path) -> None:
    """The same for who has CONVERTING locked."""
    for left in _leftovers(converted):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _leftovers(converted: Path) -> list[Path]:
    found = (*converted.glob(f"*{PARTIAL}"), *converted.glob(f"*{PARTIAL}.json"), *converted.glob(f"*{REMOVED}"))
    return sorted(found)


@contextlib.contextmanager
def _not_converting(converted: Path) -> Iterator[bool]:
    if not converted.is_dir():
        yield False
        return
    (converted / CONVERTING).touch()
    with _alone(converted / CONVERTING) as idle:
        yield idle


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file alone, if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
