"""The source of `wide_product_kernel`, in CUDA, for Hopper's tensor cores (PTX ISA, wgmma).

A block computes LINES = 64 · GROUPS lines of the weight (half of them a gate's, half its input's, where PARTS is 2) for
all tokens, of which there are up to TOKENS. Both come into shared memory 64 inputs at a time, STAGES of such chunks one
behind the other, and the tensor cores read them there: a group of four warps has 64 lines, 16 a warp, as their 64 × 16
operand, the tokens are their 16 × TOKENS one. What tokens that are not there give is never looked at, so they are not
copied either.

A line's 64 values of a chunk are 128 bytes, in which vector v of 16 bytes lies at place v ^ (line % 8): eight lines'
vectors v are in different banks so, and this is what the tensor cores know as swizzling by 128 bytes. It is by the
address, so a chunk's lines begin at a multiple of 1,024.

Where a weight has few lines, SPLITS blocks share K (`split_k_source.py`). So the order of a sum depends on K and SPLITS
only, and a row's result is the same bits whatever rows are beside it.

CHANGES makes another kernel of it, which also multiplies the tokens with `down` of all slots of a stack
(`adapters/stack.py`): blocks behind the weight's have its lines as theirs, and as many blocks as there are PIECES share
K. Each leaves its sums as they are in `inner` [PIECES, tokens, slots, ranks] (`adapters/expand.py` goes on from there),
so none waits for another.

T, KIND, GROUPS, STAGES, SPLITS, TOKENS, PARTS and PIECES are constants. DEVICE is what only a GPU can do, beside that
of `tensor_cores`; tests on the host have their own in its place.
"""

from __future__ import annotations

from typing import Final

DEVICE: Final = """
// Where the tensor cores' tiles may begin.
__device__ inline uint4* aligned() {
    return ring + (1024 - unsigned(__cvta_generic_to_shared(ring)) % 1024) % 1024 / 16;
}
// What this thread has copied is seen by the tensor cores, once it and they have met at a barrier.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LATEST> __device__ inline void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LATEST) : "memory");
}
// A tile's descriptor: eight lines are 1,024 bytes, swizzled by 128.
__device__ inline unsigned long long described(const uint4* tile) {
    return (unsigned(__cvta_generic_to_shared(tile)) & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// sum += lines · tokens, over 16 inputs, of four warps. A thread has lines lane / 4 and lane / 4 + 8 of its warp's, and
// of each eight tokens two, from lane % 4 * 2 on.
__device__ inline void multiply_tile(float (&sum)[TOKENS / 2], const uint4* lines, const uint4* tokens) {
    WGMMA
}
// Numbers that one block tells another, at places of their own.
__device__ inline void put(float4* at, float4 four) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(at), "f"(four.x), "f"(four.y), "f"(four.z), "f"(four.w) : "memory");
}
__device__ inline float4 look(const float4* at) {
    float4 four;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w) : "l"(at) : "memory");
    return four;
}
"""


def device(tokens: int, operand: str) -> str:
    """DEVICE for so many tokens, of a type that the tensor cores call `operand`."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sum[{i}])' for i in range(count))
    shape = f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{operand}.{operand}"
    product = (
        f'asm volatile("{{ .reg .pred all; setp.ne.b32 all, %{count + 2}, 0; '
        f'{shape} {{{sums}}}, %{count}, %{count + 1}, all, 1, 1, 0, 0; }}"\n'
        f': {outputs} : "l"(described(lines)), "l"(described(tokens)), "r"(1));'
    )
    return DEVICE.replace("WGMMA", product)


LOOP: Final = """
    // A thread copies one vector of every STEP-th line.
    const int line = threadIdx.x / 8, vector = threadIdx.x % 8;
    uint4* const to = tiles + line * 8 + (vector ^ line % 8);
    const T* const weights = LINES_OF + size_t(first + line) * K + vector * 8;
    const T* const tokens = x + size_t(line) * K + vector * 8;
    auto fetch = [&](int chunk) {
        if (chunk < end) {
            uint4* const into = to + (chunk - begin) % STAGES * STAGE;
            #pragma unroll
            for (int i = 0; i < LINES; i += STEP) {
                THERE copy(into + i * 8, weights + (size_t(i / OUT) * APART + i % OUT) * K + chunk * 64, true);
            }
            #pragma unroll
            for (int i = 0; i < TOKENS; i += STEP) {
                if (line + i < rows) copy(into + (LINES + i) * 8, tokens + size_t(i) * K + chunk * 64, true);
            }
        }
        close_group();
    };

    float sum[TOKENS / 2];
    #pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sum[i] = 0.0f;
    // Code that runs once has to come from memory as well.
    #pragma unroll 1
    for (int i = 0; i < STAGES - 2; ++i) fetch(begin + i);
    #pragma unroll 1
    for (int chunk = begin; chunk < end; ++chunk) {
        wait_for_groups<STAGES - 3>();
        publish();
        __syncthreads();
        const uint4* const tile = tiles + (chunk - begin) % STAGES * STAGE;
        open_products();
        #pragma unroll
        for (int k = 0; k < 4; ++k) multiply_tile(sum, tile + warp / 4 * 512 + k * 2, tile + LINES * 8 + k * 2);
        close_products();
        // It takes the place of the chunk before the last, which nobody reads any more: all have waited for it.
        fetch(chunk + STAGES - 2);
        wait_for_products<1>();
    }
    wait_for_products<0>();
"""
"""How a block's products of its lines come to be in `sum`."""

KEEP: Final = """
    // The sums go where chunks were.
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) {
        sums[(i / 4 * 8 + lane % 4 * 2 + i % 2) * PITCH + warp * 16 + lane / 4 + i / 2 % 2 * 8] = sum[i];
    }
    __syncthreads();
"""

BODY: Final = (
    """
    constexpr int THREADS = GROUPS * 128, LINES = GROUPS * 64, OUT = LINES / PARTS, STEP = THREADS / 8;
    constexpr int STAGE = (LINES + TOKENS) * 8, PITCH = LINES + 4;
    const int K = w_shape[1], N = w_shape[0] / PARTS, chunks = K / 64;
    int rows = 1;
    #pragma unroll 1
    for (int i = 0; i + 1 < x_ndim; ++i) rows *= x_shape[i];
    SHARE
    const int begin = chunks * split / shares, end = chunks * (split + 1) / shares;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint4* const tiles = aligned();
    float* const sums = reinterpret_cast<float*>(tiles);
    PREPARE
    OTHERS
"""
    + LOOP
    + """
    TELL
    BEGIN
"""
    + KEEP
    + """
    LEAVE
    MEET
    FINISH
"""
)

FINISH: Final = """
    // What several vectors of outputs are made of is on its way at once, where it is not in shared memory.
    constexpr int AT_ONCE = PARTS > 1 && PARTIALS == 1 ? 1 : 4;
    const int vectors = rows * (OUT / 8);
    #pragma unroll 1
    for (int from = threadIdx.x; from < vectors; from += THREADS * AT_ONCE) {
        float total[AT_ONCE][PARTS][8];
        size_t place[AT_ONCE];
        BEFORE
        #pragma unroll
        for (int e = 0; e < AT_ONCE; ++e) {
            const int at = min(from + e * THREADS, vectors - 1), r = at / (OUT / 8), n = at % (OUT / 8) * 8;
            place[e] = size_t(r) * N + first + n;
            LOOK
            #pragma unroll
            for (int i = 0; i < PARTS * 8; i += 4) {
                const int column = i / 8 * OUT + n + i % 8;
                float* const four = &total[e][i / 8][i % 8];
                four[0] = four[1] = four[2] = four[3] = 0.0f;
                #pragma unroll
                for (int s = 0; s < PARTIALS; ++s) {
                    const float4 more = FOUR;
                    four[0] += more.x, four[1] += more.y, four[2] += more.z, four[3] += more.w;
                }
            }
        }
        #pragma unroll
        for (int e = 0; e < AT_ONCE; ++e) {
            if (from + e * THREADS >= vectors) break;
            uint4 result;
            T* const written = reinterpret_cast<T*>(&result);
            #pragma unroll
            for (int i = 0; i < 8; ++i) STORE
            *reinterpret_cast<uint4*>(out + place[e]) = result;
        }
    }
"""
"""What becomes of a block's sums, where a row has no change."""

NOTHING_CHANGED: Final = {"APART": "N", "OTHERS": "", "BEGIN": "", "FINISH": FINISH}
"""What stands at these places of BODY where `wide_changed_source` has nothing."""

PLAIN: Final = {
    "SHARE": """
    constexpr int shares = SPLITS;
    const int block = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS, first = block * OUT;
""",
    "LINES_OF": "w",
    "THERE": "",
    "LEAVE": "",
    **NOTHING_CHANGED,
}
"""What stands at these places of BODY where the weight's lines are all."""

LEAVE: Final = """
        float* const to = inner + size_t(split) * rows * ranks + first;
        for (int at = threadIdx.x; at < rows * (LINES / 4); at += THREADS) {
            const int r = at / (LINES / 4), n = at % (LINES / 4) * 4;
            if (n >= there) continue;
            *reinterpret_cast<float4*>(to + size_t(r) * ranks + n) =
                *reinterpret_cast<const float4*>(sums + r * PITCH + n);
        }
"""
"""How a block leaves its sums of lines of `down`."""

CHANGES: Final = {
    "SHARE": """
    const int S = changes_shape[0], ranks = S * ((changes_shape[1] - 64) / (K + N));
    const int beyond = blockIdx.x - N / LINES * SPLITS;
    const int shares = beyond < 0 ? SPLITS : PIECES, at = beyond < 0 ? blockIdx.x : beyond;
    const int block = at / shares, split = at % shares, first = block * LINES;
    const int there = beyond < 0 ? LINES : min(ranks - first, LINES);
""",
    "LINES_OF": "(beyond < 0 ? w : changes + size_t(S) * 64)",
    "THERE": "if (line + i < there)",
    "LEAVE": """
    if (beyond >= 0) {
"""
    + LEAVE
    + """
        return;
    }
""",
    **NOTHING_CHANGED,
}
"""The same where those of `down` come behind them; their number is a multiple of four."""

EPILOGUES: Final = {
    "plain": {
        "BEFORE": "uint4 before[AT_ONCE];",
        "LOOK": "if (added_ndim > 1) before[e] = *reinterpret_cast<const uint4*>(added + place[e]);",
        "STORE": """{
                const T product = T(total[e][0][i]);
                const T residual = reinterpret_cast<const T*>(&before[e])[i];
                written[i] = added_ndim > 1 ? T(float(residual) + float(product)) : product;
            }""",
    },
    "swiglu": {
        "BEFORE": "",
        "LOOK": "",
        "STORE": "written[i] = swiglu(T(total[e][0][i]), T(total[e][1][i]));",
    },
    "changes": {"BEFORE": "", "LOOK": "", "STORE": "written[i] = T(total[e][0][i]);"},
}
"""What becomes of the sums."""
