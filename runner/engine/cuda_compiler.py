"""Kernels compiled by NVRTC, as MLX does it, but for the headers.

MLX includes CUDA's standard library and cooperative groups in every kernel, which takes a second to read. Ours use
nothing of them but the types of shapes and strides, so those headers are replaced: one of our products is compiled in
0.14 s in place of 1.4, to the same code, byte by byte. A call leaves the interpreter to other threads, and several may
be made at once.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec

from runner.engine.cuda_text import UTILITIES, Text

_HEADERS: Final = {
    # Parameters are laid out as in MLX's: arrays of ten (MAX_NDIM).
    UTILITIES: """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using int8_t = signed char; using uint8_t = unsigned char;
using int16_t = short; using uint16_t = unsigned short;
using int32_t = int; using uint32_t = unsigned int;
using int64_t = long long; using uint64_t = unsigned long long;
namespace mlx::core::cu {
template <typename V> struct Ten {
    V values[10];
    __device__ constexpr V operator[](int i) const { return values[i]; }
};
using Shape = Ten<int32_t>;
using Strides = Ten<int64_t>;
}
""",
    "cooperative_groups.h": "namespace cooperative_groups {}\n",
}

_VERSIONS: Final = (13, 12)
"""Major ones, for which MLX is built."""


class CompileError(Exception):
    """There is no compiler, no headers, or the compiler refuses: says which."""


class Binary(msgspec.Struct, frozen=True):
    """A device's code, and what its function is called there."""

    code: bytes
    function: str


def compile_kernel(text: Text, architecture: str) -> Binary:
    """For a device of `architecture`, such as "sm_90a". Raises CompileError."""
    nvrtc = _library()
    headers = list(_HEADERS.items())
    program = ctypes.c_void_p()
    made = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        text.code.encode(),
        f"{text.module}.cu".encode(),
        len(headers),
        _strings([code for _, code in headers]),
        _strings([name for name, _ in headers]),
    )
    _check(nvrtc, made)
    try:
        expression = text.expression.encode()
        _check(nvrtc, nvrtc.nvrtcAddNameExpression(program, expression))
        options = [
            *("--device-as-default-execution-space", f"--gpu-architecture={architecture}"),
            *(f"--include-path={folder}" for folder in include_folders()),
        ]
        if nvrtc.nvrtcCompileProgram(program, len(options), _strings(options)):
            raise CompileError(_got(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace"))
        lowered = ctypes.c_char_p()
        _check(nvrtc, nvrtc.nvrtcGetLoweredName(program, expression, ctypes.byref(lowered)))
        return Binary(_got(nvrtc, program, "CUBIN"), (lowered.value or b"").decode())
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def version() -> str:
    """The compiler's, such as "13.0". Raises CompileError where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc = _library()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _got(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    got = ctypes.create_string_buffer(size.value)
    _check(nvrtc, nvrtc[f"nvrtcGet{what}"](program, got))
    return got.raw


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(nvrtc.nvrtcGetErrorString(result).decode())


def _strings(texts: list[str]) -> Any:
    return (ctypes.c_char_p * len(texts))(*[text.encode() for text in texts])


@cache
def _library() -> ctypes.CDLL:
    # The one that MLX is linked to is the one whose code the driver takes.
    for major in _VERSIONS:
        try:
            return ctypes.CDLL(f"libnvrtc.so.{major}", mode=os.RTLD_NOLOAD)
        except OSError:
            continue
    for folder in _wheels():
        try:
            # It looks for its other half by name, and finds it if it is loaded.
            ctypes.CDLL(str(next((folder / "lib").glob("libnvrtc-builtins.so.*"))), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(next((folder / "lib").glob("libnvrtc.so.*"))))
        except (StopIteration, OSError):
            continue
    raise CompileError("no NVRTC")


@cache
def include_folders() -> list[Path]:
    """Where CUDA's headers are: where MLX looks, and wheels wherever they are. Raises CompileError."""
    mlx = [folder / "include" for folder in _package("mlx")]
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    cuda = [folder / "include" for folder in (*_wheels(), *toolkits, Path("/usr/local/cuda"))]
    found = next((folder for folder in cuda if (folder / "cuda_fp16.h").is_file()), None)
    if found is None:
        raise CompileError("no CUDA headers")
    cccl = [folder / "cccl" for folder in (*mlx, *cuda) if (folder / "cccl" / "nv" / "target").is_file()]
    return [found, *cccl[:1]]


def _wheels() -> Iterator[Path]:
    """Folders in which NVIDIA's wheels put their files: for each version one, or for each part."""
    for folder in _package("nvidia"):
        for name in ("cu13", "cuda_nvrtc", "cuda_runtime"):
            if (folder / name).is_dir():
                yield folder / name


def _package(name: str) -> list[Path]:
    found = importlib.util.find_spec(name)
    return [] if found is None else [Path(folder) for folder in found.submodule_search_locations or []]
