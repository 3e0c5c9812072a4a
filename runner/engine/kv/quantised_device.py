"""What `quantised_source` calls: what only a GPU can do (tests on the host have their own in its place), and how codes
become halves."""

from __future__ import annotations

from typing import Final

DEVICE: Final = """
extern __shared__ uint4 memory[];

// Starts a copy of 16 bytes into shared memory.
__device__ inline void copy(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
                 :: "r"(unsigned(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies but those of the latest groups.
template <int LATEST> __device__ inline void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LATEST) : "memory");
}
// COUNT matrices, 4 or 2, of 8 lines of 16 bytes: lane i points at line i % 8 of matrix i / 8. A thread gets word
// lane % 4 of line lane / 4 of each; with COLUMNS, 16 bits at lane / 4 of lines lane % 4 * 2 and the next.
template <bool COLUMNS, int COUNT> __device__ inline void matrices(uint32_t (&to)[COUNT], const void* line) {
    const unsigned from = unsigned(__cvta_generic_to_shared(line));
    if constexpr (COUNT == 4 && COLUMNS) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
    } else if constexpr (COUNT == 4) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
    } else if constexpr (COLUMNS) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
    }
}
// An 8 × 8 matrix of 16 bits, of which a thread has the two values at lane % 4 * 2 of line lane / 4, transposed.
__device__ inline uint32_t transposed(uint32_t two) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(two));
    return result;
}
// sum += a · b, of a warp: a's lines g and g + 8 at two places, b's column g (PTX ISA, mma.m16n8k16).
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Of two halves each: x · y + z.
__device__ inline uint32_t multiply_add(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
    return sum;
}
__device__ inline uint32_t halves_of(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ inline float low_of(uint32_t halves) { return __half2float(__ushort_as_half(halves & 0xffff)); }
__device__ inline float high_of(uint32_t halves) { return __half2float(__ushort_as_half(halves >> 16)); }
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float logarithm(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
"""

HEADER: Final = """
template <typename A> __device__ inline A* writable(const A* held) { return const_cast<A*>(held); }
template <typename A> __device__ inline A of_all_four(A (*better)(A, A), A x) {
    x = better(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return better(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
template <typename A> __device__ inline A of_all_eight(A (*better)(A, A), A x) {
    x = better(x, __shfl_xor_sync(0xffffffffu, x, 4));
    x = better(x, __shfl_xor_sync(0xffffffffu, x, 8));
    return better(x, __shfl_xor_sync(0xffffffffu, x, 16));
}
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline float plus(float a, float b) { return a + b; }
template <int COUNT> __device__ inline void words(const void* from, uint32_t (&to)[COUNT]) {
    if constexpr (COUNT % 4 == 0) {
        #pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const uint4 four = static_cast<const uint4*>(from)[i / 4];
            to[i] = four.x; to[i + 1] = four.y; to[i + 2] = four.z; to[i + 3] = four.w;
        }
    } else if constexpr (COUNT == 2) {
        const uint2 two = *static_cast<const uint2*>(from);
        to[0] = two.x; to[1] = two.y;
    } else {
        #pragma unroll
        for (int i = 0; i < COUNT; ++i) to[i] = static_cast<const uint32_t*>(from)[i];
    }
}
// Of each half of a word, code `i`, as 1024 + w, or where it is the upper one of a byte's two as 1024 + 16 w.
template <int BITS> __device__ inline uint32_t codes_of(uint32_t word, int i) {
    if (BITS == 8) return __byte_perm(word, 0x64646464u, i ? 0x4341 : 0x4240);
    return ((word >> (i / 2 * 8)) & (i % 2 ? 0x00f000f0u : 0x000f000fu)) | 0x64006400u;
}
// The same as w less the middle of all codes.
template <int BITS> __device__ inline uint32_t centred_of(uint32_t word, int i) {
    constexpr uint32_t ONE = 0x3c003c00u, SIXTEENTH = 0x2c002c00u;
    const uint32_t least = BITS == 8 ? 0xe480e480u : i % 2 ? 0xd480d480u : 0xe408e408u;  // -1152, -72, -1032
    return multiply_add(codes_of<BITS>(word, i), BITS == 4 && i % 2 ? SIXTEENTH : ONE, least);
}
"""
