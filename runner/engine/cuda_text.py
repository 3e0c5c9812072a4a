"""What MLX makes of a kernel of `mx.fast.cuda_kernel`, and what it calls that.

As `build_kernel` and `CustomKernel::eval_gpu` in MLX's mlx/backend/cuda/custom_kernel.cpp (0.32) have it: the same text
gives the same name, by which MLX looks for compiled code. Should MLX do it otherwise one day, it finds none.

MLX hashes the text in each launch, and copies it in each call. Where the code is there already, nobody reads it: so a
stand-in of a few lines will do, whose name is that of the code.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple

import mlx.core as mx
import msgspec

UTILITIES: Final = "mlx/backend/cuda/device/utils.cuh"
"""The header that MLX's text begins with. It is in MLX's library only."""

Template = Sequence[tuple[str, bool | int | mx.Dtype]]

_NAMESPACE: Final = "mlx::core::cu"
_FUNCTION: Final = "custom_kernel_"
_SEED: Final = 0xC70F6907
"""Of libstdc++'s std::hash."""

_INFOS: Final = {"shape": "Shape", "strides": "Strides", "ndim": "int"}
"""Parameters that an input has behind it where the source names them, and their types."""

_TYPES: Final = {
    mx.bool_: ("bool", "bool"),
    **{getattr(mx, f"{sign}int{bits}"): (f"{sign}int{bits}_t",) * 2 for sign in ("", "u") for bits in (8, 16, 32, 64)},
    mx.float16: ("__half", "float16_t"),
    mx.bfloat16: ("__nv_bfloat16", "bfloat16_t"),
    mx.float32: ("float", "float"),
}
"""What CUDA calls a type, and what stands for it in a kernel's name."""


class Argument(NamedTuple):
    """An input of a launch, as far as the text depends on it: `scalar` has no axes."""

    dtype: mx.Dtype
    scalar: bool = False


class Text(NamedTuple):
    """A kernel's source for one variant. `expression` is what its function is called in it, `module` its name."""

    module: str
    expression: str
    code: str


class Definition(msgspec.Struct, frozen=True):
    """What a kernel is made of, as `mx.fast.cuda_kernel` takes it."""

    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    source: str
    header: str = ""

    def text(self, inputs: Sequence[Argument], outputs: Sequence[mx.Dtype], template: Template = ()) -> Text:
        """The variant for arrays of such types. Raises KeyError for a type that is not known, OSError without
        libstdc++."""
        function = f"{_FUNCTION}{self.name}{''.join(f'_{_short(value)}' for _, value in template)}"
        parameters: list[str] = []
        for name, (dtype, scalar) in zip(self.inputs, inputs, strict=True):
            parameters.append(f"    const {_TYPES[dtype][0]}* {name}")
            for what, info in _INFOS.items():
                if f"{name}_{what}" in self.source and not scalar:
                    parameters.append(f"    const __grid_constant__ {info} {name}_{what}")
        parameters += [f"    {_TYPES[dtype][0]}* {name}" for name, dtype in zip(self.outputs, outputs, strict=True)]
        listed = ",\n".join(parameters)
        constants = "".join(_constant(name, value) for name, value in template) + ("\n" if template else "")
        code = (
            f'\n#include "{UTILITIES}"\n\n#include <cooperative_groups.h>\n\n{self.header}'
            f"namespace {_NAMESPACE} {{\n\nnamespace cg = cooperative_groups;\n\n"
            f"__global__ void {function}(\n{listed}) {{\n{constants}{self.source}\n}}\n\n}} // namespace {_NAMESPACE}\n"
        )
        return Text(f"{function}_{_hash(code):x}", f"{_NAMESPACE}::{function}", code)

    def stand_in(self, text: Text) -> Definition:
        """A kernel of the same function and parameters as the variant that `text` is of, without a template.

        It is not to be compiled: whoever finds no code for it is told so by the compiler.
        """
        infos = [f"{name}_{what}" for name in self.inputs for what in _INFOS if f"{name}_{what}" in self.source]
        lines = [
            f"// {' '.join(infos)}",
            f"// of {hashlib.sha256(text.code.encode()).hexdigest()}",
            "#error its compiled code is gone: the engine has to be started again",
        ]
        return Definition(
            text.expression.removeprefix(f"{_NAMESPACE}::{_FUNCTION}"), self.inputs, self.outputs, "\n".join(lines)
        )


def _short(value: bool | int | mx.Dtype) -> str:
    if isinstance(value, bool):
        return "t" if value else "f"
    return str(value) if isinstance(value, int) else _TYPES[value][1]


def _constant(name: str, value: bool | int | mx.Dtype) -> str:
    if isinstance(value, bool):
        return f"  constexpr bool {name} = {str(value).lower()};\n"
    if isinstance(value, int):
        return f"  constexpr int {name} = {value};\n"
    return f"  using {name} = {_TYPES[value][0]};\n"


def _hash(text: str) -> int:
    data = text.encode()
    hashed: int = _hash_bytes()(data, len(data), _SEED)
    return hashed


@cache
def _hash_bytes() -> ctypes._NamedFuncPointer:
    # std::hash is a template; this is what it calls, and MLX's library as well.
    function = ctypes.CDLL("libstdc++.so.6")["_ZSt11_Hash_bytesPKvmm"]
    function.restype, function.argtypes = ctypes.c_size_t, (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t)
    return function
