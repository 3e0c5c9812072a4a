"""Kernels of `mx.fast.cuda_kernel` compiled for the host, where there is a C++ compiler: one block at a time, with one
thread or several. What only a GPU does (scheduling, caches) is not shown by it; what is computed is."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

_PRELUDE = """
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <vector>
using std::max;
using std::min;
#define __device__
#define __shared__ static
static std::barrier<>* everybody;
static std::barrier<>* warps[32];
static uint32_t passed[1024];
struct Index { int x; };
static thread_local Index threadIdx;
static Index blockIdx;
static void __syncthreads() { everybody->arrive_and_wait(); }
static void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
template <typename V> V __shfl_xor_sync(unsigned, V value, int width) {
    std::memcpy(&passed[threadIdx.x], &value, 4);
    __syncwarp();
    V other;
    std::memcpy(&other, &passed[threadIdx.x ^ width], 4);
    __syncwarp();
    return other;
}
static bool __any_sync(unsigned all, bool one) {
    uint32_t any = one;
    for (int width = 1; width < 32; width *= 2) any |= __shfl_xor_sync(all, any, width);
    return any;
}
template <typename V> V atomicAdd(V* at, V value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
template <typename V> V __ldcg(const V* at) { return *at; }
static void __threadfence() {}
static unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
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


def compiled(folder: Path, header: str, source: str, arguments: Mapping[str, str], constants: str) -> Run:
    """`run(blocks, threads, *arguments)`: the kernel over so many blocks.

    `arguments` are names and C types of the kernel's parameters. Skips the test without a compiler.
    """
    compiler = shutil.which("g++")
    if compiler is None:
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
    std::barrier<> barrier(threads);
    everybody = &barrier;
    std::vector<std::unique_ptr<std::barrier<>>> of_warps;
    for (int first = 0; first < threads; first += 32) {{
        of_warps.push_back(std::make_unique<std::barrier<>>(std::min(32, threads - first)));
        warps[first / 32] = of_warps.back().get();
    }}
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {{
        std::vector<std::thread> running;
        for (int i = 0; i < threads; ++i) running.emplace_back([&, i] {{ threadIdx.x = i; kernel({passed}); }});
        for (auto& one : running) one.join();
    }}
}}
"""
    (folder / "kernel.cpp").write_text(code)
    library = folder / "kernel.so"
    command = [compiler, "-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(folder / "kernel.cpp")], check=True, timeout=60)
    run: Run = ctypes.CDLL(str(library)).run
    return run
