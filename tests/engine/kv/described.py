"""Kernels on the host that take their arrays' shapes and strides as well: each is compiled once."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from tests.engine.cuda_on_host import Array, Run, compiled, described

_TYPES = {"starts": "int", "counters": "int", "frequencies": "float", "partial": "float"}
"""Those that are not the tokens'."""


class Described:
    """Some kernels, by their texts."""

    def __init__(self) -> None:
        self._built: dict[tuple[str, str], Run] = {}

    def run(
        self,
        header: str,
        source: str,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        blocks: int,
        threads: int,
    ) -> None:
        """A launch, which has ended when this returns; it may write to inputs as well."""
        arguments, passed = described(inputs, {name: _TYPES.get(name, "T") for name in inputs})
        arguments |= {name: f"{_TYPES.get(name, 'T')}*" for name in outputs}
        key = header, source
        if key not in self._built:
            self._built[key] = compiled(header, source, arguments, "")
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*passed, *outputs.values())]
        self._built[key](ctypes.c_int(blocks), ctypes.c_int(threads), *pointers)


def memory_of(array: mx.array) -> Array:
    """The array's own memory."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
        mx.eval(array)
    return np.asarray(array)
