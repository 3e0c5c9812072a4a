"""What this machine has, and who uses it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
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
    """Bytes of memory. By sysconf: psutil takes 4 MB to say the same."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_backend() -> bool:
    """Whether MLX will run on the CPU of a Linux machine: no CUDA build of it is installed."""
    if sys.platform != "linux":
        return False
    spec = importlib.util.find_spec("mlx")
    if spec is None or not spec.submodule_search_locations:
        return False
    site = Path(next(iter(spec.submodule_search_locations))).parent
    return not any(site.glob("mlx_cuda*"))


def mlx_version() -> str:
    """The version of MLX that is installed, "" where none is. By the name of its folder: importing takes longer."""
    spec = importlib.util.find_spec("mlx")
    if spec is None or not spec.submodule_search_locations:
        return ""
    site = Path(next(iter(spec.submodule_search_locations))).parent
    found = (path.name.removesuffix(".dist-info").partition("-")[2] for path in site.glob("mlx-*.dist-info"))
    return max(found, default="")


def available_memory() -> int:
    """Bytes that new processes can have now without others being paged out."""
    try:
        with Path("/proc/meminfo").open("rb") as file:
            line = next(line for line in file if line.startswith(b"MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        import psutil  # noqa: PLC0415 - 4 MB, for those who have no /proc

        return int(psutil.virtual_memory().available)


def resident_bytes(pid: int) -> int:
    """Bytes of a process that are in memory; 0 where nobody says."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_bytes().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
