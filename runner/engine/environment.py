"""The environment of this process: what it lacks of what MLX needs (`runner.environment`), and what it must hold."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from typing import Final

from runner.environment import PREPARED, engine_environment, prepared
from runner.machine import cpu_backend

MANY_CORES: Final = 4
"""From so many on, what another thread does, or the runner that is woken, does not take the main thread's core."""

_DEBIAN: Final = "sudo apt-get install"


def cores() -> int:
    """How many this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def linux_on_x86() -> bool:
    """Whether this is where MLX's CPU backend and BLAS were measured. Macs have their own, and nobody has on ARM."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def notes(environ: Mapping[str, str]) -> list[str]:
    """What the user should know about the libraries this process runs with."""
    if sys.platform != "linux":
        return []
    preloaded = environ.get("LD_PRELOAD", "").split(":")
    found = [f"matrix products use {entry}" for entry in preloaded if "blas" in entry][:1] if cpu_backend() else []
    if cpu_backend() and not found:
        package = f"{_DEBIAN} libopenblas0-pthread"
        found = [f"no OpenBLAS found: matrix products run on reference BLAS, up to 30 times slower; {package}"]
    if linux_on_x86() and not any("malloc" in entry for entry in preloaded):
        found.append(f"no jemalloc found: steps of small models are slower without it; {_DEBIAN} libjemalloc2")
    return found


def stay_offline() -> None:
    """Have the hub's library ask for nothing in this process: what is loaded is what was planned and fetched, and code
    that a trusted repository takes from another one would be neither."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def tokenise_in_one_thread() -> None:
    """Have tokenizers start no pool of threads, one a core, for lists of texts: ours are lists of one.

    What the user has set stays.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def restart_if_needed(now: float) -> float:
    """Replace this process by itself with the environment that it needs.

    Returns when nothing is missing, with the `time.monotonic` at which the process first began; `now` is that of this
    run of it.
    """
    if engine_environment(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], prepared(os.environ, now))  # noqa: S606 - itself
    return float(os.environ.get(PREPARED, now))
