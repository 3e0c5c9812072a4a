"""Control groups of Linux (cgroup v2): where this process may make some, and what is done with one.

Only a part of the tree that is ours is written to (systemd's "Control Group APIs and Delegation", the kernel's
"cgroup-v2"): what systemd delegates, or what a container has to itself. Version 1 is left alone: nothing there says
what is delegated, and distributions have given it up.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Final, NamedTuple

_LEAF: Final = "mlx-run-runner"
"""The group that a runner moves to where it was in the one that its engines' groups are made in: a group that hands
controllers down has no processes of its own."""

_UNITS: Final = (".service", ".scope", ".slice")
"""How the groups are called that systemd itself makes, as a user's does in what is delegated to it."""

_TRIES: Final = 5
"""How often processes are moved: those that start meanwhile start where they came from."""


class NoGroup(Exception):  # noqa: N818 - as those of runner.errors are called
    """No control groups can be had, and why."""


class Ground(NamedTuple):
    """Where groups can be made. `leaf` is where the processes that are there have to go first, None where there are
    none; `container`: whoever is there may be moved, for all of it is one container."""

    base: Path
    leaf: Path | None
    container: bool = False


def ground(proc: Path = Path("/proc")) -> Ground:
    """Where this process may make groups with a memory limit. Nothing is changed. Raises NoGroup."""
    if sys.platform != "linux":
        raise NoGroup("control groups are a thing of Linux")
    own, top = _own(proc)
    if not (own / "cgroup.type").exists():  # the root of the whole tree, where processes may be beside groups
        found = Ground(own, None)
    elif own.name == _LEAF or (_delegated(own.parent) and not own.name.endswith(_UNITS)):
        found = Ground(own.parent, None)
    elif _delegated(own) or top:
        if own.name.endswith(".service"):
            # Started again while engines of before are there, it would be put where no process may be any more.
            raise NoGroup(f"{own} is delegated without DelegateSubgroup=, which takes systemd 254")
        found = Ground(own, own / _LEAF, container=top)
    else:
        raise NoGroup(f"{own} is not delegated to this process")
    if "memory" not in _words(found.base / "cgroup.controllers"):
        raise NoGroup(f"the memory controller is not handed down to {found.base}")
    for path in (found.base, found.base / "cgroup.procs", found.base / "cgroup.subtree_control"):
        if not os.access(path, os.W_OK):
            raise NoGroup(f"{path} cannot be written")
    return found


def _own(proc: Path) -> tuple[Path, bool]:
    """The folder of this process's group, and whether it is the topmost that it can see."""
    mounts = [_mount(line) for line in _lines(proc / "self" / "mountinfo")]
    tops = [(root, at) for kind, root, at in mounts if kind == "cgroup2"]
    paths = [line[3:] for line in _lines(proc / "self" / "cgroup") if line.startswith("0::")]
    if not tops or not paths:
        raise NoGroup("there is no cgroup v2 here")
    root, at = tops[-1]
    try:
        inside = Path(paths[0]).relative_to(root)
    except ValueError:
        raise NoGroup(f"this process's group {paths[0]} is not under what is mounted at {at}") from None
    if ".." in inside.parts:
        raise NoGroup("this process's group lies outside of its container's")
    return at / inside, paths[0] == "/"


def _mount(line: str) -> tuple[str, str, Path]:
    """Kind of file system, root of the mount, and where it is."""
    left, _, right = line.partition(" - ")
    fields = left.split(" ")
    at = fields[4].replace("\\040", " ").replace("\\134", "\\")
    return right.split(" ")[0], fields[3], Path(at)


def _delegated(group: Path) -> bool:
    """Whether systemd says so of a group: of a user's since 251, of the system's to those who may read that."""
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(group, name) == b"1":
                return True
    return False


def prepare(found: Ground, proc: Path = Path("/proc")) -> None:
    """Have groups under `found.base` get a memory controller. Raises NoGroup; then everything is as before."""
    control = found.base / "cgroup.subtree_control"
    if "memory" in _words(control):
        return
    moved: list[int] = []
    try:
        if found.leaf is not None:
            _clear(found, found.leaf, moved, proc)
        _write(control, "+memory")
    except (OSError, NoGroup) as error:
        _put_back(found, moved)
        raise error if isinstance(error, NoGroup) else NoGroup(f"{control}: {error.strerror}") from None


def _clear(found: Ground, leaf: Path, moved: list[int], proc: Path) -> None:
    leaf.mkdir(exist_ok=True)
    for _ in range(_TRIES):
        pids = [int(pid) for pid in _words(found.base / "cgroup.procs")]
        strangers = [pid for pid in pids if not (found.container and pid) and not _related(pid, proc)]
        if strangers:
            raise NoGroup(f"processes that are not ours are in {found.base}: {strangers[:5]}")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                _write(leaf / "cgroup.procs", str(pid))
                moved.append(pid)
        if not pids:
            return


def _put_back(found: Ground, moved: list[int]) -> None:
    for pid in moved:
        with contextlib.suppress(OSError):
            _write(found.base / "cgroup.procs", str(pid))
    if found.leaf is not None:
        with contextlib.suppress(OSError):
            found.leaf.rmdir()


def _related(pid: int, proc: Path) -> bool:
    """Whether it is this process, one that started it, or one that it started. 0 is one that cannot be seen."""
    ours = int(_words(proc / "self" / "stat")[0])
    return pid in _line_of(ours, proc) or ours in _line_of(pid, proc)


def _line_of(pid: int, proc: Path) -> list[int]:
    """A process, its parent, and so on."""
    found: list[int] = []
    while pid > 0:
        found.append(pid)
        try:
            stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
    return found


class Group:
    """One group, by its folder. What fails here because it is gone, or was never made, is passed over: it holds what
    must not happen, and nothing waits for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        limit = "".join(_words(path / "memory.max"))
        self.limit = int(limit) if limit.isdigit() else 0

    @classmethod
    def make(cls, path: Path) -> Group:
        """A new one, whose processes the kernel ends together. Raises OSError."""
        path.mkdir()
        made = cls(path)
        try:
            _write(path / "memory.oom.group", "1")
        except OSError:
            made.remove()
            raise
        return made

    def allow(self, limit: int) -> None:
        """So many bytes from now on, 0 for any number. Below what is in use, the kernel ends what is in it."""
        if limit != self.limit:
            with contextlib.suppress(OSError):
                _write(self.path / "memory.max", str(limit) if limit else "max")
                self.limit = limit

    def holds(self, pid: int) -> bool:
        """Whether a process is in it."""
        return str(pid) in _words(self.path / "cgroup.procs")

    @property
    def kills(self) -> int:
        """How many of its processes the kernel has ended because it was at its limit, or the machine out of memory."""
        return self._count("oom_kill")

    @property
    def was_full(self) -> bool:
        """Whether it was at its own limit, and nothing in it could be given back."""
        return self._count("oom") > 0

    def _count(self, event: str) -> int:
        counts = dict(line.split() for line in _lines(self.path / "memory.events"))
        return int(counts.get(event, 0))

    def remove(self) -> bool:
        """Whether it is gone; False while there are processes in it."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _write(path: Path, text: str) -> None:
    """Write to a file that the kernel has made; none is created where it has not."""
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, text.encode("ascii"))
    finally:
        os.close(file)
