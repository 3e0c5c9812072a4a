"""`copy_kernel`'s source compiled for the host, in the place of the kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from runner.engine.kv import copy_kernel
from tests.engine.cuda_on_host import Run, compiled

_TYPES = {4: "uint32_t", 2: "uint16_t", 1: "uint8_t"}
"""By bytes: copies are all the same."""


class CopiesOnHost:
    """Makes kernels, as `copy_kernel._kernel` does, whose launches are computed at once."""

    def __init__(self, folder: Path) -> None:
        self.planes: list[int] = []
        """Of each launch."""
        self.aligned = True
        """Whether planes begin at whole vectors: MLX's own memory begins 8 bytes behind a multiple of 16 here."""
        self._folder = folder
        self._built: dict[tuple[int, int], Run] = {}

    def __call__(self, planes: int, dtype: mx.Dtype) -> _Made:
        return _Made(self, planes, dtype)

    def run(self, planes: int, dtype: mx.Dtype, inputs: Sequence[mx.array], blocks: int, shape: Sequence[int]) -> Any:
        """[planes, heads, tokens, width]"""
        self.planes.append(planes)
        mx.eval(*inputs)
        mx.synchronize()
        *held, span = [np.asarray(array) for array in inputs]
        if self.aligned:
            held = [array.copy(order="K") for array in held]
        strides = [np.array(array.strides, dtype=np.int64) // array.itemsize for array in held]
        # One more plane than is to be written, to see that it is not.
        out = np.full((shape[0] + 1, *shape[1:]), 7, dtype=held[0].dtype)
        passed = [*held, span, np.array(held[0].shape, dtype=np.int32), *strides, out]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in passed]
        self._kernel(planes, dtype)(ctypes.c_int(blocks), ctypes.c_int(copy_kernel.THREADS), *pointers)
        assert (out[-1] == 7).all()
        return mx.array(out[:-1])

    def _kernel(self, planes: int, dtype: mx.Dtype) -> Run:
        key = planes, dtype.size
        if key not in self._built:
            arguments = {f"plane{i}": "const T*" for i in range(planes)}
            arguments |= {"span": "const int*", "plane0_shape": "const int*"}
            arguments |= {f"plane{i}_strides": "const int64_t*" for i in range(planes)} | {"out": "T*"}
            folder = self._folder / f"{planes}-{dtype.size}"
            folder.mkdir(parents=True)
            given = "".join(f"constexpr int {name} = {value};" for name, value in copy_kernel.constants().items())
            header = f"using T = {_TYPES[dtype.size]};\n{given}\n"
            self._built[key] = compiled(folder, header, copy_kernel.source(planes), arguments, "")
        return self._built[key]


class _Made:
    def __init__(self, copies: CopiesOnHost, planes: int, dtype: mx.Dtype) -> None:
        self._copies = copies
        self._planes = planes
        self._dtype = dtype

    def launch(
        self,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        assert output_dtypes == [self._dtype]
        assert len(inputs) == self._planes + 1
        blocks = grid[0] // threadgroup[0]
        return [self._copies.run(self._planes, self._dtype, inputs, blocks, output_shapes[0])]
