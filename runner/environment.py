"""What the process environment must hold before MLX is imported on Linux.

The mlx-cpu wheel links reference BLAS, whose matrix products are 30 times slower than OpenBLAS's, and `mx.compile` on
the CPU calls a C++ compiler (14 s for the first sampled token). Each operation's result is allocated by one thread and
freed by another, where the C library has both wait for each other; so is each launch's on a GPU. MLX's CUDA backend
keeps a few hundred CUDA graphs and attention plans, and by default ends with an exception once it has missed them twice
as often as it has room, which a server of many shapes does some day. Nothing of this can be changed once MLX is
imported, so it is decided here, from the files of the installation alone: the runner starts its engines so. What the
user has set stays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from runner.machine import cpu_backend

PREPARED: Final = "MLX_RUN_ENGINE_PREPARED"
"""Set where the environment holds all of this, so that nobody looks again: to the `time.monotonic` at which the process
first began."""

CUDA: Final = {
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
    "MLX_CUDA_GRAPH_CACHE_SIZE": "2048",
    "MLX_CUDA_SDPA_CACHE_SIZE": "1024",
    # cuDNN's attention plans an execution for each new shape, which takes much longer than a prompt's attention does.
    "MLX_CUDA_USE_CUDNN_SDPA": "0",
}
"""How the CUDA backend is set up, where the user has not said otherwise."""


_KERNELS: Final = {
    "SKYLAKEX": {"avx512f", "avx512cd", "avx512dq", "avx512bw", "avx512vl"},
    "HASWELL": {"avx2", "fma"},
}
"""By what they need of a processor, as Linux names it; the best first."""


def prepared(environ: Mapping[str, str], now: float) -> dict[str, str]:
    """The whole environment of an engine that a process with `environ` starts at `now`, by `time.monotonic`."""
    own = {name: value for name, value in environ.items() if name != PREPARED}
    return {**own, **engine_environment(own), PREPARED: str(now)}


def engine_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to `environ` before MLX is imported; empty where nothing is needed.

    Costs a directory listing or two and imports nothing of MLX.
    """
    if PREPARED in environ:
        return {}
    if cpu_backend():
        return cpu_environment(environ)
    return cuda_environment(environ) if sys.platform == "linux" else {}


def cuda_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The same for Linux with a GPU, whose steps of few rows are bound by what the host does."""
    added = {name: value for name, value in CUDA.items() if name not in environ}
    return added | _preloading(environ, _with_allocator(environ))


def cpu_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The same for Linux without a GPU; empty elsewhere."""
    if PREPARED in environ or not cpu_backend():
        return {}
    added: dict[str, str] = {}
    if "MLX_DISABLE_COMPILE" not in environ:
        added["MLX_DISABLE_COMPILE"] = "1"
    if "OPENBLAS_NUM_THREADS" not in environ:
        # The products of a decode step are small: more threads mostly wait for each other, and take the runner's core.
        added["OPENBLAS_NUM_THREADS"] = str(min(8, max(1, (os.cpu_count() or 1) // 2)))
    preloaded = _with_allocator(environ)
    if "blas" not in environ.get("LD_PRELOAD", "") and (library := find_openblas()):
        preloaded.insert(0, library)
        if "OPENBLAS_CORETYPE" not in environ and (kernels := openblas_kernels()):
            added["OPENBLAS_CORETYPE"] = kernels
    return added | _preloading(environ, preloaded)


def _with_allocator(environ: Mapping[str, str]) -> list[str]:
    """What is preloaded, and before it an allocator, unless one is."""
    present = environ.get("LD_PRELOAD", "")
    library = None if "malloc" in present else find_allocator()
    return [entry for entry in (library, present) if entry]


def _preloading(environ: Mapping[str, str], libraries: list[str]) -> dict[str, str]:
    """The variable that has them preloaded, if it does not say so."""
    wanted = ":".join(libraries)
    return {} if wanted == environ.get("LD_PRELOAD", "") else {"LD_PRELOAD": wanted}


def openblas_kernels(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The kernels of OpenBLAS for what the processor can do, None where OpenBLAS has to know by itself.

    It goes by the processor's name, and one that is younger than the library gets kernels of 2004: 0.3.21 on a Xeon of
    2023 multiplied 32 rows five times as slowly. Those for processors that it does know are the same as these, as far
    as products in float32 go.
    """
    with suppress(OSError), cpuinfo.open() as lines:
        flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
        return next((name for name, needed in _KERNELS.items() if needed <= flags), None)
    return None


def find_openblas() -> str | None:
    """Path of a system OpenBLAS, the threaded build first, or None."""
    return _found("openblas-pthread/libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so.0", "libopenblas.so")


def find_allocator() -> str | None:
    """Path of a system jemalloc, or None.

    Only for x86-64: elsewhere it may have been built for pages of another size, and ends the process that loads it.
    """
    return _found("libjemalloc.so.2") if os.uname().machine == "x86_64" else None


def _found(*names: str) -> str | None:
    """The first of these libraries that the system has."""
    folders = (f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
    paths = (Path(folder, name) for folder in folders for name in names)
    return next((str(path) for path in paths if path.exists()), None)
