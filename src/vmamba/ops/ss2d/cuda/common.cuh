// Shared by the forward and backward kernels of SS2D for one state per channel. The loader puts this text before
// theirs, and values.cuh before it.
//
// Compile-time parameters (set by the Python side):
//   RANK        R, the rank of the step size
//   BF16        1: 16-bit values are bfloat16, 0: float16
//   WEIGHT16    1: dt_weight has the 16-bit type, 0: float32
//   SPAN        T, positions a lane owns in one chunk (even); a warp's chunk is 4 T positions of 16 channels
// and, of the forward alone,
//   OUT         the type of the result: 0 float32, 1 bfloat16, 2 float16
//   WARPS       warps that share one route
//   EVEN_E      1: the number of channels is even, so two adjacent ones load as 32 bits

constexpr int T = SPAN;

constexpr int ROW = RANK + 2;                  // one route's share of a row of `projected`: rank, B, C
constexpr int PROJECTED = 4 * ROW;             // a whole row
constexpr int PAIRS = (ROW + 1) / 2;           // 32-bit loads that cover a route's share
constexpr int FRAGMENTS = (ROW + 7) / 8;       // k = 8 operands that cover it
constexpr int RANK_FRAGMENTS = (RANK + 7) / 8; // those of them that hold ranks

// softplus in base 2, log2(1 + 2^v); NaN and infinities pass as they should. EXACT avoids the hardware logarithm, whose
// absolute error of 2^-22 shows where the step is small: max(v, 0) + log2(1 + e), e = 2^-|v|, by a polynomial.
template <bool EXACT>
__device__ __forceinline__ float softplus2(float v) {
    if (!EXACT) {
        const float soft = lg2(1.f + ex2(v));
        return v > 28.f ? v : soft;
    }
    const float e = ex2(fminf(v, -v));
    float q = 0.007548820227384567f;  // log2(1 + e) / e on [0, 1], relative error 3e-8
    q = fmaf(q, e, -0.04256557673215866f);
    q = fmaf(q, e, 0.11285369843244553f);
    q = fmaf(q, e, -0.19711676239967346f);
    q = fmaf(q, e, 0.2756403088569641f);
    q = fmaf(q, e, -0.3584081828594208f);
    q = fmaf(q, e, 0.48069292306900024f);
    q = fmaf(q, e, -0.7213401794433594f);
    q = fmaf(q, e, 1.4426950216293335f);
    return fmaf(q, e, fmaxf(v, 0.f));
}

// ---- tensor cores --------------------------------------------------------------------------------------------------
// d[0], d[1] belong to row lane / 4 and d[2], d[3] to that row + 8; columns 2 (lane % 4) and the next one.

#if BF16
#define MMA_TYPES "f32.bf16.bf16.f32"
#else
#define MMA_TYPES "f32.f16.f16.f32"
#endif

// d = A b + c.
__device__ __forceinline__ void mma_k8(float (&d)[4], u32 a0, u32 a1, u32 b, float c0, float c1, float c2, float c3) {
    asm("mma.sync.aligned.m16n8k8.row.col." MMA_TYPES " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

__device__ __forceinline__ void mma_k16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float c0,
                                        float c1, float c2, float c3) {
    asm("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

// Row g of the product is channel 2 g, row g + 8 is channel 2 g + 1, so a lane owns two adjacent channels.
// The weights carry log2(e) and are split into TERMS 16-bit parts, which multiply the same 16-bit ranks exactly.
template <int TERMS>
struct StepWeights {
    u32 part[RANK_FRAGMENTS][TERMS][2];
    float bias[2];  // times log2(e)

    __device__ __forceinline__ static float read(const void* weight, u64 index) {
#if WEIGHT16
        return unpack_low(reinterpret_cast<const u16*>(weight)[index]);
#else
        return reinterpret_cast<const float*>(weight)[index];
#endif
    }

    // weight (4, E, RANK), bias (4, E); the two channels are valid ones.
    __device__ __forceinline__ void load(const void* weight, const float* dt_bias, int route, int E, int channel0,
                                         int channel1, int t) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const u64 line = u64(route) * E + (row ? channel1 : channel0);
            bias[row] = dt_bias[line] * LOG2E;
#pragma unroll
            for (int i = 0; i < RANK_FRAGMENTS; i++) {
                const int slot = 8 * i + 2 * t;
                float low = slot < RANK ? read(weight, line * RANK + slot) * LOG2E : 0.f;
                float high = slot + 1 < RANK ? read(weight, line * RANK + slot + 1) * LOG2E : 0.f;
#pragma unroll
                for (int term = 0; term < TERMS; term++) {
                    const u32 packed = pack(low, high);
                    part[i][term][row] = packed;
                    low -= unpack_low(packed);
                    high -= unpack_high(packed);
                }
            }
        }
    }

    // d = log2(e) (W r + bias) for 16 channels x 8 positions; raw: the k = 8 operands of those positions.
    __device__ __forceinline__ void apply(float (&d)[4], const u32 (&raw)[FRAGMENTS]) const {
        float first[4] = {bias[0], bias[0], bias[1], bias[1]};
        if (TERMS == 3) {  // the smallest part goes first: tensor cores truncate where they add
#pragma unroll
            for (int i = 0; i < RANK_FRAGMENTS; i++) {
                mma_k8(first, part[i][TERMS - 1][0], part[i][TERMS - 1][1], raw[i], i ? first[0] : 0.f,
                       i ? first[1] : 0.f, i ? first[2] : 0.f, i ? first[3] : 0.f);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) first[i] += bias[i / 2];
        }
#pragma unroll
        for (int i = 0; i < RANK_FRAGMENTS; i++) {
            mma_k16(d, part[i][0][0], part[i][0][1], part[i][1][0], part[i][1][1], raw[i], raw[i], i ? d[0] : first[0],
                    i ? d[1] : first[1], i ? d[2] : first[2], i ? d[3] : first[3]);
        }
    }
};

// A product with unit vectors hands every lane B (d[0], d[1]) and C (d[2], d[3]) of the positions it owns, as float32.
struct InputOutputSelector {
    u32 b, c;

    __device__ __forceinline__ explicit InputOutputSelector(int t) {
        constexpr int SLOT = RANK % 8;
        b = pack(2 * t == SLOT ? 1.f : 0.f, 2 * t + 1 == SLOT ? 1.f : 0.f);
        constexpr int NEXT = (RANK + 1) % 8;
        c = pack(2 * t == NEXT ? 1.f : 0.f, 2 * t + 1 == NEXT ? 1.f : 0.f);
    }

    __device__ __forceinline__ void apply(float (&d)[4], const u32 (&raw)[FRAGMENTS]) const {
        constexpr int I = RANK / 8;
        if (RANK % 8 == 7) {
            mma_k16(d, b, 0u, 0u, c, raw[I], raw[FRAGMENTS - 1], 0.f, 0.f, 0.f, 0.f);
        } else {
            mma_k8(d, b, c, raw[I], 0.f, 0.f, 0.f, 0.f);
        }
    }
};

// ---- the order of a route -------------------------------------------------------------------------------------------

struct Fold {  // n = quotient * divisor + remainder without a division
    u32 divisor, magic;

    __device__ __forceinline__ explicit Fold(u32 d) : divisor(d), magic(0xffffffffu / d) {}
    __device__ __forceinline__ Fold(u32 d, u32 magic) : divisor(d), magic(magic) {}
    __device__ __forceinline__ void split(u32 n, u32& quotient, u32& remainder) const {
        quotient = __umulhi(n, magic);
        remainder = n - quotient * divisor;
        if (remainder >= divisor) {
            quotient++;
            remainder -= divisor;
        }
    }
};

// ---- shared memory by 32-bit address: what is computed once stays computed ------------------------------------------

__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 r;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(address));
    return r;
}

__device__ __forceinline__ u32 load_shared_16(u32 address) {
    u16 r;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(r) : "r"(address));
    return r;
}

__device__ __forceinline__ uint2 load_shared_pair(u32 address) {
    uint2 r;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(address));
    return r;
}

__device__ __forceinline__ float2 load_shared_float2(u32 address) {
    float2 r;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(address));
    return r;
}

__device__ __forceinline__ void store_shared(u32 address, u32 v) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, uint2 v) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

// ---- mbarriers: signals between warps of a block that do not stop the one who gives them ----------------------------

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// One arrival on behalf of the warp, after everything its lanes wrote.
__device__ __forceinline__ void barrier_arrive(u64* barrier, int lane) {
    __syncwarp();
    if (lane == 0) {
        asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(barrier))
                     : "memory");
    }
}

__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    u32 done;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile(
            "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
#else
        asm volatile(
            "{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
#endif
    } while (!done);
}

// Counters for signals that are rarely waited for.

__device__ __forceinline__ void count_up(u32* counter, int lane) {
    __syncwarp();
    if (lane == 0) {
        asm volatile("red.release.cta.shared.add.u32 [%0], 1;" ::"r"(shared_address(counter)) : "memory");
    }
}

__device__ __forceinline__ void count_set(u32* counter, u32 to, int lane) {
    __syncwarp();
    if (lane == 0) {
        asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(shared_address(counter)), "r"(to) : "memory");
    }
}

__device__ __forceinline__ void count_wait(u32* counter, u32 least) {
    u32 seen;
    do {
        asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(seen) : "r"(shared_address(counter)) : "memory");
    } while (seen < least);
}
