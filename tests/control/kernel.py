"""What Linux does with control groups, done to real files in a folder: cgroup v2's rules that the runner counts on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from runner.control import cgroup

FILES = ("cgroup.procs", "cgroup.subtree_control", "memory.max", "memory.oom.group", "memory.events")


class Kernel:
    """A tree in `folder / "cgroup"`, and a /proc with this process (pid 500) in one of its groups."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top = folder / "cgroup"
        self.proc = folder / "proc"
        self.refuses: set[Path] = set()
        self._mkdir, self._rmdir = Path.mkdir, Path.rmdir
        (self.proc / "self").mkdir(parents=True)
        mkdir, rmdir = self._mkdir, self._rmdir

        def made(path: Path, *arguments: object, **options: object) -> None:
            mkdir(path, *arguments, **options)  # type: ignore[arg-type]
            if path.is_relative_to(self.top):
                self._fill(path)

        def removed(path: Path) -> None:
            if not path.is_relative_to(self.top) or not path.exists():
                return rmdir(path)
            if self.pids(path) or any(child.is_dir() for child in path.iterdir()):
                raise OSError(errno.EBUSY, "Device or resource busy")
            shutil.rmtree(path)
            return None

        monkeypatch.setattr(Path, "mkdir", made)
        monkeypatch.setattr(Path, "rmdir", removed)
        monkeypatch.setattr(cgroup, "_write", self.write)
        self.top.mkdir()
        (self.top / "cgroup.type").unlink()
        self.group("", controllers="cpu memory pids")
        self.process(1, 0)
        self.process(400, 1)
        self.process(500, 400)

    def _fill(self, path: Path) -> None:
        for name in FILES:
            (path / name).touch()
        (path / "cgroup.type").write_text("domain\n")
        handed = (path.parent / "cgroup.subtree_control").read_text() if path != self.top else ""
        (path / "cgroup.controllers").write_text(handed)

    def group(self, path: str, controllers: str | None = None, pids: Iterable[int] = (), delegated: str = "") -> Path:
        """A group; `controllers` are those that it has, and `delegated` an attribute that says to whom it belongs."""
        made = self.top / path
        made.mkdir(parents=True, exist_ok=True)
        if controllers is not None:
            (made / "cgroup.controllers").write_text(controllers)
        (made / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        if delegated:
            os.setxattr(made, delegated, b"1")
        return made

    def runs_in(self, path: str, root: str = "/") -> None:
        """Where this process is, as it sees it."""
        (self.proc / "self/cgroup").write_text(f"4:memory:/old\n0::{path}\n")
        old = "35 31 0:32 / /cgroup/memory rw - cgroup cgroup rw,memory\n"
        (self.proc / "self/mountinfo").write_text(f"{old}41 31 0:38 {root} {self.top} rw - cgroup2 c rw\n")

    def process(self, pid: int, parent: int) -> None:
        """One that can be seen; 500 is this one."""
        (self.proc / str(pid)).mkdir()
        stat = f"{pid} (a) name) S {parent} 1 1"
        (self.proc / str(pid) / "stat").write_text(stat)
        if pid == 500:
            (self.proc / "self/stat").write_text(stat)

    @staticmethod
    def pids(group: Path) -> list[int]:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]

    def write(self, path: Path, text: str) -> None:
        """As the kernel takes it."""
        group = path.parent
        if path in self.refuses:
            raise OSError(errno.EINVAL, "Invalid argument")
        if path.name == "cgroup.procs":
            if (group / "cgroup.subtree_control").read_text() and group != self.top:
                raise OSError(errno.EBUSY, "Device or resource busy")
            for other in [self.top, *(p for p in self.top.rglob("*") if p.is_dir())]:
                left = [pid for pid in self.pids(other) if pid != int(text)]
                (other / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in left))
            with path.open("a") as file:
                file.write(f"{text}\n")
        elif path.name == "cgroup.subtree_control":
            if self.pids(group) and group != self.top:
                raise OSError(errno.EBUSY, "Device or resource busy")
            path.write_text(text.removeprefix("+"))
        else:
            if not path.exists():
                raise FileNotFoundError(path)
            path.write_text(text)
