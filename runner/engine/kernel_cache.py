"""Compiled code of our CUDA kernels on disk, where MLX looks for it.

MLX compiles a kernel of `mx.fast.cuda_kernel` in each process anew, but reads its cache before (`read_cached_ptx` in
its jit_module.cpp): a file of code, and one that says what functions are called in it. So we write both. MLX takes
what it finds there for good: files appear whole, and are read over, and made again if need be, before MLX is.

MLX's own folder is a temporary one. `settle` gives it a folder of the user's, and that one folder for each kind of
device and compiler, which MLX's names for its own kernels leave out.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import mlx.core as mx

from runner.engine import cuda_compiler
from runner.engine.cuda_compiler import CompileError
from runner.engine.cuda_text import Text
from runner.machine import mlx_version
from runner.options import cache_dir

logger = logging.getLogger(__name__)

VARIABLE: Final = "MLX_PTX_CACHE_DIR"
"""Environment variable that MLX has its cache's folder from. It is read when the first kernel is wanted."""

_LONGEST: Final = 245
"""Characters of a name up to which MLX does not cut it up."""

_OURS: Final = "custom_kernel_"
_DIGEST: Final = "sha256 "
"""Begins a line that MLX passes over, since there is no tab in it."""


def settle() -> None:
    """Have MLX keep compiled kernels in the user's cache, unless the user has said where. Comes before any kernel."""
    kind = architecture()
    if kind is None or VARIABLE in os.environ:
        return
    try:
        folder = cache_dir() / "cuda" / f"mlx-{mlx_version()}-nvrtc-{cuda_compiler.version()}" / kind
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
    except (CompileError, OSError, RuntimeError) as reason:  # RuntimeError: nobody knows the user's folder
        logger.warning("compiled kernels are not kept", extra={"reason": str(reason)})
        return
    os.environ[VARIABLE] = str(folder)


def _sweep(folder: Path) -> None:
    """Remove what a process of MLX's left unfinished when it ended: it would end all that follow."""
    for code in folder.rglob("*.ptx"):
        written = code.with_suffix(".cu").exists() and code.stat().st_size > 0
        if not written and not code.name.startswith(_OURS):
            code.unlink(missing_ok=True)


@cache
def architecture() -> str | None:
    """What MLX compiles for in this process, such as "sm_90a"; None without a CUDA device."""
    if not mx.cuda.is_available():
        return None
    info = mx.device_info()
    try:
        major, minor = int(info["compute_capability_major"]), int(info["compute_capability_minor"])
    except (KeyError, ValueError):
        return None
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def folder() -> Path | None:
    """Where compiled kernels are kept, None for nowhere."""
    return Path(found) if (found := os.environ.get(VARIABLE)) else None


def provide(text: Text, kind: str) -> bool:
    """See to it that MLX finds code for `text` on a device of architecture `kind`; False if it would not look for it.

    Raises CompileError and OSError.
    """
    where = folder()
    if where is None or len(text.module) > _LONGEST:
        return False
    code, names = where / f"{text.module}.ptx", where / f"{text.module}.txt"
    if _whole(code, names):
        return True
    # Nothing is better than something that MLX cannot load.
    code.unlink(missing_ok=True)
    binary = cuda_compiler.compile_kernel(text, kind)
    where.mkdir(parents=True, exist_ok=True)
    # MLX looks for the code: its function's name has to be there by then.
    _replace(names, f"{_DIGEST}{_digest(binary.code)}\n{text.expression}\t{binary.function}\n".encode())
    _replace(code, binary.code)
    return True


def _whole(code: Path, names: Path) -> bool:
    try:
        digest, _, functions = names.read_text(encoding="ascii").partition("\n")
        return bool(functions) and digest == f"{_DIGEST}{_digest(code.read_bytes())}"
    except (OSError, UnicodeDecodeError):
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix + "-new")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
