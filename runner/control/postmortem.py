"""How an engine's process ended, and whether memory was the reason, which the exit code alone does not say."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Final

_TAIL: Final = 16 * 1024
"""Bytes of an engine's log that are looked at."""

_ALLOCATION: Final = re.compile(
    rb"kIOGPUCommandBufferCallbackErrorOutOfMemory|\[metal::malloc\]|\[malloc_or_wait\]|Unable to allocate \d+ bytes"
    rb"|cudaErrorMemoryAllocation|out of memory|std::bad_alloc|MemoryError",
    re.IGNORECASE,
)
"""What MLX, CUDA, C++ and Python say when there is none left."""


def describe_exit(code: int) -> str:
    """In words, which go on after what has ended. `code` is negative for a signal."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}"


def oom_kills() -> int:
    """How many processes the kernel has ended for lack of memory since it started, and in this process's control group;
    0 where nobody counts."""
    found = 0
    for path, key in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        try:
            lines = Path(path).read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        found += sum(int(line.split()[1]) for line in lines if line.split()[:1] == [key])
    return found


def lack_of_memory(
    code: int, *, killed_by_us: bool, over: str, kills_before: int, log: Path, written_before: int
) -> str:
    """What an exit has to do with memory; empty for nothing. `code` is negative for a signal, `over` what its control
    group says of it, `kills_before` what `oom_kills` was and `written_before` how long the log was when the process was
    started."""
    if code == -signal.SIGKILL and over and not killed_by_us:
        return over
    if code == -signal.SIGKILL and not killed_by_us and oom_kills() > kills_before:
        return "the kernel ended the engine because the machine was out of memory"
    if code == 0 or killed_by_us:
        return ""
    said = _ALLOCATION.search(_tail(log, written_before))
    return f"the engine was out of memory: {said[0].decode(errors='replace')}" if said else ""


def _tail(log: Path, start: int) -> bytes:
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - _TAIL))
            return file.read()
    except OSError:
        return b""
