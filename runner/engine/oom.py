"""Who is ended first when the machine is out of memory: an engine, which is started again, and not the runner.

A limit by RLIMIT_DATA was tried in its place: MLX's CPU backend (0.32.4) does not look at what its allocator returns,
so an allocation that the kernel refuses ends the process with SIGSEGV; on CUDA the driver's mappings count against it.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Final

_SCORE: Final = "500"
"""Thousandths of the machine's memory that the kernel adds to what a process takes when it chooses."""


def be_first() -> None:
    """Have the kernel end this process before others that take as much; only Linux can be told."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_SCORE, encoding="ascii")
