"""`product_kernel`'s source on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from runner.engine import product_kernel
from runner.engine.adapters.layers import RowSlots, boards_of
from runner.engine.adapters.stack import LINE, Stack
from runner.engine.product_kernel import RANKS, TILES, Changed, Choose, Multiply, Way
from runner.engine.product_source import SWIGLU
from tests.engine.cuda_on_host import Run, compiled
from tests.engine.tensor_cores_on_host import DEVICE, TYPES

Array = np.ndarray[Any, Any]


class OnHost:
    """Makes products as `product_kernel.multiply` and `product_kernel.changed` do. Each is computed at once."""

    def __init__(self) -> None:
        self._built: dict[tuple[Any, ...], Run] = {}

    def multiply(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, choose: Choose) -> Multiply:
        def call(x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
            return self._call(choose, epilogue, x, _first(x, weight, added, epilogue), outputs)

        return call

    def changed(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, choose: Choose) -> Changed:
        def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
            assert stack.packed is not None
            more = [stack.packed, board_of(slots)]
            return self._call(choose, epilogue, x, [*_first(x, weight, added, epilogue), *more], outputs)

        return call

    def _call(self, choose: Choose, epilogue: str, x: mx.array, arrays: list[mx.array], outputs: int) -> mx.array:
        changes, inputs, dtype = len(arrays) > 3, x.shape[-1], x.dtype
        rows = x.size // inputs
        tiles = next(tiles for tiles in TILES if rows <= tiles * 8)
        way = choose(outputs, inputs, tiles, epilogue)
        names = product_kernel.inputs_of(epilogue, changes=changes)
        views = [on_host(array) for array in arrays]
        result = np.zeros((*x.shape[:-1], outputs), dtype=np.uint16)
        blocks = outputs * (2 if epilogue == "swiglu" else 1) // (16 * way.mtiles)
        if changes:
            _, width = arrays[names.index("changes")].shape
            ranks = (width - LINE) // (inputs + arrays[1].shape[0])
            blocks += rows * -(-ranks // RANKS)
        launch(self._run(way, tiles, dtype, epilogue, changes), blocks, way.warps * 32, views, result)
        if changes:
            assert not views[names.index("board")].flatten()[:32].any(), "the next launch finds zeros"
        return mx.array(result).view(dtype)

    def _run(self, way: Way, tiles: int, dtype: mx.Dtype, epilogue: str, changes: bool) -> Run:
        key = (way, tiles, dtype, epilogue, changes)
        if key not in self._built:
            kind = "bfloat16" if dtype == mx.bfloat16 else "_Float16"
            arguments = arguments_of(product_kernel.inputs_of(epilogue, changes=changes), kind)
            constants = product_kernel.constants(way, tiles, dtype, epilogue)
            header = TYPES + constants + DEVICE + (SWIGLU if epilogue == "swiglu" else "")
            source = product_kernel.source(epilogue, changes=changes)
            self._built[key] = compiled(header, source, arguments, "")
        return self._built[key]


def arguments_of(names: list[str], kind: str, outputs: Mapping[str, str] | None = None) -> dict[str, str]:
    """A kernel's parameters and their types, for arrays of `kind`; boards and counters are of integers, what blocks
    leave for each other is float32. `outputs` are those beside the first."""
    kinds = {"board": "int", "counters": "int"} | dict.fromkeys(("inner", "room", "told"), "float")
    arguments = {name: f"const {kinds.get(name, kind)}*" for name in names}
    arguments |= {"out": f"{kind}*"} | dict(outputs or {})
    return arguments | {f"{name}_shape": "const int*" for name in names} | {f"{name}_ndim": "int" for name in names}


def launch(run: Run, blocks: int, threads: int, views: list[Array], *results: Array) -> None:
    """Of such a kernel."""
    shapes = [np.array(view.shape, dtype=np.int32) for view in views]
    run(
        *(ctypes.c_int(blocks), ctypes.c_int(threads)),
        *(ctypes.c_void_p(array.ctypes.data) for array in (*views, *results, *shapes)),
        *(ctypes.c_int(view.ndim) for view in views),
    )


def board_of(rows: RowSlots) -> mx.array:
    """A board whose room is no numbers."""
    numbers = [int(slot) for slot in np.array(rows.slots)]
    (board,) = boards_of(numbers, 1)
    first = 32 + -(-len(numbers) // 32) * 32
    flat = np.array(board).flatten()
    flat[first:] = np.full(flat.size - first, np.nan, dtype=np.float32).view(np.int32)
    return mx.array(flat).reshape(board.shape)


def _first(x: mx.array, weight: mx.array, added: mx.array | None, epilogue: str) -> list[mx.array]:
    if epilogue == "swiglu":
        return [x, weight]
    return [x, weight, mx.zeros((1,), x.dtype) if added is None else added]


def on_host(array: mx.array) -> Array:
    """Its bits."""
    return np.array(array if array.dtype.size == 4 else mx.contiguous(array).view(mx.uint16))
