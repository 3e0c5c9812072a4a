"""What this machine has, and who uses it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Machine(NamedTuple):
    """What a plan has to know of a machine: bytes of memory, and whether models compute in float32 there, as they do
    where MLX has no GPU."""

    memory: int
    float32: bool = False


def this_machine() -> Machine:
    """The one we run on."""
    return Machine(machine_memory(), cpu_backend())


def machine_memory() -> int:
    """Bytes of memory; of a container's that is limited, where models are in it and not on a GPU. By sysconf: psutil
    takes 4 MB to say the same."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min((whole, *(confine.limit for confine in _confines_here())))


def cpu_backend() -> bool:
    """Whether MLX will run on the CPU of a Linux machine: no CUDA build of it is installed."""
    if sys.platform != "linux":
        return False
    folders = _beside_mlx()
    return bool(folders) and not any(any(folder.glob("mlx_cuda*")) for folder in folders)


def mlx_version() -> str:
    """The version of MLX that is installed, "" where none is. By the name of its folder: importing takes longer."""
    found = (path.name for folder in _beside_mlx() for path in folder.glob("mlx-*.dist-info"))
    return max((name.removesuffix(".dist-info").partition("-")[2] for name in found), default="")


def _beside_mlx() -> list[Path]:
    """The folders that packages of MLX may be in. It is a namespace: all that is called "mlx" on the path belongs to
    it, and MLX's own CUDA build writes to /tmp/mlx, which comes first for a script that lies in /tmp."""
    spec = importlib.util.find_spec("mlx")
    return [Path(place).parent for place in (spec and spec.submodule_search_locations) or ()]


def available_memory() -> int:
    """Bytes that new processes can have now without others being paged out, or the container being full."""
    return min((_available(), *(max(0, confine.limit - confine.used) for confine in _confines_here())))


def _available() -> int:
    try:
        with Path("/proc/meminfo").open("rb") as file:
            line = next(line for line in file if line.startswith(b"MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        import psutil  # noqa: PLC0415 - 4 MB, for those who have no /proc

        return int(psutil.virtual_memory().available)


class Confine(NamedTuple):
    """A control group's limit, and what is used of it that cannot be given back, in bytes."""

    limit: int
    used: int


def confines(proc: Path = Path("/proc/self/cgroup"), system: Path = Path("/sys/fs/cgroup")) -> list[Confine]:
    """Those of this process's group and of all that it lies in, as far as they can be seen."""
    found: list[Confine] = []
    for line in _text(proc).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = system, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = system / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        found += filter(None, (_confine(top / part, *names) for part in (inside, *inside.parents)))
    return found


def _confines_here() -> list[Confine]:
    return confines() if cpu_backend() else []


def _confine(folder: Path, limit: str, usage: str, cached: str) -> Confine | None:
    allowed, used = _text(folder / limit).strip(), _text(folder / usage).strip()
    if not allowed.isdigit() or not used.isdigit():  # "max", or the top of the tree
        return None
    kept = [line.split()[1] for line in _text(folder / "memory.stat").splitlines() if line.split()[:1] == [cached]]
    return Confine(int(allowed), int(used) - sum(map(int, kept)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def resident_bytes(pid: int) -> int:
    """Bytes of a process that are in memory; 0 where nobody says."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_bytes().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
