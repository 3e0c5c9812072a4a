"""Kernels of `mx.fast.cuda_kernel` compiled for a GPU, without one: by NVRTC, where its wheels are installed.

    pip install "nvidia-cuda-nvrtc==13.*" "nvidia-cuda-runtime==13.*" "nvidia-cuda-cccl==13.*" "nvidia-cuda-crt==13.*"

The text around the source is as MLX 0.32 puts it (`build_kernel` in its custom_kernel.cpp). The header that MLX
includes is in its library only; what kernels use of it is declared here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ARCHITECTURE = "sm_90a"
"""What MLX compiles for on an H100 or H200."""

_PREAMBLE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
#include <cooperative_groups.h>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""

Types = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a thread of a kernel takes: `registers`, and `local` bytes of memory for what has no room in them."""

    registers: int
    local: int


def compile_kernel(
    header: str, source: str, inputs: Types, outputs: Types, template: Sequence[tuple[str, str | int]] = ()
) -> Compiled:
    """Raises AssertionError, with what the compiler says; skips the test where there is none.

    `inputs` and `outputs` are names and CUDA's types of their elements; so are a template's types.
    """
    parameters = []
    for name, kind in inputs.items():
        parameters.append(f"const {kind}* {name}")
        for what, info in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
            if f"{name}_{what}" in source:
                parameters.append(f"const __grid_constant__ {info} {name}_{what}")
    parameters += [f"{kind}* {name}" for name, kind in outputs.items()]
    constants = [
        f"using {name} = {value};" if isinstance(value, str) else f"constexpr int {name} = {value};"
        for name, value in template
    ]
    text = [
        *(_PREAMBLE, header, "namespace mlx::core::cu {\nnamespace cg = cooperative_groups;"),
        *(f"__global__ void kernel({', '.join(parameters)}) {{", *constants, source, "}\n}"),
    ]
    return _read(_compile("\n".join(text)))


def _compile(text: str) -> bytes:
    root = _wheels()
    try:
        # The compiler looks for its other half by name, which it finds if it is loaded.
        ctypes.CDLL(str(next((root / "lib").glob("libnvrtc-builtins.so.*"))), ctypes.RTLD_GLOBAL)
        nvrtc = ctypes.CDLL(str(next((root / "lib").glob("libnvrtc.so.*"))))
    except (StopIteration, OSError):
        pytest.skip("no NVRTC")
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None) == 0
    options = [
        *("--device-as-default-execution-space", f"--gpu-architecture={ARCHITECTURE}"),
        *(f"--include-path={root / 'include'}", f"--include-path={root / 'include' / 'cccl'}"),
    ]
    result = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    )
    what = "ProgramLog" if result else "CUBIN"
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    got = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, got)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert result == 0, got.value.decode()
    return got.raw


_REGISTERS, _FRAME = 0x2F, 0x11
"""Attributes in a binary's section .nv.info."""


def _read(binary: bytes) -> Compiled:
    """The one kernel's needs, from a binary of 64-bit ELF."""
    (at,) = struct.unpack_from("<Q", binary, 0x28)
    size, count, names = struct.unpack_from("<HHH", binary, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", binary, at + i * size) for i in range(count)]
    found: dict[int, int] = {}
    for name, _, _, _, offset, length in sections:
        start = sections[names][4] + name
        if binary[start : binary.index(0, start)] != b".nv.info":
            continue
        place = offset
        while place < offset + length:
            form, attribute, value = struct.unpack_from("<BBH", binary, place)
            place += 4
            if form == 4:  # followed by so many bytes: a symbol and its value
                if attribute in (_REGISTERS, _FRAME):
                    found[attribute] = max(found.get(attribute, 0), struct.unpack_from("<II", binary, place)[1])
                place += value
    return Compiled(found[_REGISTERS], found[_FRAME])


def _wheels() -> Path:
    """Where the wheels of CUDA 13 put their files."""
    found = importlib.util.find_spec("nvidia")
    for folder in [] if found is None else found.submodule_search_locations or []:
        if (Path(folder) / "cu13" / "include" / "cuda_bf16.h").is_file():
            return Path(folder) / "cu13"
    pytest.skip("the wheels of CUDA 13 are not installed")
