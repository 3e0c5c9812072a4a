"""Who is ended when there is no memory: an engine, which is started again, and not the runner.

Where the runner has made a control group for this process, it enters it, and the kernel ends it at the group's limit.
Elsewhere the kernel is told to end it first when the machine is out of memory.

A limit by RLIMIT_DATA was tried in its place: MLX's CPU backend (0.32.4) does not look at what its allocator returns,
so an allocation that the kernel refuses ends the process with SIGSEGV; on CUDA the driver's mappings count against it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_SCORE: Final = "500"
"""Thousandths of the machine's memory that the kernel adds to what a process takes when it chooses."""


def enter(group: str) -> None:
    """Go to a control group, by its folder; what was allocated before stays counted where it was."""
    if group:
        try:
            (Path(group) / "cgroup.procs").write_text("0", encoding="ascii")  # 0 is whoever writes
        except OSError as error:
            logger.warning("not in the control group", extra={"path": group, "error": str(error)})


def be_first() -> None:
    """Have the kernel end this process before others that take as much; only Linux can be told."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_SCORE, encoding="ascii")
