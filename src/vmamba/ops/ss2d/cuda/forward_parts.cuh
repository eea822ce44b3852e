// What the forward kernels share: operands and their products, the recurrence over a lane's positions, the result.

typedef long long s64;

constexpr bool EXACT = OUT == 0;
constexpr int TERMS = (BF16 && EXACT) ? 3 : 2;
constexpr int PRODUCTS = (T + 1) / 2;  // of 8 positions each, in a chunk
constexpr int SLOT_BYTES = 64;         // 16 float32 sums of a position

// base + count * bytes, in one instruction.
__device__ __forceinline__ u64 step_on(u64 base, int count, int bytes) {
    s64 offset;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(offset) : "r"(bytes), "r"(count));
    return base + u64(offset);
}

struct Output {
    u64 y;           // address, at this image and lane's channels
    u32 y_stride;    // bytes a position
    float skip[2];   // D summed over the routes
    bool valid[2];   // whether the lane's channels exist

    __device__ __forceinline__ void set_skip(const float* D, int E, int channel0, int channel1) {
        skip[0] = skip[1] = 0.f;
        for (int k = 0; k < 4; k++) {
            skip[0] += D[k * E + channel0];
            skip[1] += D[k * E + channel1];
        }
    }

    __device__ __forceinline__ void write_at(u64 p, float v0, float v1) const {
        if (OUT == 0) {
            if (EVEN_E) {
                if (valid[0]) asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(v0), "f"(v1) : "memory");
            } else {
                if (valid[0]) asm volatile("st.global.f32 [%0], %1;" ::"l"(p), "f"(v0) : "memory");
                if (valid[1]) asm volatile("st.global.f32 [%0], %1;" ::"l"(p + 4), "f"(v1) : "memory");
            }
        } else {
            const u32 both = pack_as<OUT == 1>(v0, v1);
            if (EVEN_E) {
                if (valid[0]) asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(both) : "memory");
            } else {
                if (valid[0]) asm volatile("st.global.b16 [%0], %1;" ::"l"(p), "h"(u16(both)) : "memory");
                if (valid[1]) asm volatile("st.global.b16 [%0], %1;" ::"l"(p + 2), "h"(u16(both >> 16)) : "memory");
            }
        }
    }

    __device__ __forceinline__ void write(u32 position, float v0, float v1) const {
        write_at(at(y, position, y_stride), v0, v1);
    }
};

// Step weights times log2(e), in TERMS 16-bit parts for each operand, and the bias as the accumulators of a product.
// That these are equal in pairs is hidden behind a product, or the assembler would make four of two for each product.
struct Step {
    u32 part[RANK_FRAGMENTS][TERMS][2];
    float accumulator[4];

    __device__ __forceinline__ void load(const void* weight, const float* dt_bias, int route, int E, int channel0,
                                         int channel1, int t) {
        float bias[2];
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const u64 line = u64(route) * E + (row ? channel1 : channel0);
            bias[row] = dt_bias[line] * LOG2E;
#pragma unroll
            for (int i = 0; i < RANK_FRAGMENTS; i++) {
                const int slot = 8 * i + 2 * t;
                auto value = [&](int at) {
                    return at < RANK ? StepWeights<TERMS>::read(weight, line * RANK + at) * LOG2E : 0.f;
                };
                float low = value(slot), high = value(slot + 1);
#pragma unroll
                for (int term = 0; term < TERMS; term++) {
                    const u32 packed = pack(low, high);
                    part[i][term][row] = packed;
                    low -= unpack_low(packed);
                    high -= unpack_high(packed);
                }
            }
        }
        mma_k8(accumulator, 0u, 0u, 0u, bias[0], bias[0], bias[1], bias[1]);
    }

    // d = log2(e) (W r + bias) for 16 channels x 8 positions. Tensor cores truncate where they add: for a float32 result
    // the smallest parts go first and the bias is added last.
    __device__ __forceinline__ void apply(float (&d)[4], const u32 (&raw)[FRAGMENTS]) const {
        if (EXACT) {
            d[0] = d[1] = d[2] = d[3] = 0.f;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) d[i] = accumulator[i];
        }
#pragma unroll
        for (int term = TERMS - 1; term >= 0; term--) {
            // Two operands share a product with one part of their weights ...
#pragma unroll
            for (int i = 0; i + 1 < RANK_FRAGMENTS; i += 2) {
                const u32(&low)[2] = part[i][term], (&high)[2] = part[i + 1][term];
                mma_k16(d, low[0], low[1], high[0], high[1], raw[i], raw[i + 1], d[0], d[1], d[2], d[3]);
            }
            // ... and one left over has one with two parts.
            constexpr int I = RANK_FRAGMENTS - 1;
            if (RANK_FRAGMENTS % 2 && term == 2) {
                mma_k8(d, part[I][TERMS - 1][0], part[I][TERMS - 1][1], raw[I], d[0], d[1], d[2], d[3]);
            }
            if (RANK_FRAGMENTS % 2 && term == 0) {
                mma_k16(d, part[I][1][0], part[I][1][1], part[I][0][0], part[I][0][1], raw[I], raw[I], d[0], d[1], d[2],
                        d[3]);
            }
        }
        if (EXACT) {
#pragma unroll
            for (int i = 0; i < 4; i++) d[i] += accumulator[i];
        }
    }
};

struct Selector : InputOutputSelector {
    __device__ __forceinline__ explicit Selector(int t) : InputOutputSelector(t) {
        pin(b);
        pin(c);
    }
};

// Address of what a lane loads of a route's share, at the map's first position.
__device__ __forceinline__ u64 projected_of(const u16* projected, int route, int t) {
    return reinterpret_cast<u64>(projected + route * ROW) + 4 * t;
}

__device__ __forceinline__ void load_operands(u32 (&raw)[FRAGMENTS], u64 row, int t) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++) {
        const int pair = 4 * i + t;
        u32 word = 0;
        if (4 * i + 3 < PAIRS || pair < PAIRS) {
            if (ROW % 2 == 0) {
                word = load_32(row + 16 * i);
            } else {
                word = load_16(row + 16 * i);
                if (2 * pair + 1 < ROW) word |= load_16(row + 16 * i + 2) << 16;
            }
        }
        raw[i] = word;
    }
}

// The step sizes before softplus (into a), B (into b) and what holds C, of the positions a lane owns.
__device__ __forceinline__ void project(const Step& step, const Selector& selector,
                                        const u32 (&raw)[PRODUCTS][FRAGMENTS], float (&a)[T][2], float (&b)[T][2],
                                        float (&c)[T]) {
#pragma unroll
    for (int j = 0; j < PRODUCTS; j++) {
        float d[4], bc[4];
        step.apply(d, raw[j]);
        selector.apply(bc, raw[j]);
#pragma unroll
        for (int i = 0; i < 2 && 2 * j + i < T; i++) {
            a[2 * j + i][0] = d[i];
            a[2 * j + i][1] = d[2 + i];
            b[2 * j + i][0] = bc[i];
            c[2 * j + i] = bc[2 + i];
        }
    }
}

// h and product of the lanes up to this one of LANES, in place.
template <int LANES>
__device__ __forceinline__ void join_lanes(float& h, float& product) {
#define JOIN(DISTANCE, FENCE)                                                                                        \
    asm("{.reg .pred p; .reg .f32 before, factor;"                                                                   \
        " shfl.sync.up.b32 before|p, %0, " DISTANCE ", " FENCE ", 0xffffffff;"                                       \
        " shfl.sync.up.b32 factor|p, %1, " DISTANCE ", " FENCE ", 0xffffffff;"                                       \
        " @p fma.rn.ftz.f32 %0, %1, before, %0; @p mul.rn.ftz.f32 %1, %1, factor;}"                                  \
        : "+f"(h), "+f"(product))
    if (LANES == 2) JOIN("1", "0x1e00");
    if (LANES == 4) JOIN("1", "0x1c00");
    if (LANES == 4) JOIN("2", "0x1c00");
#undef JOIN
}

// Softplus in base 2. FAST: infinite from 2^7 on.
template <bool FAST>
__device__ __forceinline__ float step_size(float v) {
    return FAST && !EXACT ? lg2(1.f + ex2(v)) : softplus2<EXACT>(v);
}

// From step sizes to decays and inputs, and the recurrence over a lane's positions. WHOLE: from the true state, and b
// becomes the states; otherwise from zero, with the product of the decays. KEPT: b becomes the states from zero, and a
// the products so far, by which the true state before counts in each.
template <bool FAST, bool WHOLE, bool KEPT = false>
__device__ __forceinline__ void scan_lane(float (&a)[T][2], float (&b)[T][2], const u32 (&x)[T],
                                          const float (&decay)[2], float (&product)[2], float (&h)[2]) {
#pragma unroll
    for (int i = 0; i < T; i++) {
        const float in0 = b[i][0] * unpack_low(x[i]), in1 = b[i][0] * unpack_high(x[i]);
        const float s0 = step_size<FAST>(a[i][0]), s1 = step_size<FAST>(a[i][1]);
        a[i][0] = ex2(s0 * decay[0]);
        a[i][1] = ex2(s1 * decay[1]);
        b[i][0] = s0 * in0;
        b[i][1] = s1 * in1;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            h[k] = fmaf(a[i][k], h[k], b[i][k]);
            if (WHOLE || KEPT) b[i][k] = h[k];
            if (!WHOLE) product[k] *= a[i][k];
            if (!WHOLE && KEPT) a[i][k] = product[k];
        }
    }
}

// A step size of 2^7 and more is infinite on the fast path, and the state with it.
__device__ __forceinline__ bool overflowed(const float (&h)[2]) {
    return !EXACT && __any_sync(~0u, !(fabsf(h[0]) + fabsf(h[1]) < __int_as_float(0x7f800000)));
}
