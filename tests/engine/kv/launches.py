"""Writing and attending at once without a GPU: by MLX's operations, and by the kernel's source on the host."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from runner.engine.kv import attention_kernel
from runner.engine.kv.attention_kernel import Call, Planes
from tests.engine.cuda_on_host import Run, compiled


def separately(call: Call) -> tuple[mx.array, Planes]:
    """What a launch should do, spelled out; the planes it is given stay as they are."""
    rows, heads, tokens, _ = call.queries.shape
    keys, values = (
        _written(plane, new, call.starts, call.ring)
        for plane, new in zip(call.planes, (call.keys, call.values), strict=True)
    )
    places = keys.shape[2]
    last = call.starts[:, None] + tokens - 1
    # The latest position at each place, where positions go round; else places are positions.
    size = call.ring or places
    at = last - (last - mx.arange(places)) % size if call.ring else mx.broadcast_to(mx.arange(places), (rows, places))
    of = call.starts[:, None] + mx.arange(tokens)
    seen = (at[:, None] <= of[:, :, None]) & (at[:, None] >= 0)
    if call.window:
        seen &= at[:, None] > of[:, :, None] - call.window
    shared = heads // keys.shape[1]
    queries, k, v = (array.astype(mx.float32) for array in (call.queries, keys[:rows], values[:rows]))
    k, v = (mx.repeat(array, shared, axis=1) for array in (k, v))
    scores = mx.where(seen[:, None], call.scale * (queries @ k.swapaxes(-1, -2)), -mx.inf)
    return (mx.softmax(scores, axis=-1) @ v).astype(call.queries.dtype), (keys, values)


def _written(plane: mx.array, new: mx.array, starts: mx.array, ring: int | None) -> mx.array:
    rows, groups, tokens, width = new.shape
    at = (starts[:, None] + mx.arange(tokens)) % (ring or plane.shape[2])
    index = mx.broadcast_to(at[:, None, :, None], (rows, groups, tokens, width))
    return mx.concatenate([mx.put_along_axis(plane[:rows], index, new, axis=2), plane[rows:]])


def only_with_arrays_on_the_host() -> None:
    """Skip the test where they are not: what is written to a copy of them is lost."""
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("arrays are not in the host's memory")


class OnDevice:
    """The kernel itself."""

    def __init__(self) -> None:
        self.launches = 0

    def __call__(self, call: Call) -> tuple[mx.array, Planes]:
        self.launches += 1
        return attention_kernel.attend_and_write(call)


class OnHost:
    """The kernel's source, compiled for the host: at once, and in place.

    By one thread a block, or by several, which share keys as those on the device do.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.launches = 0
        self._folder = folder
        self._threads = threads
        self._built: dict[tuple[str, int, int], Run] = {}

    def __call__(self, call: Call) -> tuple[mx.array, Planes]:
        self.launches += 1
        rows, heads, tokens, width = call.queries.shape
        groups = call.keys.shape[1]
        way = attention_kernel.shape(width, call.queries.dtype.size, heads // groups)
        assert way is not None
        arrays = [call.queries, call.keys, call.values, *call.planes]
        mx.eval(arrays, call.starts, *(() if call.after is None else (call.after,)))
        mx.synchronize()
        views = [_view(array) for array in arrays]
        out = np.zeros((rows, tokens, heads, width), dtype=views[0].dtype)
        passed: list[Any] = []
        kept = [np.array([view.shape, np.array(view.strides) // view.itemsize], dtype=np.int64) for view in views]
        for view, (_, strides) in zip(views, kept, strict=True):
            passed += [_pointer(view), _pointer(strides)]
        shapes = [kept[0][0].astype(np.int32), kept[1][0].astype(np.int32)]
        starts = np.array(call.starts)
        passed += [*map(_pointer, shapes), _pointer(starts), _pointer(out)]
        passed += [ctypes.c_int(call.window or 0), ctypes.c_int(call.ring or 0)]
        passed.append(ctypes.c_float(call.scale * np.log2(np.e)))
        blocks = rows * groups * (heads // groups // way.heads) * tokens
        lanes = way.lanes if self._threads > 1 else 1
        self._run(call.queries.dtype, width, way.heads, lanes)(
            ctypes.c_int(blocks), ctypes.c_int(self._threads), *passed
        )
        result = mx.array(out)
        return (result.view(call.queries.dtype) if out.dtype == np.uint16 else result).swapaxes(1, 2), call.planes

    def _run(self, dtype: mx.Dtype, width: int, heads: int, lanes: int) -> Run:
        kind = "bfloat16" if dtype == mx.bfloat16 else "float"
        if (kind, width, heads) not in self._built:
            folder = self._folder / f"{kind}-{width}-{heads}-{self._threads}"
            folder.mkdir(parents=True)
            arguments = {}
            for name in ("queries", "keys", "values", "held_keys", "held_values"):
                arguments |= {name: f"const {kind}*", f"{name}_strides": "const int64_t*"}
            arguments |= {"queries_shape": "const int*", "keys_shape": "const int*", "starts": "const int*"}
            arguments |= {"out": f"{kind}*", "WINDOW": "int", "RING": "int", "SCALE": "float"}
            constants = f"using T = {kind}; constexpr int D = {width}, HEADS = {heads};"
            constants += f"constexpr int LANES = {lanes}, THREADS = {self._threads};"
            self._built[kind, width, heads] = compiled(
                folder, attention_kernel.HEADER, attention_kernel.SOURCE, arguments, constants
            )
        return self._built[kind, width, heads]


def _view(array: mx.array) -> np.ndarray[Any, Any]:
    """The array's own memory."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
        mx.eval(array)
    return np.asarray(array)


def _pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
