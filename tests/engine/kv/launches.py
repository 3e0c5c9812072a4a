"""Writing and attending at once without a GPU: by MLX's operations, and by the kernel's source on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from msgspec.structs import replace

from runner.engine.kv import attention_kernel
from runner.engine.kv.calls import Call, JoinedCall, Launch, Planes
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.quantised_kernel import JoinedPackedCall, PackedCall
from tests.engine.cuda_on_host import Run, compiled
from tests.engine.kv.described import memory_of


def separately(call: Call) -> tuple[mx.array, Planes]:
    """What a launch should do, spelled out; the planes it is given stay as they are."""
    rows, heads, tokens, _ = call.queries.shape
    queries, keys = turned(call)
    call = replace(call, queries=queries, keys=keys, rotation=None)
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


def separately_joined(call: JoinedCall) -> tuple[mx.array, Planes]:
    """The same of queries, keys and values side by side."""
    rows, tokens, _ = call.joined.shape
    lines = call.joined.reshape(rows, tokens, -1, call.width).swapaxes(1, 2)
    parts = mx.split(lines, [call.heads, call.heads + call.groups], axis=1)
    whole = Call(*parts, call.planes, call.starts, call.scale, None, None, call.after, call.rotation)
    attended, planes = separately(whole)
    return attended.swapaxes(1, 2).reshape(rows, tokens, -1), planes


def packed_separately(call: PackedCall) -> tuple[mx.array, Sequence[mx.array]]:
    """The same for packed keys and values."""
    how = Quantisation(call.bits, call.group_size)
    queries, keys = turned(call)
    new = (*how.pack(keys), *how.pack(call.values))
    planes = [_written(plane, part, call.starts, None) for plane, part in zip(call.planes, new, strict=True)]
    plain = [how.unpack(part) for part in (new[:3], new[3:], planes[:3], planes[3:])]  # type: ignore[arg-type]
    attended, _ = separately(
        Call(queries, plain[0], plain[1], (plain[2], plain[3]), call.starts, call.scale, call.window, None, call.after)
    )
    return attended, planes


def packed_separately_joined(call: JoinedPackedCall) -> tuple[mx.array, Sequence[mx.array]]:
    """And for those from queries, keys and values side by side."""
    rows, tokens, _ = call.joined.shape
    lines = call.joined.reshape(rows, tokens, -1, call.width).swapaxes(1, 2)
    parts = mx.split(lines, [call.heads, call.heads + call.groups], axis=1)
    how = call.scale, None, call.bits, call.group_size, call.after, call.rotation
    attended, planes = packed_separately(PackedCall(*parts, call.planes, call.starts, *how))
    return attended.swapaxes(1, 2).reshape(rows, tokens, -1), planes


def turned(call: Call | PackedCall) -> tuple[mx.array, mx.array]:
    """Queries and keys, rotated if they are to be."""
    if (how := call.rotation) is None:
        return call.queries, call.keys
    queries, keys = (
        mx.fast.rope(
            array,
            how.dims,
            traditional=how.traditional,
            base=None,
            scale=1.0,
            offset=call.starts,
            freqs=1 / how.frequencies,
        )
        for array in (call.queries, call.keys)
    )
    return queries, keys


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
    """The kernel itself, or those for prompts."""

    def __init__(self, launch: Launch = attention_kernel.attend_and_write) -> None:
        self.launches = 0
        self._launch = launch

    def __call__(self, call: Call) -> tuple[mx.array, Planes]:
        self.launches += 1
        return self._launch(call)


class OnHost:
    """The kernel's source, compiled for the host: at once, and in place.

    By one thread a block, or by several, which share keys as those on the device do; and by one block, or `splits`.
    """

    def __init__(self, threads: int = 1, splits: int = 1) -> None:
        self.launches = 0
        self._compiled = Compiled(threads, splits)

    def __call__(self, call: Call) -> tuple[mx.array, Planes]:
        self.launches += 1
        rows, heads, tokens, width = call.queries.shape
        groups = call.keys.shape[1]
        way = attention_kernel.shape(width, call.queries.dtype.size, heads // groups)
        assert way is not None
        arrays = {"queries": call.queries, "keys": call.keys, "values": call.values}
        arrays |= dict(zip(("held_keys", "held_values"), call.planes, strict=True))
        numbers = {"WINDOW": call.window or 0, "RING": call.ring or 0}
        arrays["frequencies"] = mx.zeros((1,)) if call.rotation is None else call.rotation.frequencies
        blocks = rows * groups * (heads // groups // way.heads) * tokens
        constants = {"D": width, "HEADS": way.heads, "LANES": way.lanes, "FEW": 16}
        constants["ROTATED"] = 0 if call.rotation is None else call.rotation.dims
        constants["TRADITIONAL"] = int(call.rotation is not None and call.rotation.traditional)
        source = (attention_kernel.HEADER, attention_kernel.SOURCE)
        attended = self._compiled.run(call, source, arrays, ("queries", "keys"), constants, numbers, blocks)
        return attended, call.planes


class Compiled:
    """Sources of kernels that attend, compiled when they are first run."""

    def __init__(self, threads: int, splits: int) -> None:
        self._threads = threads
        self._splits = splits
        self._built: dict[Any, Run] = {}

    def run(
        self,
        call: Call,
        source: tuple[str, str],
        arrays: Mapping[str, mx.array],
        shaped: Sequence[str],
        constants: dict[str, int],
        numbers: Mapping[str, int],
        blocks: int,
    ) -> mx.array:
        """What is attended to, [rows, heads, tokens, width]."""
        rows, heads, tokens, width = call.queries.shape
        mx.eval(*arrays.values(), call.starts, *(() if call.after is None else (call.after,)))
        mx.synchronize()
        views = {name: memory_of(array) for name, array in arrays.items()}
        kept = {
            name: np.array([view.shape, np.array(view.strides) // view.itemsize], dtype=np.int64)
            for name, view in views.items()
        }
        shapes = {name: kept[name][0].astype(np.int32) for name in shaped}
        starts = np.array(call.starts)
        out = np.zeros((rows, tokens, heads, width), dtype=views["queries"].dtype)
        partial = np.full((blocks, self._splits, constants["HEADS"], width + 2), np.nan, dtype=np.float32)
        counters = np.zeros((self._splits, blocks), dtype=np.int32)
        counted = np.array(counters.shape, dtype=np.int32)
        arguments, passed = {}, []
        for name, view in views.items():
            kind = _KINDS[view.dtype.name]
            arguments |= {name: f"const {kind}*", f"{name}_strides": "const int64_t*"}
            passed += [_pointer(view), _pointer(kept[name][1])]
        for name, shape in shapes.items():
            arguments[f"{name}_shape"] = "const int*"
            passed.append(_pointer(shape))
        kind = _KINDS[out.dtype.name]
        arguments |= {"starts": "const int*", "counters": "const int*"}
        arguments |= {"counters_shape": "const int*", "out": f"{kind}*", "partial": "float*"}
        passed += [_pointer(array) for array in (starts, counters, counted, out, partial)]
        arguments |= dict.fromkeys(numbers, "int") | {"SCALE": "float"}
        passed += [*map(ctypes.c_int, numbers.values()), ctypes.c_float(call.scale * np.log2(np.e))]
        if self._threads == 1:
            constants["LANES"] = 1
        constants |= {"THREADS": self._threads}
        self._of(kind, source, arguments, constants)(
            ctypes.c_int(blocks * self._splits), ctypes.c_int(self._threads), *passed
        )
        assert not counters.any(), "a launch leaves them as they were"
        result = mx.array(out)
        return (result.view(call.queries.dtype) if out.dtype == np.uint16 else result).swapaxes(1, 2)

    def _of(self, kind: str, source: tuple[str, str], arguments: dict[str, str], constants: dict[str, int]) -> Run:
        key = (kind, *constants.items())
        if key not in self._built:
            text = f"using T = {kind}; constexpr int "
            text += ", ".join(f"{name} = {value}" for name, value in constants.items()) + ";"
            self._built[key] = compiled(*source, arguments, text)
        return self._built[key]


_KINDS = {"uint16": "bfloat16", "float32": "float", "uint32": "uint32_t"}


def _pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
