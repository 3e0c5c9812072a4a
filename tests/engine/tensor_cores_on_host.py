"""What only a GPU can do, on the host: its tensor cores' products, and copies, after NVIDIA's description of them."""

from __future__ import annotations

from typing import Final

TYPES: Final = """
using __nv_bfloat16 = bfloat16;
using __half = _Float16;
static bfloat16 hexp(bfloat16 x) { return bfloat16(std::exp(float(x))); }
static _Float16 hexp(_Float16 x) { return _Float16(std::exp(float(x))); }
"""
"""The types' names and what there is of each; what says which one T is comes next."""

MULTIPLY: Final = """
struct Operands { uint32_t a[4], b[2]; };
static Operands operands[1024];
static void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    operands[threadIdx.x] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    __syncwarp();
    const int lane = threadIdx.x % 32;
    const Operands* warp = operands + (threadIdx.x - lane);
    for (int i = 0; i < 4; ++i) {
        const int line = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const Operands& left = warp[line % 8 * 4 + k % 8 / 2];
            const Operands& right = warp[column * 4 + k % 8 / 2];
            sum[i] += value(left.a[line / 8 + k / 8 * 2], k % 2) * value(right.b[k / 8], k % 2);
        }
    }
    __syncwarp();
}
"""
"""mma.m16n8k16 of a warp; `value` is one of the two in a word."""

DEVICE: Final = """
static uint4 ring[14 * 1024];
static uint4 load(const void* from, bool there) {
    uint4 v = {0, 0, 0, 0};
    if (there) v = *static_cast<const uint4*>(from);
    return v;
}
static void copy(uint4* to, const void* from, bool there) { *to = load(from, there); }
static int acquire(const int* from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
static void prefetch(const void*) {}
static void close_group() {}
template <int> static void wait_for_groups() {}

static float value(uint32_t word, int which) {
    const uint16_t bits = uint16_t(word >> (16 * which));
    T x;
    std::memcpy(&x, &bits, 2);
    return float(x);
}
MULTIPLY
static void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    multiply(sum, {a0, a1, a2, a3}, b0, b1);
}

static const T* pointed[1024];
template <bool COLUMNS> void matrices(uint32_t (&to)[4], const T* line) {
    pointed[threadIdx.x] = line;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; ++m) {
        const T* const* const lines = pointed + (threadIdx.x - lane) + m * 8;
        for (int i = 0; i < 2; ++i) {
            const int across = lane % 4 * 2 + i;
            const T* const from = COLUMNS ? lines[across] + lane / 4 : lines[lane / 4] + across;
            std::memcpy(reinterpret_cast<T*>(&to[m]) + i, from, 2);
        }
    }
    __syncthreads();
}
static uint32_t halves[1024];
static uint32_t transposed(uint32_t two) {
    halves[threadIdx.x] = two;
    __syncwarp();
    const int lane = threadIdx.x % 32, line = lane / 4;
    uint32_t result = 0;
    for (int i = 0; i < 2; ++i) {
        const uint32_t its = halves[threadIdx.x - lane + (lane % 4 * 2 + i) * 4 + line / 2];
        result |= (its >> (line % 2 * 16) & 0xffff) << (16 * i);
    }
    __syncwarp();
    return result;
}
static uint32_t pair(float first, float second) {
    const T both[2] = {T(first), T(second)};
    uint32_t word;
    std::memcpy(&word, both, 4);
    return word;
}
static float power_of_two(float x) { return std::exp2(x); }
""".replace("MULTIPLY\n", MULTIPLY.lstrip())
"""What `product_source`, `prompt_source` and `decode_source` name."""
