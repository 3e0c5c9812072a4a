"""The sources of `copy_kernel` and `begin_kernel` compiled for the host, in the place of the kernels: at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from runner.engine.kv import begin_kernel, copy_kernel
from tests.engine.cuda_on_host import Run, compiled

Array = np.ndarray[Any, Any]

_TYPES = {4: "uint32_t", 2: "uint16_t", 1: "uint8_t"}
"""By bytes: copies are all the same."""


class CopiesOnHost:
    """Launches of `copy_kernel`, as if there were a device."""

    def __init__(self, patch: pytest.MonkeyPatch, threads: int = 2, each: int = 64) -> None:
        """Blocks of so many threads, of which each has so many vectors."""
        self.launches: list[tuple[str, int]] = []
        """What each has done, with how many planes."""
        self.aligned = True
        """Whether planes begin at whole vectors: MLX's own memory begins 8 bytes behind a multiple of 16 here."""
        self._built: dict[tuple[str, int, int], Run] = {}
        patch.setattr(copy_kernel, "applies", lambda _: True)
        patch.setattr(copy_kernel, "THREADS", threads)
        patch.setattr(copy_kernel, "_EACH", each)
        for name in ("copy", "put"):
            patch.setattr(copy_kernel, f"_{name}", lambda _, dtype, name=name: self._launched(name, dtype))
        patch.setattr(
            begin_kernel, "_begin", lambda planes, dtype: _Launched(dtype, partial(self.begin, planes, dtype))
        )

    @property
    def copied(self) -> list[int]:
        """Planes of each launch that has copied from them."""
        return [planes for name, planes in self.launches if name == "copy"]

    @property
    def put(self) -> list[int]:
        """Planes of each launch that has written to them."""
        return [planes for name, planes in self.launches if name == "put"]

    @property
    def begun(self) -> list[int]:
        """Planes that each launch has made."""
        return [planes for name, planes in self.launches if name == "begin"]

    def _launched(self, name: str, dtype: mx.Dtype) -> _Launched:
        return _Launched(dtype, lambda *given: [self.run(name, dtype, *given)])

    def begin(
        self, planes: int, dtype: mx.Dtype, inputs: Sequence[mx.array], blocks: int, shape: Sequence[int]
    ) -> list[Array]:
        """What such a launch returns."""
        mx.eval(*inputs)
        mx.synchronize()
        self.launches.append(("begin", planes))
        arrays = [np.asarray(array) for array in inputs]
        out = np.full((planes, *shape), 7, dtype=arrays[0].dtype)
        # Vectors are written where they may be.
        assert not self.aligned or out.ctypes.data % 16 == 0
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, *out)]
        self._begins(planes, dtype)(ctypes.c_int(blocks), ctypes.c_int(copy_kernel.THREADS), *pointers)
        return [*out]

    def _begins(self, planes: int, dtype: mx.Dtype) -> Run:
        key = "begin", planes, dtype.size
        if key not in self._built:
            names = begin_kernel.inputs(dtype)
            arguments = {each: "const int*" if each == "span" else "const T*" for each in names}
            arguments |= dict.fromkeys(begin_kernel.outputs(planes, dtype), "T*")
            self._built[key] = self._compiled(dtype, begin_kernel.source(planes), arguments)
        return self._built[key]

    def _compiled(self, dtype: mx.Dtype, source: str, arguments: Mapping[str, str]) -> Run:
        given = "".join(f"constexpr int {each} = {value};" for each, value in copy_kernel.constants().items())
        return compiled(f"using T = {_TYPES[dtype.size]};\n{given}\n", source, arguments, "")

    def run(self, name: str, dtype: mx.Dtype, inputs: Sequence[mx.array], blocks: int, shape: Sequence[int]) -> Array:
        """What the launch returns. What it is to write to is written to."""
        mx.eval(*inputs)
        mx.synchronize()
        own = [np.asarray(array) for array in inputs]
        planes = len(own) - (1 if name == "copy" else 2)
        self.launches.append((name, planes))
        used = [array.copy(order="K") for array in own] if self.aligned else own
        strides = [np.array(array.strides, dtype=np.int64) // array.itemsize for array in used[:planes]]
        # One more than is to be written, to see that it is not.
        out = np.full((shape[0] + 1, *shape[1:]), 7, dtype=own[0].dtype if name == "copy" else np.int32)
        shapes = [np.array(array.shape, dtype=np.int32) for array in (used[0], *used[planes:])]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*used, *shapes, *strides, out)]
        self._kernel(name, planes, dtype)(ctypes.c_int(blocks), ctypes.c_int(copy_kernel.THREADS), *pointers)
        assert (out[-1] == 7).all()
        if name == "put" and self.aligned:
            for array, written in zip(own, used, strict=True):
                np.copyto(array, written)
        return out[:-1]

    def _kernel(self, name: str, planes: int, dtype: mx.Dtype) -> Run:
        key = name, planes, dtype.size
        if key not in self._built:
            of = {"copy": copy_kernel.COPY, "put": copy_kernel.PUT}[name]
            names = copy_kernel.inputs(of, planes, dtype)
            arguments = {each: "const int*" if each == "span" else "const T*" for each in names}
            arguments |= {f"{each}_shape": "const int*" for each in ("plane0", *[*names][planes:])}
            arguments |= {f"plane{i}_strides": "const int64_t*" for i in range(planes)}
            arguments |= {"out": "T*"} if name == "copy" else {"done": "int*"}
            self._built[key] = self._compiled(dtype, copy_kernel.source(of, planes), arguments)
        return self._built[key]


class _Launched:
    """In the place of a Kernel: `run` has what it is given, how many blocks there are, and the shape of the first of
    what it returns."""

    def __init__(self, dtype: mx.Dtype, run: Callable[[Sequence[mx.array], int, Sequence[int]], list[Array]]) -> None:
        self._dtype = dtype
        self._run = run

    def launch(
        self,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        assert {array.dtype for array in inputs[:-1]} == {self._dtype}
        assert [*output_shapes] == [output_shapes[0]] * len(output_shapes)
        found = [*map(mx.array, self._run(inputs, grid[0] // threadgroup[0], output_shapes[0]))]
        assert [array.dtype for array in found] == [*output_dtypes]
        return found
