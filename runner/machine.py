"""What this machine has."""

from __future__ import annotations

import os


def machine_memory() -> int:
    """Bytes of memory. By sysconf: psutil takes 4 MB to say the same."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
