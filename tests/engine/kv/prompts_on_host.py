"""`prompt_kernel`'s sources compiled for the host: at once, and in place."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from runner.engine.kv import prompt_kernel
from runner.engine.kv.attention_kernel import rotating
from runner.engine.kv.calls import Call, Planes
from tests.engine.kv.described import Described, memory_of
from tests.engine.tensor_cores_on_host import DEVICE, TYPES

Array = np.ndarray[Any, Any]


class PromptsOnHost:
    """Does what `prompt_kernel.write_and_attend` does, in blocks of so many warps, of which `splits` share keys."""

    def __init__(self, warps: int = 1, splits: int = 1) -> None:
        self.launches = 0
        self._warps = warps
        self._splits = splits
        self._kernels = Described()

    def __call__(self, call: Call) -> tuple[mx.array, Planes]:
        self.launches += 1
        rows, heads, tokens, width = call.queries.shape
        dtype = call.queries.dtype
        frequencies, rotation = rotating(call.rotation)
        given = (call.queries, call.keys, call.values, *call.planes, call.starts, call.starts, frequencies)
        mx.eval(*given, *(() if call.after is None else (call.after,)))
        mx.synchronize()
        arrays = dict(zip(prompt_kernel.WRITE_INPUTS, map(memory_of, given), strict=True))
        # MLX's own memory begins 8 bytes behind a multiple of 16 here, and the kernel would never take 16 at once.
        own = {name: arrays[name] for name in ("held_keys", "held_values")}
        arrays |= {name: array.copy(order="K") for name, array in own.items()}
        constants = [value for _, value in rotation]
        queries = np.zeros((rows, heads, tokens, width), dtype=arrays["queries"].dtype)
        header = TYPES + prompt_kernel.write_header(dtype, width, *constants, 1)
        self._kernels.run(header, prompt_kernel.WRITE, arrays, {"rotated": queries}, rows * tokens, width // 2)
        blocks = rows * heads * -(-tokens // (16 * self._warps))
        counters = np.zeros((self._splits, blocks), dtype=np.int32)
        arrays |= {"queries": queries, "counters": counters}
        arrays = {name: arrays[name] for name in prompt_kernel.ATTEND_INPUTS}
        out = np.zeros((rows, tokens, heads, width), dtype=queries.dtype)
        partial = np.full((blocks, self._splits, 16 * self._warps, width + 2), np.nan, dtype=np.float32)
        outputs = {"out": out, "partial": partial}
        header = TYPES + prompt_kernel.attend_constants(dtype, width, call.window or 0, call.scale, self._warps)
        blocks *= self._splits
        self._kernels.run(header + DEVICE, prompt_kernel.ATTEND, arrays, outputs, blocks, 32 * self._warps)
        assert not counters.any(), "the next launch finds zeros"
        for name, array in own.items():
            np.copyto(array, arrays[name])
        result = mx.array(out)
        return (result.view(dtype) if out.dtype == np.uint16 else result).swapaxes(1, 2), call.planes
