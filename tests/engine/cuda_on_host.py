"""Kernels of `mx.fast.cuda_kernel` compiled for the host, where there is a C++ compiler: one block at a time, whose
threads take turns. What only a GPU does (scheduling, caches) is not shown by it; what is computed is."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

_PRELUDE = """
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#include <functional>
#include <deque>
#include <ucontext.h>
#include <utility>
using std::max;
using std::min;
#define __device__
#define __shared__ static
struct Index { int x; };
static Index threadIdx, blockIdx;

// A block's threads take turns: one runs until it has to wait for others. Only its first turn, of all blocks, is begun
// by way of a context, which costs calls of the system; after that it jumps.
struct Gate { int running = 0, waiting = 0; unsigned opened = 0; };
constexpr int STACK = 1 << 17;
struct Turn {
    ucontext_t context;
    jmp_buf left;
    char* stack = nullptr;
    bool ended;
    const Gate* before;
    unsigned opened;
    unsigned exchanges;
    bool waits() const { return before && before->opened == opened; }
};
static Turn turns[1024];
static Turn* turn;
static jmp_buf between;
static Gate everybody, warps[32], barriers[16];
static const void* launched;
static void (*body)(const void*);
static void give_way() {
    if (!_setjmp(turn->left)) _longjmp(between, 1);
}
static void open(Gate& gate) { gate.waiting = 0; ++gate.opened; }
static void wait_at(Gate& gate) {
    turn->before = &gate;
    turn->opened = gate.opened;
    if (++gate.waiting == gate.running) open(gate);
    else give_way();
}
static void leave(Gate& gate) {
    if (--gate.running > 0 && gate.waiting == gate.running) open(gate);
}
static void block_after_block() {
    for (;;) {
        body(launched);
        turn->ended = true;
        leave(everybody);
        leave(warps[threadIdx.x / 32]);
        give_way();
    }
}
static void take_turn() {
    if (_setjmp(between)) return;
    if (turn->stack) _longjmp(turn->left, 1);
    turn->stack = static_cast<char*>(std::malloc(STACK));
    getcontext(&turn->context);
    turn->context.uc_stack.ss_sp = turn->stack;
    turn->context.uc_stack.ss_size = STACK;
    turn->context.uc_link = nullptr;
    makecontext(&turn->context, block_after_block, 0);
    setcontext(&turn->context);
}
static void run_block(int threads) {
    everybody = {threads};
    for (Gate& warp : warps) warp = {};
    for (Gate& barrier : barriers) barrier = {};
    for (int i = 0; i < threads; ++i) {
        turns[i].ended = false;
        turns[i].before = nullptr;
        turns[i].exchanges = 0;
        ++warps[i / 32].running;
    }
    while (everybody.running > 0) {
        for (int i = 0; i < threads; ++i) {
            if (turns[i].ended || turns[i].waits()) continue;
            threadIdx.x = i;
            turn = &turns[i];
            take_turn();
        }
    }
}
template <typename Body> void launch(int blocks, int threads, const Body& one) {
    launched = &one;
    body = [](const void* it) { (*static_cast<const Body*>(it))(); };
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(threads);
}

static uint64_t passed[2][1024];
static void __syncthreads() { wait_at(everybody); }
// Of the barriers by number, at which so many threads meet, or say that they have come.
static void meet(int which, int count) {
    barriers[which].running = count;
    wait_at(barriers[which]);
}
static void arrive(int which, int count) {
    barriers[which].running = count;
    if (++barriers[which].waiting == count) open(barriers[which]);
}
static void __syncwarp() { wait_at(warps[threadIdx.x / 32]); }
// What `read` makes of the values of the warp's lanes. The next exchange has other places, and the one after it comes
// when all have read.
template <typename V, typename Read> auto exchanged(V value, Read read) {
    uint64_t* const places = passed[turn->exchanges++ % 2];
    std::memcpy(&places[threadIdx.x], &value, sizeof value);
    wait_at(warps[threadIdx.x / 32]);
    return read([=](int lane) {
        V other;
        std::memcpy(&other, &places[(threadIdx.x & ~31) + lane], sizeof other);
        return other;
    });
}
template <typename V> V __shfl_sync(unsigned, V value, int lane) {
    return exchanged(value, [=](auto of) { return of(lane); });
}
template <typename V> V __shfl_xor_sync(unsigned mask, V value, int width) {
    return __shfl_sync(mask, value, (threadIdx.x & 31) ^ width);
}
template <typename V> V __shfl_up_sync(unsigned mask, V value, int width) {
    const int lane = threadIdx.x & 31;
    return __shfl_sync(mask, value, lane < width ? lane : lane - width);
}
static unsigned __ballot_sync(unsigned, bool value) {
    return exchanged(value, [](auto of) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane) votes |= unsigned(of(lane)) << lane;
        return votes;
    });
}
static int __ffs(int bits) { return __builtin_ffs(bits); }
static int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
static bool __any_sync(unsigned all, bool one) {
    uint32_t any = one;
    for (int width = 1; width < 32; width *= 2) any |= __shfl_xor_sync(all, any, width);
    return any;
}
template <typename V> V atomicAdd(V* at, V value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
static unsigned atomicInc(unsigned* at, unsigned most) { return std::exchange(*at, *at >= most ? 0 : *at + 1); }
template <typename V> V __ldcg(const V* at) { return *at; }
template <typename V> V atomicMax(V* at, V value) { return std::exchange(*at, max(*at, value)); }
static void __threadfence() {}
static unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
#define __expf expf
#define __logf logf
static uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t chosen = 0;
    for (int i = 0; i < 4; ++i) chosen |= uint32_t(both >> ((which >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
    return chosen;
}
struct float2 { float x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct bfloat16 {
    uint16_t bits;
    bfloat16() = default;
    explicit bfloat16(float x) {
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
    }
    operator float() const { uint32_t wide = uint32_t(bits) << 16; float x; std::memcpy(&x, &wide, 4); return x; }
};
"""

Run = Callable[..., None]

Array = np.ndarray[Any, Any]


def described(arrays: Mapping[str, Array], kinds: Mapping[str, str]) -> tuple[dict[str, str], list[Array]]:
    """A kernel's parameters for arrays of such C types, and what is passed: each with its shape, and its strides in
    elements."""
    arguments: dict[str, str] = {}
    passed: list[Array] = []
    for name, array in arrays.items():
        arguments |= {name: f"const {kinds[name]}*", f"{name}_shape": "const int*"}
        arguments[f"{name}_strides"] = "const int64_t*"
        strides = np.array(array.strides, dtype=np.int64) // array.itemsize
        passed += [array, np.array(array.shape, dtype=np.int32), strides]
    return arguments, passed


def compiled(header: str, source: str, arguments: Mapping[str, str], constants: str) -> Run:
    """`run(blocks, threads, *arguments)`: the kernel over so many blocks.

    `arguments` are names and C types of the kernel's parameters. Skips the test without a compiler.
    """
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    declared = ", ".join(f"{kind} {name}" for name, kind in arguments.items())
    passed = ", ".join(arguments)
    code = f"""{_PRELUDE}
{header}
static void kernel({declared}) {{
{constants}
{source}
}}
extern "C" void run(int blocks, int threads, {declared}) {{
    launch(blocks, threads, [&] {{ kernel({passed}); }});
}}
"""
    return _built(code)


@cache
def _built(code: str) -> Run:
    """Kept: compiling takes most of the time of tests that run kernels, and many run the same."""
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_text(code)
        # A jump from one thread's stack to another's is what some distributions' _FORTIFY_SOURCE takes for a fault.
        command = ["g++", "-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC", "-o", str(library)]
        subprocess.run([*command, str(source)], check=True, timeout=60)
        run: Run = ctypes.CDLL(str(library)).run
    return run
