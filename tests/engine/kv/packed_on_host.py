"""`quantised_kernel`'s source compiled for the host: at once, and in place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx
import numpy as np
from msgspec.structs import replace

from runner.engine.kv import attention_source, quantised_kernel
from runner.engine.kv.attention_kernel import rotating
from runner.engine.kv.quantised_device import HEADER
from runner.engine.kv.quantised_kernel import JoinedPackedCall, PackedCall, Shape
from runner.engine.kv.quantised_source import SOURCE
from tests.engine.cuda_on_host import Run, compiled, described
from tests.engine.tensor_cores_on_host import MULTIPLY

Array = np.ndarray[Any, Any]

# MLX looks for a group's range from elsewhere on the CPU.
DEVICE: Final = (
    """
#include <deque>
#include <vector>

constexpr float LEAST = 3.4e38f, MOST = -3.4e38f;
static uint4 memory[8 * 1024];
// A copy is made when its thread waits for it, and not before.
struct Copy { void* to; const void* from; };
static std::deque<std::vector<Copy>> groups_of_each[1024];
#define groups_of_copies groups_of_each[threadIdx.x]
static std::vector<Copy> copies_of_each[1024];
#define copies copies_of_each[threadIdx.x]
static void copy(void* to, const void* from) {
    if (reinterpret_cast<size_t>(to) % 16 || reinterpret_cast<size_t>(from) % 16) std::abort();
    copies.push_back({to, from});
}
static void close_group() { groups_of_copies.push_back(std::move(copies)); copies.clear(); }
template <int LATEST> static void wait_for_groups() {
    while (groups_of_copies.size() > LATEST) {
        for (const Copy& one : groups_of_copies.front()) std::memcpy(one.to, one.from, 16);
        groups_of_copies.pop_front();
    }
}

static float low_of(uint32_t halves) { _Float16 x; std::memcpy(&x, &halves, 2); return float(x); }
static float high_of(uint32_t halves) { return low_of(halves >> 16); }
static uint32_t halves_of(float low, float high) {
    const _Float16 both[2] = {_Float16(low), _Float16(high)};
    uint32_t word;
    std::memcpy(&word, both, 4);
    return word;
}
static uint32_t multiply_add(uint32_t x, uint32_t y, uint32_t z) {
    return halves_of(low_of(x) * low_of(y) + low_of(z), high_of(x) * high_of(y) + high_of(z));
}

static float power_of_two(float x) { return std::exp2(x); }
static float logarithm(float x) { return std::log2(x); }
// Of a warp: all have left what they have before any reads, and have read before any goes on.
static const unsigned char* lines_of[1024];
template <bool COLUMNS, int COUNT> static void matrices(uint32_t (&to)[COUNT], const void* line) {
    if (reinterpret_cast<size_t>(line) % 16) std::abort();
    lines_of[threadIdx.x] = static_cast<const unsigned char*>(line);
    __syncwarp();
    const int lane = threadIdx.x % 32;
    const unsigned char* const* const warp = lines_of + threadIdx.x - lane;
    for (int m = 0; m < COUNT; ++m) {
        for (int i = 0; i < 2; ++i) {
            const unsigned char* const from = COLUMNS
                ? warp[m * 8 + lane % 4 * 2 + i] + lane / 4 * 2 : warp[m * 8 + lane / 4] + lane % 4 * 4 + i * 2;
            std::memcpy(reinterpret_cast<uint16_t*>(&to[m]) + i, from, 2);
        }
    }
    __syncwarp();
}
static uint32_t words_of[1024];
static uint32_t transposed(uint32_t two) {
    words_of[threadIdx.x] = two;
    __syncwarp();
    const int lane = threadIdx.x % 32, line = lane / 4;
    uint32_t result = 0;
    for (int i = 0; i < 2; ++i) {
        const uint32_t its = words_of[threadIdx.x - lane + (lane % 4 * 2 + i) * 4 + line / 2];
        result |= (its >> (line % 2 * 16) & 0xffff) << (16 * i);
    }
    __syncwarp();
    return result;
}

static float value(uint32_t word, int which) { return which ? high_of(word) : low_of(word); }
"""
    + MULTIPLY
)
"""What only a GPU can do."""

_CODES: Final = ("held_keys", "held_values")
_TYPES: Final = {
    "bfloat16": "bfloat16",
    "float16": "_Float16",
    "float32": "float",
    "uint32": "uint32_t",
    "int32": "int",
}


class PackedOnHost:
    """Does what `quantised_kernel.attend_and_write` does, in blocks of so many warps, of which `splits` share keys.

    There are never enough blocks (`crowd`), or always. Scales and biases lie `apart` bytes from where 16 could be
    copied at once.
    """

    def __init__(self, warps: int = 1, splits: int = 1, apart: int = 0, crowd: int = 1 << 20) -> None:
        self.launches = 0
        self._warps = warps
        self._splits = splits
        self._apart = apart
        self._crowd = crowd
        self._built: dict[tuple[Any, ...], Run] = {}

    def joined(self, call: JoinedPackedCall) -> tuple[mx.array, Sequence[mx.array]]:
        """As `quantised_kernel.attend_joined`."""
        (rows, tokens, _), dtype = call.joined.shape, call.joined.dtype
        how = call.bits, call.group_size
        way = quantised_kernel.shape(call.width, dtype.size, how, call.heads, call.groups, tokens)
        assert way is not None
        out = self._launch([call.joined], call, way, (rows, tokens, call.heads, call.width), 0)
        return out.reshape(rows, tokens, -1), call.planes

    def __call__(self, call: PackedCall) -> tuple[mx.array, Sequence[mx.array]]:
        rows, heads, tokens, width = call.queries.shape
        own, way = [call.queries, call.keys, call.values], quantised_kernel.shape_of(call)
        out = self._launch(own, call, way, (rows, tokens, heads, width), call.window or 0)
        return out.swapaxes(1, 2), call.planes

    def _launch(
        self,
        own: list[mx.array],
        call: PackedCall | JoinedPackedCall,
        way: Shape,
        shape: tuple[int, int, int, int],
        window: int,
    ) -> mx.array:
        """[rows, tokens, heads, width]; the planes are written."""
        self.launches += 1
        (rows, tokens, _, width), dtype = shape, own[0].dtype
        way = replace(way, warps=self._warps)
        frequencies, rotation = rotating(call.rotation)
        blocks = way.blocks(rows, tokens)
        counters = np.zeros((self._splits, blocks), dtype=np.int32)
        given = [*own, *call.planes, call.starts, call.starts]
        types = quantised_kernel.types(dtype) if len(own) > 1 else quantised_kernel.joined_types(dtype)
        mx.eval(*given, *(() if call.after is None else (call.after,)))
        mx.synchronize()
        arrays = dict(zip(types, [*map(_view, given), counters, _view(frequencies)], strict=True))
        planes = {name: arrays[name] for name in quantised_kernel.HELD}
        arrays |= {name: _placed(plane, self._apart * (name not in _CODES)) for name, plane in planes.items()}
        out = np.zeros(shape, dtype=next(iter(arrays.values())).dtype)
        partial = np.full((blocks, self._splits, way.lines, width + 2), np.nan, dtype=np.float32)
        # All windows are one text.
        sizes = dict(quantised_kernel.constants(width, call.bits, call.group_size, 0, way)) | dict(rotation)
        del sizes["WINDOW"]
        sizes["CROWD"] = self._crowd
        numbers: dict[str, Any] = {"WINDOW": ctypes.c_int(window)}
        numbers["SCALE"] = ctypes.c_float(call.scale * np.log2(np.e))
        self._run(types, sizes, arrays, (out, partial), numbers, blocks * self._splits)
        for name, plane in planes.items():
            ctypes.memmove(plane.ctypes.data, arrays[name].ctypes.data, plane.nbytes)
        assert not counters.any(), "a launch leaves them as they were"
        result = mx.array(out)
        return result.view(dtype) if out.dtype == np.uint16 else result

    def _run(
        self,
        types: dict[str, mx.Dtype],
        sizes: dict[str, int],
        arrays: dict[str, Array],
        results: tuple[Array, Array],
        numbers: dict[str, Any],
        blocks: int,
    ) -> None:
        kinds = {name: _TYPES[str(kind).split(".")[-1]] for name, kind in types.items()}
        own, joined = next(iter(kinds.values())), "joined" in kinds
        arguments, passed = described(arrays, kinds)
        arguments |= {"out": f"{own}*", "partial": "float*", "WINDOW": "int", "SCALE": "float"}
        key = (own, joined, *sizes.items())
        if key not in self._built:
            text = f"using T = {own}; constexpr int "
            text += ", ".join(f"{name} = {value}" for name, value in sizes.items()) + ";"
            header = DEVICE + attention_source.HEADER + HEADER
            self._built[key] = compiled(header, quantised_kernel.joined_source() if joined else SOURCE, arguments, text)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*passed, *results)]
        self._built[key](ctypes.c_int(blocks), ctypes.c_int(self._warps * 32), *pointers, *numbers.values())


def _view(array: mx.array) -> Array:
    """The array's own memory."""
    if array.dtype in (mx.bfloat16, mx.float16):
        array = array.view(mx.uint16)
        mx.eval(array)
    return np.asarray(array)


def _placed(array: Array, apart: int) -> Array:
    """A copy that begins at a multiple of 16 bytes, or so many `apart` from one."""
    room = np.zeros(array.nbytes + 32, dtype=np.uint8)
    first = -room.ctypes.data % 16 + apart
    copy: Array = room[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy
