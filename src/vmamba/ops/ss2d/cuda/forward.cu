// SS2D forward, one state per channel: map and projections in, merged map out, nothing else written.
//
// A block owns 16 channels of one image and all four routes. Two groups of WARPS warps each sweep the two directions of
// one layout towards each other, first of layout 0 (rows), then of layout 1 (columns); the merge is a float32 map in
// shared memory. A warp takes every WARPS-th chunk of its route; within a chunk a lane owns two channels and T adjacent
// positions, all in registers. The state passes from chunk to chunk along a ring of the group's warps.

constexpr bool EXACT = OUT == 0;
constexpr int TERMS = (BF16 && EXACT) ? 3 : 2;
constexpr int CHUNK = 4 * T;
constexpr int STEP = CHUNK * WARPS;  // positions of a route that its group handles at a time
constexpr int THREADS = 64 * WARPS;
constexpr u32 FIRST = 1, OUTSIDE = 2;  // flags in the low bits of a slot
constexpr int SLOT_BYTES = 64;

struct Shared {
    float dummy[16];  // where positions past the end go
    u32 position[2 * WARPS][2][CHUNK];
    u32 slot[2 * WARPS][2][CHUNK];
    float carry[2][WARPS][16];
    u64 link[2][WARPS];  // the state that warp i of a group waits for has been written
    u64 half[2];         // a group has finished the half of the route where the two cannot meet
    u64 middle[2];       // ... and its part of the step where they do
    u64 layout;          // all warps have finished a layout
};

// The map in the reading order of one layout. Its 16 sums per position are kept in slots that are permuted so that the
// four quarters of a chunk, which a warp addresses together, lie in different banks.
struct Reader {
    Fold line;
    bool by_columns;
    u32 along, across;  // positions from one step of a line, and from one line, to the next
    u32 pitch, base;

    __device__ __forceinline__ Reader(u32 H, u32 W, bool columns, u32 shared_base)
        : line(columns ? H : W), by_columns(columns), along(columns ? W : 1), across(columns ? 1 : W),
          pitch((W + 1) & ~1u), base(shared_base) {}

    __device__ __forceinline__ void locate(u32 n, u32& position, u32& slot) const {
        u32 which, place;
        line.split(n, which, place);
        position = which * across + place * along;
        const u32 hash = which / T + place / T;
        const u32 row = by_columns ? place : which, column = by_columns ? which : place;
        slot = base + (row * pitch + (column ^ (hash & 1))) * SLOT_BYTES + (hash & 2) * (SLOT_BYTES / 4);
    }
};

struct Inputs {
    u64 x;          // address, at this image and lane's channels
    u64 projected;  // address, at this image, route and lane's rank pair
    u32 x_stride;   // bytes a position
    u32 second;     // bytes from the lane's first channel to its second
};

struct Chunk {
    u32 x[T];
    u32 raw[T / 2][FRAGMENTS];
};

__device__ __forceinline__ void fetch(Chunk& chunk, const Inputs& in, const u32* positions, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < T; i += 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(positions + t * T + i);
        chunk.x[i] = load_pair<EVEN_E>(at(in.x, two.x, in.x_stride), in.second);
        chunk.x[i + 1] = load_pair<EVEN_E>(at(in.x, two.y, in.x_stride), in.second);
    }
#pragma unroll
    for (int j = 0; j < T / 2; j++) {
        const u64 row = at(in.projected, positions[(g >> 1) * T + 2 * j + (g & 1)], 2 * PROJECTED);
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++) {
            const int pair = 4 * i + t;
            u32 raw = 0;
            if (4 * i + 3 < PAIRS || pair < PAIRS) {
                if (ROW % 2 == 0) {
                    raw = load_32(row + 16 * i);
                } else {
                    raw = load_16(row + 16 * i);
                    if (2 * pair + 1 < ROW) raw |= load_16(row + 16 * i + 2) << 16;
                }
            }
            chunk.raw[j][i] = raw;
        }
    }
}

struct Output {
    u64 y;           // address, at this image and lane's channels
    u32 y_stride;    // bytes a position
    float skip[2];   // D summed over the routes
    bool valid[2];   // whether the lane's channels exist

    __device__ __forceinline__ void write(u32 position, float v0, float v1) const {
        const u64 p = at(y, position, y_stride);
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
};

// Run the recurrence again, now from the right state, and add C h to the map. `first`: nothing has been added at these
// positions yet; `last`: nothing will be, so the result is written. MIXED: slots carry flags, position by position.
template <bool MIXED, bool FIRST_LAYOUT, bool TOUCHED>
__device__ __forceinline__ void merge(const float (&a)[T][2], const float (&b)[T][2], const float (&c)[T],
                                      float (&h)[2], const u32 (&x)[T], const u32* slots, const u32* positions,
                                      const Output& out, int lane) {
    constexpr int BATCH = 2;
    const u32 own = (lane >> 2) * 8;
    const int offset = (lane & 3) * T;
    constexpr bool READ = MIXED || TOUCHED || !FIRST_LAYOUT, WRITE_OUT = !FIRST_LAYOUT && (MIXED || TOUCHED);
#pragma unroll
    for (int i0 = 0; i0 < T; i0 += BATCH) {
        u32 slot[BATCH];
        float sum[BATCH][2];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            slot[i] = slots[offset + i0 + i];
            const u32 address = (MIXED ? slot[i] & ~3u : slot[i]) ^ own;
            sum[i][0] = sum[i][1] = 0.f;
            if (READ && !(MIXED && FIRST_LAYOUT && (slot[i] & FIRST))) {
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(sum[i][0]), "=f"(sum[i][1]) : "r"(address));
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const u32 address = (MIXED ? slot[i] & ~3u : slot[i]) ^ own;
#pragma unroll
            for (int k = 0; k < 2; k++) {
                h[k] = fmaf(a[i0 + i][k], h[k], b[i0 + i][k]);
                sum[i][k] = fmaf(c[i0 + i], h[k], sum[i][k]);
            }
            if (WRITE_OUT && !(MIXED && (slot[i] & FIRST))) {
                if (!MIXED || !(slot[i] & OUTSIDE)) {
                    const u32 packed = x[i0 + i];
                    out.write(positions[offset + i0 + i], fmaf(out.skip[0], unpack_low(packed), LN2 * sum[i][0]),
                              fmaf(out.skip[1], unpack_high(packed), LN2 * sum[i][1]));
                }
            } else {
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(sum[i][0]), "f"(sum[i][1])
                             : "memory");
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
    ss2d_forward(const u16* __restrict__ x, const u16* __restrict__ projected, const void* __restrict__ weight,
                 const float* __restrict__ dt_bias, const float* __restrict__ A, const float* __restrict__ D, void* y,
                 int H, int W, int E, int column_layouts) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    // The shuffle tells the compiler that a warp shares one index, so that what follows from it stays uniform.
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int group = warp / WARPS, rank = warp % WARPS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            for (int j = 0; j < WARPS; j++) barrier_init(&shared.link[i][j], 1);
            barrier_init(&shared.half[i], WARPS);
            barrier_init(&shared.middle[i], WARPS);
        }
        barrier_init(&shared.layout, 2 * WARPS);
    }
    __syncthreads();

    const int channel_groups = (E + 15) / 16;
    const u32 image = blockIdx.x / channel_groups;
    const int channel = (blockIdx.x - image * channel_groups) * 16 + 2 * g;
    const u32 L = u32(H) * u32(W);
    const u32 slots_base = shared_address(memory) + ((sizeof(Shared) + 127) & ~127);
    // Lanes without a channel of their own repeat the last one and write nothing.
    const int channel0 = min(channel, EVEN_E ? E - 2 : E - 1), channel1 = min(channel0 + 1, E - 1);
    Inputs in;
    in.x = reinterpret_cast<u64>(x + u64(image) * L * E + channel0);
    in.x_stride = 2 * E;
    in.second = 2 * (channel1 - channel0);
    Output out;
    out.y_stride = (OUT == 0 ? 4 : 2) * E;
    out.y = reinterpret_cast<u64>(y) + (u64(image) * L * E + channel) * (OUT == 0 ? 4 : 2);
    out.valid[0] = channel < E;
    out.valid[1] = channel + 1 < E;
    out.skip[0] = out.skip[1] = 0.f;
    for (int k = 0; k < 4; k++) {
        out.skip[0] += D[k * E + channel0];
        out.skip[1] += D[k * E + channel1];
    }

    const u32 chunks = (L + CHUNK - 1) / CHUNK, steps = (L + STEP - 1) / STEP;
    const u32 apart = L / (2 * STEP);  // steps in which the two directions cannot meet
    const bool meet = apart * 2 * STEP < L;
    u32 link_parity = 0;
    const u32 dummy = shared_address(shared.dummy);

    for (int layout = 0; layout < 2; layout++) {
        const int route = layout + 2 * group;
        const Reader reader(H, W, column_layouts && layout, slots_base);
        in.projected = reinterpret_cast<u64>(projected + u64(image) * L * PROJECTED + route * ROW + 2 * t);
        StepWeights<TERMS> weights;
        weights.load(weight, dt_bias, route, E, channel0, channel1, t);
        const InputOutputSelector selector(t);
        const float A0 = A[route * E + channel0], A1 = A[route * E + channel1];

        auto tabulate = [&](u32 step) {
            const u32 start = (step * WARPS + rank) * CHUNK;
            u32* positions = shared.position[warp][step & 1];
            u32* slots = shared.slot[warp][step & 1];
            __syncwarp();
            for (int i = lane; i < CHUNK; i += 32) {
                const u32 n = start + i, m = min(n, L - 1);
                u32 position, slot;
                reader.locate(group ? L - 1 - m : m, position, slot);
                if (n >= L) slot = dummy | OUTSIDE;
                positions[i] = position;
                slots[i] = slot;
            }
            __syncwarp();
        };

        Chunk next;
        tabulate(0);
        fetch(next, in, shared.position[warp][0], lane);
        for (u32 step = 0; step < steps; step++) {
            const u32 q = step * WARPS + rank, start = q * CHUNK;
            const u32* positions = shared.position[warp][step & 1];
            u32* slots = shared.slot[warp][step & 1];

            float a[T][2], b[T][2], c[T], product[2] = {1.f, 1.f}, h[2] = {0.f, 0.f};
            u32 xs[T];
#pragma unroll
            for (int i = 0; i < T; i++) xs[i] = next.x[i];
#pragma unroll
            for (int j = 0; j < T / 2; j++) {
                float d[4], bc[4];
                weights.apply(d, next.raw[j]);
                selector.apply(bc, next.raw[j]);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    a[2 * j + i][0] = d[i];
                    a[2 * j + i][1] = d[2 + i];
                    b[2 * j + i][0] = bc[i];
                    c[2 * j + i] = bc[2 + i];
                }
            }
            if (step + 1 < steps) {
                tabulate(step + 1);
                fetch(next, in, shared.position[warp][(step + 1) & 1], lane);
            }
#pragma unroll
            for (int i = 0; i < T; i++) {
                const float in0 = b[i][0] * unpack_low(xs[i]), in1 = b[i][0] * unpack_high(xs[i]);
                const float s0 = softplus2<EXACT>(a[i][0]), s1 = softplus2<EXACT>(a[i][1]);
                a[i][0] = ex2(s0 * A0);
                a[i][1] = ex2(s1 * A1);
                b[i][0] = s0 * in0;
                b[i][1] = s1 * in1;
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    product[k] *= a[i][k];
                    h[k] = fmaf(a[i][k], h[k], b[i][k]);
                }
            }

            // Join the four lanes of a channel pair: afterwards a lane holds product and state over lanes 0..t.
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const float before = __shfl_up_sync(~0u, h[k], distance, 4);
                    const float factor = __shfl_up_sync(~0u, product[k], distance, 4);
                    if (t >= distance) {
                        h[k] = fmaf(product[k], before, h[k]);
                        product[k] *= factor;
                    }
                }
            }
            float incoming[2] = {0.f, 0.f};
            if (q > 0 && start < L) {
                barrier_wait(&shared.link[group][rank], link_parity);
                link_parity ^= 1;
                const float2 carry = *reinterpret_cast<const float2*>(&shared.carry[group][rank][2 * g]);
                incoming[0] = carry.x;
                incoming[1] = carry.y;
            }
            if (q + 1 < chunks) {
                const int receiver = rank + 1 == WARPS ? 0 : rank + 1;
                if (t == 3) {
                    *reinterpret_cast<float2*>(&shared.carry[group][receiver][2 * g]) =
                        make_float2(fmaf(product[0], incoming[0], h[0]), fmaf(product[1], incoming[1], h[1]));
                }
                barrier_arrive(&shared.link[group][receiver], lane);
            }
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const float before = __shfl_up_sync(~0u, fmaf(product[k], incoming[k], h[k]), 1, 4);
                h[k] = t ? before : incoming[k];
            }

            if (step == 0 || step - apart < 2) {
                if (step == 0 && layout == 1) barrier_wait(&shared.layout, 0);
                if (step == apart && apart > 0) barrier_wait(&shared.half[1 - group], layout);
                if (meet && step == apart + 1 - group) barrier_wait(&shared.middle[1 - group], layout);
            }

            // A position is visited first by the direction that gets there in an earlier step; group 0 goes first.
            const u32 bound = (step + group) * STEP;
            const bool all_first = start + CHUNK - 1 + bound < L, none_first = start + bound >= L;
            if (start >= L) {
                // a chunk past the end: nothing to add
            } else if (start + CHUNK <= L && all_first) {
                if (layout == 0) {
                    merge<false, true, false>(a, b, c, h, xs, slots, positions, out, lane);
                } else {
                    merge<false, false, false>(a, b, c, h, xs, slots, positions, out, lane);
                }
            } else if (start + CHUNK <= L && none_first) {
                if (layout == 0) {
                    merge<false, true, true>(a, b, c, h, xs, slots, positions, out, lane);
                } else {
                    merge<false, false, true>(a, b, c, h, xs, slots, positions, out, lane);
                }
            } else {
                for (int i = lane; i < CHUNK; i += 32) {
                    if (start + i + bound < L) slots[i] |= FIRST;
                }
                __syncwarp();
                if (layout == 0) {
                    merge<true, true, false>(a, b, c, h, xs, slots, positions, out, lane);
                } else {
                    merge<true, false, false>(a, b, c, h, xs, slots, positions, out, lane);
                }
            }
            if (step + 1 == apart) barrier_arrive(&shared.half[group], lane);
            if (step == apart && meet) barrier_arrive(&shared.middle[group], lane);
        }
        barrier_arrive(&shared.layout, lane);
    }
}
