"""`wide_product_kernel`'s source on the host, where copies and products happen as late as a GPU may make them."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from runner.engine import cuda_kernels, wide_changed_kernel, wide_product_kernel
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import Changed, Multiply
from runner.engine.product_source import SWIGLU
from runner.engine.wide_product_kernel import TOKENS, Choose, Inner, Way, in_a_room
from tests.engine.cuda_on_host import Run, compiled
from tests.engine.product_on_host import arguments_of, board_of, launch, on_host
from tests.engine.tensor_cores_on_host import TYPES

DEVICE = """
struct alignas(16) float4 { float x, y, z, w; };
alignas(1024) static uint4 ring[15 * 1024];
static uint4* aligned() { return ring; }

// What a thread has begun: groups of it, each as long as it may be left.
struct Begun {
    std::deque<std::vector<std::function<void()>>> groups;
    std::vector<std::function<void()>> open;
    void close() { groups.push_back(std::move(open)); open.clear(); }
    void wait(size_t latest) {
        for (; groups.size() > latest; groups.pop_front()) {
            for (auto& one : groups.front()) one();
        }
    }
};
static Begun copies[1024], products[1024];

static void copy(uint4* to, const void* from, bool there) {
    copies[threadIdx.x].open.push_back([=] { *to = there ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0}; });
}
static void close_group() { copies[threadIdx.x].close(); }
template <int LATEST> void wait_for_groups() { copies[threadIdx.x].wait(LATEST); }
static void publish() {}
static int acquire(const int* from) { return *from; }
static void prefetch(const void*) {}

// As the tensor cores find it: bits 4 to 6 of an address are those of the vector, and 7 to 9 of the line.
static float element(const uint4* tile, int line, int k) {
    uintptr_t at = reinterpret_cast<uintptr_t>(tile) + line * 128 + k * 2;
    at ^= at >> 3 & 0x70;
    T x;
    std::memcpy(&x, reinterpret_cast<const void*>(at), 2);
    return float(x);
}
static void open_products() {}
static void multiply_tile(float (&sum)[TOKENS / 2], const uint4* lines, const uint4* tokens) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    float* const to = sum;
    products[threadIdx.x].open.push_back([=] {
        for (int i = 0; i < TOKENS / 2; ++i) {
            const int line = warp * 16 + lane / 4 + i / 2 % 2 * 8, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) to[i] += element(lines, line, k) * element(tokens, token, k);
        }
    });
}
static void close_products() { products[threadIdx.x].close(); }
template <int LATEST> void wait_for_products() { products[threadIdx.x].wait(LATEST); }
static void put(float4* at, float4 four) { *at = four; }
static float4 look(const float4* at) { return *at; }
"""
"""What `wide_product_source` names."""


class WideOnHost:
    """Makes products as `wide_product_kernel.multiply` does. Each is computed at once."""

    def __init__(self) -> None:
        self._built: dict[tuple[Any, ...], Run] = {}

    def multiply(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, choose: Choose) -> Multiply:
        def call(x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
            way = choose(outputs, inputs, tokens_for(x.size // inputs), epilogue)
            given = {"x": x, "w": weight, "added": mx.zeros((1,), dtype) if added is None else added}
            return self._call(way, epilogue, given, outputs)["out"]

        return call

    def with_inner(self, outputs: int, inputs: int, dtype: mx.Dtype, choose: Choose) -> Inner:
        """As `wide_product_kernel.with_inner`."""

        def call(x: mx.array, weight: mx.array, stack: Stack) -> tuple[mx.array, mx.array]:
            assert stack.packed is not None
            way = choose(outputs, inputs, tokens_for(x.size // inputs), "changes")
            result = self._call(way, "changes", {"x": x, "w": weight, "changes": stack.packed}, outputs, stack)
            return result["out"], result["inner"]

        return call

    def changed(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, choose: Choose) -> Changed:
        """As `wide_changed_kernel.changed`."""

        def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
            assert stack.packed is not None
            way = choose(outputs, inputs, tokens_for(x.size // inputs), epilogue)
            assert wide_changed_kernel.fits(outputs, inputs, dtype, epilogue, stack, choose)
            given = {"x": x, "w": weight, "changes": stack.packed, "board": board_of(slots)}
            given["added"] = mx.zeros((1,), dtype) if added is None else added
            return self._call(way, epilogue, given, outputs, stack)["out"]

        return call

    def _call(
        self, way: Way, epilogue: str, given: dict[str, mx.array], outputs: int, stack: Stack | None = None
    ) -> dict[str, mx.array]:
        x, whole = given["x"], "board" in given
        rows, dtype, kernel = x.size // x.shape[-1], x.dtype, wide_changed_kernel if whole else wide_product_kernel
        tokens, count = tokens_for(rows), wide_product_kernel.blocks(outputs, way, epilogue)
        blocks, few = count * way.splits, in_a_room(tokens, epilogue)
        shapes = [(blocks, way.groups * 64, rows)] if way.splits > 1 and not few else []
        results: dict[str, np.ndarray[Any, Any]] = {"out": np.zeros((*x.shape[:-1], outputs), dtype=np.uint16)}
        if stack is not None:
            slots, ranks, _ = stack.down.shape
            inner = (way.pieces, rows, slots, ranks)
            first = way.groups * 64 + (wide_changed_kernel.SIDE // 2 if whole else 0)
            blocks += -(-slots * ranks // first) * way.pieces
            if whole:
                shapes.insert(0, inner)
            else:
                results["inner"] = np.full(inner, np.nan, dtype=np.float32)
        # What blocks leave for each other: numbers are there once a block has written them.
        left = np.full(sum(map(math.prod, shapes)), np.nan, dtype=np.float32)
        given["counters"], given["room"] = mx.zeros((count,), mx.int32), mx.array(left)
        given["told"] = cuda_kernels.exchange(count * (way.splits - 1) * way.groups * 64 * -(-rows // 8) * 8)
        if not few and left.size:
            results["left" if whole else "partial"] = left
        views = {name: on_host(given[name]) for name in kernel.inputs_of(way, tokens, epilogue, dtype)}
        threads = way.groups * 128 + (wide_changed_kernel.SIDE if whole else 0)
        launch(self._run(way, tokens, dtype, epilogue, whole), blocks, threads, [*views.values()], *results.values())
        for name, size in (("counters", count), ("board", 32)):
            assert name not in views or not views[name].flatten()[:size].any(), "the next launch finds zeros"
        assert "told" not in views or (views["told"].view(np.uint32) == 0xFFFFFFFF).all(), "and nothing told"
        found = {name: mx.array(result) for name, result in results.items()}
        return found | {"out": found["out"].view(dtype)}

    def _run(self, way: Way, tokens: int, dtype: mx.Dtype, epilogue: str, whole: bool) -> Run:
        key = (way, tokens, dtype, epilogue, whole)
        if key not in self._built:
            kind = "bfloat16" if dtype == mx.bfloat16 else "_Float16"
            kernel = wide_changed_kernel if whole else wide_product_kernel
            outputs = wide_changed_kernel.outputs_of(tokens, dtype, epilogue)
            if not whole:
                outputs = wide_product_kernel.outputs_of(way, tokens, dtype, epilogue)
            names = [*kernel.inputs_of(way, tokens, epilogue, dtype)]
            arguments = arguments_of(names, kind, dict.fromkeys([*outputs][1:], "float*"))
            header = TYPES + kernel.constants(way, tokens, dtype, epilogue) + DEVICE
            header += SWIGLU if epilogue == "swiglu" else ""
            self._built[key] = compiled(header, kernel.source(way, tokens, epilogue), arguments, "")
        return self._built[key]


def tokens_for(rows: int) -> int:
    """Which of TOKENS takes so many."""
    return next(most for most in TOKENS if rows <= most)
