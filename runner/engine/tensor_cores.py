"""What only a GPU can do, in CUDA: copies that nobody waits for, and products of tensor cores.

Kernels of products and of attention have it before their own; tests on the host have their own in its place. KIND is
the type of 16 bits that is multiplied, a string.
"""

from __future__ import annotations

from typing import Final

DEVICE: Final = """
extern __shared__ uint4 ring[];

// Starts a copy of 16 bytes into shared memory, or of zeros.
__device__ inline void copy(uint4* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies but those of the latest groups.
template <int LATEST> __device__ inline void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LATEST) : "memory");
}

__device__ inline uint4 load(const void* from, bool there) {
    uint4 v;
    asm("{ .reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; "
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(from), "r"(int(there)));
    return v;
}

// sum += a · b, of a warp: a's lines g and g + 8 at two places, b's column g (PTX ISA, mma.m16n8k16).
__device__ inline void multiply(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""
