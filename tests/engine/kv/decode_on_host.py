"""`decode_kernel`'s source compiled for the host: at once, and in place."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from msgspec.structs import replace

from runner.engine.kv import attention_kernel, decode_kernel
from runner.engine.kv.attention_kernel import rotating
from runner.engine.kv.calls import Call, JoinedCall, Planes
from runner.engine.kv.decode_source import JOINED, SOURCE
from runner.engine.kv.masks import FEW
from tests.engine.cuda_on_host import Array
from tests.engine.kv.described import Described, memory_of
from tests.engine.tensor_cores_on_host import DEVICE, TYPES


class DecodeOnHost:
    """Does what `attention_kernel.attend_and_write` does by `decode_kernel`, where `splits` blocks share keys.

    There are never enough blocks (`crowd`), or always. Planes lie `apart` bytes from where 16 could be copied at once.
    """

    def __init__(self, splits: int = 1, warps: int = 4, *, crowd: int = 1 << 20, apart: int = 0) -> None:
        self._splits = splits
        self._warps = warps
        self._crowd = crowd
        self._apart = apart
        self._kernels = Described()

    def joined(self, call: JoinedCall) -> tuple[mx.array, Planes]:
        """As `attention_kernel.attend_joined`."""
        rows, tokens, _ = call.joined.shape
        given = {"joined": call.joined, "held_keys": call.planes[0], "held_values": call.planes[1]}
        form = call.heads, call.groups, call.width
        out = self._launch(given, call, rows, tokens, form, (0, 0), JOINED + SOURCE)
        return out.reshape(rows, tokens, -1), call.planes

    def __call__(self, call: Call) -> tuple[mx.array, Planes]:
        rows, heads, tokens, width = call.queries.shape
        given = dict(zip(attention_kernel.INPUTS, (call.queries, call.keys, call.values, *call.planes), strict=False))
        form = heads, call.keys.shape[1], width
        out = self._launch(given, call, rows, tokens, form, (call.window or 0, call.ring or 0), SOURCE)
        return out.swapaxes(1, 2), call.planes

    def _launch(
        self,
        given: dict[str, mx.array],
        call: Call | JoinedCall,
        rows: int,
        tokens: int,
        form: tuple[int, int, int],
        behind: tuple[int, int],
        source: str,
    ) -> mx.array:
        """[rows, tokens, heads, width]; the planes are written."""
        (heads, groups, width), (window, ring) = form, behind
        dtype = next(iter(given.values())).dtype
        way = decode_kernel.shape(dtype, width, heads, groups, tokens, FEW)
        assert way is not None
        way = replace(way, warps=self._warps)
        frequencies, rotation = rotating(call.rotation)
        blocks = way.blocks(rows, tokens)
        counters = np.zeros((self._splits, blocks), dtype=np.int32)
        given = {**given, "starts": call.starts, "after": call.starts}
        mx.eval(*given.values(), frequencies)
        mx.synchronize()
        arrays = {name: memory_of(array) for name, array in given.items()}
        arrays |= {"counters": counters, "frequencies": np.asarray(frequencies)}
        own = {name: arrays[name] for name in ("held_keys", "held_values")}
        arrays |= {name: _placed(plane, self._apart) for name, plane in own.items()}
        out = np.zeros((rows, tokens, heads, width), dtype=arrays["held_keys"].dtype)
        partial = np.full((blocks, self._splits, way.lines, width + 2), np.nan, dtype=np.float32)
        numbers = decode_kernel.constants(way, window, ring, rotation)
        numbers = tuple((name, self._crowd if name == "CROWD" else value) for name, value in numbers)
        header = TYPES + decode_kernel.header(dtype, numbers, call.scale) + DEVICE
        outputs = {"out": out, "partial": partial}
        self._kernels.run(header, source, arrays, outputs, blocks * self._splits, way.threads)
        assert not counters.any(), "the next launch finds zeros"
        for name, array in own.items():
            np.copyto(array, arrays[name])
        result = mx.array(out)
        return result.view(dtype) if out.dtype == np.uint16 else result


def _placed(plane: Array, apart: int) -> Array:
    """A copy in the same order of axes, so many bytes behind a multiple of 16."""
    order = np.argsort([-stride for stride in plane.strides], kind="stable")
    memory = np.empty(plane.nbytes + 32, dtype=np.uint8)
    first = -memory.ctypes.data % 16 + apart
    flat = memory[first : first + plane.nbytes].view(plane.dtype)
    placed = flat.reshape([plane.shape[axis] for axis in order]).transpose(np.argsort(order))
    np.copyto(placed, plane)
    return placed
