"""What the process really takes, against what it may: the arithmetic of admission can be wrong.

Over its limit a process gives back what its allocators keep for reuse. If that is not enough, the engine takes up no
more requests, and gives back what it keeps for later. What it works on goes on, and ends. If that was not enough once
there is nothing left to do, or the limit is passed by far, the process asks to be replaced: only its end surely returns
the memory.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import mlx.core as mx

logger = logging.getLogger(__name__)

_FAR: Final = 1.25
"""Times the limit at which the process does not wait for what it works on."""

SLACK: Final = 16 * 2**20
"""Bytes that a process comes to beside what is counted: the C library's heap, threads, Python's own."""

_ALL_ARENAS: Final = b"arena.4096.purge"
"""What jemalloc is told; the number stands for all of them (MALLCTL_ARENAS_ALL)."""

_RESTS_AFTER: Final = 1.0 if mx.default_device() == mx.Device(mx.cpu) else 60.0
"""Seconds without work. What is given back has to be asked for again: of the system that takes half a millisecond for a
small model's next request, a GPU's driver takes longer."""

_FINE: Final = 0.95
"""Of the limit, below which requests are taken up again."""


class Watchdog:
    """`limit` gives what may be used now, in bytes, 0 for no limit; `trim` gives back what allocators keep, and
    `release` so many bytes of what is kept for later.

    `closed`: nothing is to be taken up. `over` has what was in use when it was too much, and does not go down again. A
    process is to `rest` once it has been without work for `rests_after` seconds.
    """

    def __init__(
        self,
        limit: Callable[[], int],
        release: Callable[[int], int],
        used: Callable[[], int],
        trim: Callable[[], None],
        slack: int = SLACK,
    ) -> None:
        self.closed = False
        self.over = 0
        self.rests_after = _RESTS_AFTER
        self._limit = limit
        self._release = release
        self._used = used
        self._trim = trim
        self._slack = slack

    def rest(self) -> None:
        """There has been nothing to do: an idle process keeps nothing for reuse."""
        self._trim()

    def look(self, *, busy: bool) -> bool:
        """Whether all is well enough to go on; False asks for the process to be replaced."""
        limit = self._limit()
        limit += self._slack if limit else 0
        used = self._used() if limit else 0
        if limit and used > limit:
            self._trim()
            used = self._used()
        if not limit or used <= limit * (_FINE if self.closed else 1.0):
            self.closed = False
            return True
        if not self.closed:
            logger.warning("over the memory limit", extra={"used": used, "limit": limit})
        self.closed = True
        if self._release(used - limit):
            self._trim()
            used = self._used()
        if used <= limit:
            self.closed = used > limit * _FINE
            return True
        self.over = max(self.over, used)
        return busy and used <= limit * _FAR


def trim() -> None:
    """Return to the system what is not in use: MLX's buffers, and what the C library keeps, or jemalloc."""
    mx.clear_cache()
    if sys.platform != "linux":
        return
    loaded = ctypes.CDLL(None)
    if hasattr(loaded, "mallctl"):
        loaded.mallctl(_ALL_ARENAS, None, None, None, ctypes.c_size_t(0))
    elif hasattr(loaded, "malloc_trim"):  # glibc has it, musl has not
        loaded.malloc_trim(0)


def resident() -> int:
    """Bytes of this process that are in memory."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import psutil  # noqa: PLC0415 - for those who have no /proc

        return int(psutil.Process().memory_info().rss)


def in_use_beside(base: int) -> int:
    """Bytes that the model takes: what MLX counts, or what the process has beside `base`, whichever is more."""
    return max(mx.get_active_memory() + mx.get_cache_memory(), resident() - base)
