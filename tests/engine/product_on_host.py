"""`product_kernel`'s source on the host."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np

from runner.engine import product_kernel
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import RANKS, TILES, Changed, Choose, Multiply, Way
from runner.engine.product_source import SWIGLU
from tests.engine.cuda_on_host import Run, compiled
from tests.engine.tensor_cores_on_host import DEVICE, TYPES


class OnHost:
    """Makes products as `product_kernel.multiply` and `product_kernel.changed` do. Each is computed at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._built: dict[tuple[Any, ...], Run] = {}

    def multiply(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, choose: Choose) -> Multiply:
        def call(x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
            return self._call(choose, epilogue, x, _first(x, weight, added, epilogue), outputs)

        return call

    def changed(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, choose: Choose) -> Changed:
        def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
            counters = mx.zeros((2,), mx.int32)
            more = [stack.down, stack.b, stack.span_array, slots.slots, counters]
            return self._call(choose, epilogue, x, [*_first(x, weight, added, epilogue), *more], outputs)

        return call

    def _call(self, choose: Choose, epilogue: str, x: mx.array, arrays: list[mx.array], outputs: int) -> mx.array:
        changes, inputs, dtype = len(arrays) > 3, x.shape[-1], x.dtype
        rows = x.size // inputs
        tiles = next(tiles for tiles in TILES if rows <= tiles * 8)
        way = choose(outputs, inputs, tiles, epilogue)
        names = product_kernel.inputs_of(epilogue, changes=changes)
        views = [_on_host(array) for array in arrays]
        results = [np.zeros((*x.shape[:-1], outputs), dtype=np.uint16)]
        blocks = outputs * (2 if epilogue == "swiglu" else 1) // (16 * way.mtiles)
        if changes:
            ranks = arrays[names.index("down")].shape[1]
            results.append(np.full((rows, ranks), np.nan, dtype=np.float32))
            blocks += rows * -(-ranks // RANKS)
        shapes = [np.array(array.shape, dtype=np.int32) for array in arrays]
        dims = [array.ndim for array in arrays]
        run = self._run(way, tiles, dtype, epilogue, changes)
        run(
            *(ctypes.c_int(blocks), ctypes.c_int(way.warps * 32)),
            *(_pointer(array) for array in (*views, *results, *shapes)),
            *(ctypes.c_int(dim) for dim in dims),
        )
        if changes:
            assert not views[names.index("counters")].any(), "the next launch finds zeros"
        return mx.array(results[0]).view(dtype)

    def _run(self, way: Way, tiles: int, dtype: mx.Dtype, epilogue: str, changes: bool) -> Run:
        key = (way, tiles, dtype, epilogue, changes)
        if key not in self._built:
            folder = self._folder / str(len(self._built))
            folder.mkdir()
            kind = "bfloat16" if dtype == mx.bfloat16 else "_Float16"
            inputs = product_kernel.inputs_of(epilogue, changes=changes)
            arguments = {name: f"const {_TYPES.get(name, kind)}*" for name in inputs}
            arguments |= {name: f"{_TYPES.get(name, kind)}*" for name in product_kernel.outputs_of(changes=changes)}
            arguments |= {f"{name}_shape": "const int*" for name in inputs} | {f"{name}_ndim": "int" for name in inputs}
            constants = product_kernel.constants(way, tiles, dtype, epilogue)
            header = TYPES + constants + DEVICE + (SWIGLU if epilogue == "swiglu" else "")
            source = product_kernel.source(epilogue, changes=changes)
            self._built[key] = compiled(folder, header, source, arguments, "")
        return self._built[key]


_TYPES: Final = {"spans": "int", "slots": "int", "counters": "int", "inner": "float"}
"""Those that are not the tokens'."""


def _first(x: mx.array, weight: mx.array, added: mx.array | None, epilogue: str) -> list[mx.array]:
    if epilogue == "swiglu":
        return [x, weight]
    return [x, weight, mx.zeros((1,), x.dtype) if added is None else added]


def _on_host(array: mx.array) -> np.ndarray[Any, Any]:
    return np.array(array if array.dtype == mx.int32 else mx.contiguous(array).view(mx.uint16))


def _pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
