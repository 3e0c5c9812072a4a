"""Kernels of `mx.fast.cuda_kernel` compiled for a GPU, without one: by NVRTC, where its wheels are installed.

pip install "nvidia-cuda-nvrtc==13.*" "nvidia-cuda-runtime==13.*" "nvidia-cuda-cccl==13.*" "nvidia-cuda-crt==13.*"
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import pytest

from runner.engine import cuda_compiler
from runner.engine.cuda_compiler import CompileError
from runner.engine.cuda_text import Argument, Definition, Template

ARCHITECTURE = "sm_90a"
"""What MLX compiles for on an H100 or H200."""

Types = Mapping[str, mx.Dtype]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a thread of a kernel takes: `registers`, and `local` bytes of memory for what has no room in them."""

    registers: int
    local: int


def compile_kernel(header: str, source: str, inputs: Types, outputs: Types, template: Template = ()) -> Compiled:
    """Raises CompileError, with what the compiler says; skips the test where there is none.

    `inputs` and `outputs` are names and types of arrays.
    """
    needs_compiler()
    definition = Definition("kernel", [*inputs], [*outputs], source, header)
    text = definition.text([Argument(dtype) for dtype in inputs.values()], [*outputs.values()], template)
    return _read(cuda_compiler.compile_kernel(text, ARCHITECTURE).code)


def needs_compiler() -> None:
    """Skips the test where there is none, or it has no headers."""
    try:
        cuda_compiler.version()
        cuda_compiler.include_folders()
    except CompileError as missing:
        pytest.skip(str(missing))


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
