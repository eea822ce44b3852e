// The gradients of SS2D with several states a channel. The loader puts common.cuh and backward_tools.cuh before this
// and either backward_states_map.cu or backward_states_sequences.cu behind it.
//
// A route's sequence is cut into chunks of T = 16 positions, and a warp takes 32 channels of one. Five kernels share a
// few images and routes at a time:
//   prepare    W r + b
//   carry      what each chunk adds to the state that enters it, and to the adjoint state that leaves it at its start
//   join       from these the state at every chunk's start and the adjoint state at its end, in place
//   main       the recurrence of a chunk, its adjoint and all gradients but those of the rank
//   finish     the gradient of the ranks, and all of `projected` rounded; `weights`: that of dt_weight
// Of plain sequences `gather` comes first, which lays channels side by side, and `scatter` last, which undoes it.
//
// Compile-time parameters besides those of common.cuh (RANK, BF16, SPAN = 16):
//   N          states, 1 to 16
//   DY32       1: dy is float32, 0: as x
//   COLUMNS    1: odd routes read columns
//   REVERSED   1: the second half of the routes runs backwards
//   BLOCKS     warps a multiprocessor that `main` is compiled for
//   SEQUENCES  1: of plain sequences, channels last, with their own x, dy, steps, B and C; only carry, join and main

constexpr int LANE_CHANNELS = 32;
constexpr int STRIDE = T + 4;                  // of a state's inputs in shared memory: rows stay 16-byte aligned
#if SEQUENCES
constexpr int SHARE = 2 * N, INPUTS = 0;       // of a row of `projected`, which is one route's; where B starts
#else
constexpr int SHARE = RANK + 2 * N, INPUTS = RANK; // one route's share of a row of `projected`
#endif
constexpr int TILE = 32;                       // positions
constexpr float EX2_BIAS = 2.6e-8f;            // ex2.approx is 1.8e-8 too small on average: in base 2
constexpr float TRUNCATED = 1.f + 3.52e-4f;    // tensor cores drop what tf32 has no bits for: 0.72 * 2^-11 on average
constexpr u32 TOGETHER = 16;                   // chunks of which sums are kept in float32
constexpr u32 ONE = 0x3f800000u;

struct Problem {
    const u16* x;            // (images, L, E), of sequences (images, routes, L, E)
    const void* dy;          // as x
    const u16* projected;    // (images, L, 4 * SHARE), of sequences (images, routes, L, SHARE)
    const float* weight;     // (4, E, RANK)
    const float* bias;       // (4, E)
    const float* A;          // (4, N, E)
    const float* D;          // (4, E)
    float* raw;              // (images, routes, L, E): log2(e) (W r + b), in the end the gradient of W r + b
    float* states;           // (images, routes, chunks, N, E)
    float* adjoints;         // as states
    float* steps;            // (images, routes, chunks, E): log2(e) times the sum of the steps
    float* sums;             // (images, routes, L, 2 N): gradients of B and C, zeroed
    float* dx;               // as x, zeroed before the first routes
    u16* dprojected;         // as projected
    double* dweight;         // (4, RANK, E)
    double* dbias;           // (4, E)
    double* dA;              // (4, N, E)
    double* dD;              // (4, E)
    const u16* u;            // of sequences (images, routes, E, L)
    const u16* delta;        // as u
    const float* sequences_dy; // as u
    u16* du;                 // as u
    u16* ddelta;             // as u
    int length, channels, groups, chunks, images, first_route, routes, height, width;
};

__device__ __forceinline__ float widen(u16 v) { return unpack_low(u32(v)); }

// hardware: by address, in the order written; the emulator has its own
__device__ __forceinline__ float read_float(u64 address) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(address));
    return v;
}

__device__ __forceinline__ u16 read_16(u64 address) {
    u16 v;
    asm volatile("ld.global.b16 %0, [%1];" : "=h"(v) : "l"(address));
    return v;
}

__device__ __forceinline__ void write_float_if(bool yes, u64 address, float v) {
    asm volatile("{.reg .pred q; setp.ne.s32 q, %0, 0; @q st.global.f32 [%1], %2;}" ::"r"(int(yes)), "l"(address),
                 "f"(v)
                 : "memory");
}

__device__ __forceinline__ void add_float_if(bool yes, u64 address, float v) {
    asm volatile("{.reg .pred q; setp.ne.s32 q, %0, 0; @q red.relaxed.gpu.global.add.f32 [%1], %2;}" ::"r"(int(yes)),
                 "l"(address), "f"(v)
                 : "memory");
}

// Keeps what is built on a value from being kept in registers since it was built first.
__device__ __forceinline__ void forget(u32& v) { asm("" : "+r"(v)); }
// end of hardware


#if DY32
typedef float DyValue;
__device__ __forceinline__ DyValue read_dy(u64 address) { return read_float(address); }
__device__ __forceinline__ float widen(float v) { return v; }
#else
typedef u16 DyValue;
__device__ __forceinline__ DyValue read_dy(u64 address) { return read_16(address); }
#endif
constexpr u32 DY_BYTES = sizeof(DyValue);

// Where on the map a route is after so many steps.
__device__ __forceinline__ u32 find_place(const Problem& p, int route, int step) {
    const u32 s = REVERSED && route >= 2 ? p.length - 1 - step : step;
    if (!COLUMNS || route % 2 == 0) return s;
    const u32 column = s / u32(p.height);
    return (s - column * p.height) * p.width + column;
}

// One warp's work: 32 channels of a chunk.
struct Item {
    int line, route, channel;
    int live;         // steps of the chunk, 0 in a lane without a channel
    int steps;
    u32 place;        // of step lane % T
    u64 sequence;     // image and route
    u64 carry;        // sequence and chunk in `states`
    u64 raw, x, dy, dx, inputs; // addresses of place 0

    __device__ __forceinline__ Item(const Problem& p, u32 index, int lane) {
        const u32 chunk = index % p.chunks, rest = index / p.chunks, image = rest % p.images;
        line = rest / p.images;
        const int group = line % p.groups, local = line / p.groups, wanted = group * LANE_CHANNELS + lane;
        route = p.first_route + local;
        channel = min(wanted, p.channels - 1);
        steps = min(T, int(p.length - chunk * T));
        live = wanted < p.channels ? steps : 0;
        place = find_place(p, route, chunk * T + min(lane % T, steps - 1));
        sequence = u64(image) * p.routes + local;
        carry = sequence * p.chunks + chunk;
        const u64 map = sequence * p.length * p.channels + channel;
        const u64 in = SEQUENCES ? map : u64(image) * p.length * p.channels + channel;
        raw = u64(p.raw + map);
        x = u64(p.x + in);
        dy = u64(p.dy) + in * DY_BYTES;
        dx = u64(p.dx + in);
        inputs = u64(p.projected + INPUTS + min(lane, 2 * N - 1));
        inputs += (SEQUENCES ? sequence * p.length : u64(image) * p.length * 4 + route) * (2 * SHARE);
    }
};

constexpr u32 INPUT_BYTES = (SEQUENCES ? 1 : 4) * SHARE * 2; // from one position to the next

__device__ __forceinline__ u32 count_items(const Problem& p) { return u32(p.routes) * p.groups * p.images * p.chunks; }

// What a chunk works on. In shared memory B and C as float32: state by state, its T positions side by side, C after B.
// In registers steps (times log2(e)), what drives the states, the gradient of the output; zeros where there is nothing.
__device__ __forceinline__ void load_chunk(const Problem& p, const Item& item, float* inputs, int lane,
                                           float (&step)[T], float (&drive)[T], float (&gy)[T]) {
    const u32 row = min(lane, 2 * N - 1) * STRIDE;
    u16 input[T], x[T];
    DyValue y[T];
#pragma unroll
    for (int t = 0; t < T; t++) { // all are on their way before the first is waited for
        const u32 place = __shfl_sync(0xffffffffu, item.place, t);
        input[t] = read_16(at(item.inputs, place, INPUT_BYTES));
        step[t] = read_float(at(item.raw, place, 4u * p.channels));
        x[t] = read_16(at(item.x, place, 2u * p.channels));
        y[t] = read_dy(at(item.dy, place, DY_BYTES * p.channels));
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        if (lane < 2 * N) inputs[row + t] = widen(input[t]);
        const float soft = softplus2<true>(step[t]);
        step[t] = t < item.live ? soft : 0.f;
        drive[t] = step[t] * LN2 * widen(x[t]);
        gy[t] = t < item.live ? widen(y[t]) : 0.f;
        pin(step[t]);
        pin(drive[t]);
        pin(gy[t]);
    }
}

// ---- from chunk to chunk --------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(32, 16) ss2d_states_carry(const __grid_constant__ Problem p) {
    __shared__ float4 inputs4[2 * N * STRIDE / 4];
    float* inputs = reinterpret_cast<float*>(inputs4);
    const int lane = threadIdx.x;
    const u32 total = count_items(p);
    for (u32 index = blockIdx.x; index < total; index += gridDim.x) {
        const Item item(p, index, lane);
        float step[T], drive[T], gy[T];
        __syncwarp();
        load_chunk(p, item, inputs, lane, step, drive, gy);
        __syncwarp();
        float whole = 0.f;
#pragma unroll
        for (int t = 0; t < T; t++) whole += step[t];
        if (item.live) p.steps[item.carry * p.channels + item.channel] = whole;
        const float* rates = p.A + u64(item.route) * N * p.channels + item.channel;
        const u64 to = item.carry * N * p.channels + item.channel;
        float rate = rates[0];
#pragma unroll 1
        for (int n = 0; n < N; n++) {
            const float next = rates[u32(min(n + 1, N - 1)) * u32(p.channels)];
            float h = 0.f, adjoint = 0.f, product = 1.f;
#pragma unroll
            for (int i = 0; i < T / 4; i++) {
                const float4 b4 = inputs4[(n * STRIDE) / 4 + i], c4 = inputs4[((N + n) * STRIDE) / 4 + i];
                const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int t = 4 * i + j;
                    const float decay = ex2(fmaf(step[t], rate, EX2_BIAS));
                    h = fmaf(decay, h, drive[t] * b[j]);
                    product *= decay;
                    adjoint = fmaf(product, c[j] * gy[t], adjoint);
                }
            }
            if (item.live) {
                p.states[to + u32(n) * u32(p.channels)] = h;
                p.adjoints[to + u32(n) * u32(p.channels)] = adjoint;
            }
            rate = next;
        }
    }
}

// A thread: one state of one channel along a sequence, forwards and then backwards.
extern "C" __global__ void __launch_bounds__(128) ss2d_states_join(const __grid_constant__ Problem p) {
    constexpr int AHEAD = 8;
    const u32 index = blockIdx.x * 128 + threadIdx.x;
    const u32 channel = index % p.channels, rest = index / p.channels;
    const u32 n = rest % N, sequence = rest / N;
    if (sequence >= u32(p.images * p.routes)) return;
    const float rate = p.A[(u64(p.first_route + sequence % p.routes) * N + n) * p.channels + channel];
    const float* steps = p.steps + u64(sequence) * p.chunks * p.channels + channel;
    const u64 first = (u64(sequence) * p.chunks * N + n) * p.channels + channel;
#pragma unroll
    for (int pass = 0; pass < 2; pass++) {
        float* line = (pass ? p.adjoints : p.states) + first;
        float state = 0.f;
        for (int start = 0; start < p.chunks; start += AHEAD) {
            float own[AHEAD], step[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int read = min(start + i, p.chunks - 1), chunk = pass ? p.chunks - 1 - read : read;
                own[i] = line[u64(chunk) * N * p.channels];
                step[i] = steps[u64(chunk) * p.channels];
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (start + i < p.chunks) {
                    const int chunk = pass ? p.chunks - 1 - (start + i) : start + i;
                    line[u64(chunk) * N * p.channels] = state;
                    state = fmaf(ex2(fmaf(step[i], rate, EX2_BIAS)), state, own[i]);
                }
            }
        }
    }
}

// ---- the gradients --------------------------------------------------------------------------------------------------

// Adds up b and c over the eight quads of the warp. Lane: B below 16, C above; the position is 4 (lane % 4) plus bits 3
// and 2 of the lane, the former worth 2.
__device__ __forceinline__ float add_quads(const float (&b)[4], const float (&c)[4], int lane) {
    float four[4], two[2];
    const bool upper = lane & 16, second = lane & 8, odd = lane & 4;
#pragma unroll
    for (int i = 0; i < 4; i++) four[i] = (upper ? c[i] : b[i]) + from_lane(upper ? b[i] : c[i], 16);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        two[i] = (second ? four[2 + i] : four[i]) + from_lane(second ? four[i] : four[2 + i], 8);
    }
    return (odd ? two[1] : two[0]) + from_lane(odd ? two[0] : two[1], 4);
}

// The gradients of B and C lie in `inputs` as those did.
__device__ __forceinline__ void add_sums(const Problem& p, const Item& item, const float* inputs, int lane) {
    float* to = p.sums + item.sequence * p.length * (2 * N);
#pragma unroll
    for (int first = 0; first < (N % 2 ? T * 2 * N : T * N / 2); first += 32) {
        if (N % 2) {
            const int unit = first + lane, t = unit / (2 * N), value = unit % (2 * N);
            const u32 place = __shfl_sync(0xffffffffu, item.place, t % T);
            add_float_if(t < item.steps, u64(to + u64(place) * (2 * N) + value), inputs[value * STRIDE + t % T]);
        } else {
            const int unit = first + lane, t = unit / (N / 2 + N % 2), value = unit % (N / 2 + N % 2) * 4;
            const u32 place = __shfl_sync(0xffffffffu, item.place, t % T);
            if (t < item.steps) {
                const float* v = inputs + value * STRIDE + t;
                add_global4(to + u64(place) * (2 * N) + value, v[0], v[STRIDE], v[2 * STRIDE], v[3 * STRIDE]);
            }
        }
    }
}

__device__ __forceinline__ void add_parameters(const Problem& p, int line, int lane, float* rates, float& bias,
                                               float& skip) {
    const int channel = line % p.groups * LANE_CHANNELS + lane;
    const u64 route = p.first_route + line / p.groups;
#pragma unroll 1
    for (int n = 0; n < N; n++) {
        if (channel < p.channels) add_global(p.dA + (route * N + n) * p.channels + channel, rates[n * 32 + lane]);
        rates[n * 32 + lane] = 0.f;
    }
    if (channel < p.channels) {
        add_global(p.dbias + route * p.channels + channel, bias);
        add_global(p.dD + route * p.channels + channel, skip);
    }
    bias = skip = 0.f;
}

// What is left of a chunk after its states: `bdh` sums B dh and `adh` sums A dh a h' over the states.
__device__ __forceinline__ void finish_chunk(const Problem& p, const Item& item, const float (&step)[T],
                                             const float (&gy)[T], const float (&bdh)[T], const float (&adh)[T],
                                             float& bias, float& skip) {
    const float D = p.D[u64(item.route) * p.channels + item.channel];
    float of_bias = 0.f, of_skip = 0.f; // sums of sums err less
    float raw[T];
    u16 x[T];
#pragma unroll
    for (int t = 0; t < T; t++) {
        const u32 place = __shfl_sync(0xffffffffu, item.place, t);
        raw[t] = read_float(at(item.raw, place, 4u * p.channels));
        x[t] = read_16(at(item.x, place, 2u * p.channels));
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        const u32 place = __shfl_sync(0xffffffffu, item.place, t);
        const float v = raw[t], e = ex2(fminf(v, -v)), wide = widen(x[t]);
        const float gradient = fmaf(bdh[t], wide, adh[t]) * ((v >= 0.f ? 1.f : e) * rcp(1.f + e));
        const float of_x = fmaf(step[t] * LN2, bdh[t], D * gy[t]);
        write_float_if(t < item.live, at(item.raw, place, 4u * p.channels), gradient);
        add_float_if(t < item.live, at(item.dx, place, 4u * p.channels), of_x);
        of_bias += t < item.live ? gradient : 0.f;
        of_skip = fmaf(gy[t], wide, of_skip);
    }
    bias += of_bias;
    skip += of_skip;
}

// Each warp takes a stretch of the list of items, in which those with the same channels of the same route lie together.
extern "C" __global__ void __launch_bounds__(32, BLOCKS) ss2d_states_main(const __grid_constant__ Problem p) {
    __shared__ float4 inputs4[2 * N * STRIDE / 4];
    __shared__ float rates_sum[N * 32];
    float* inputs = reinterpret_cast<float*>(inputs4);
    const int lane = threadIdx.x;
    // Products with unit vectors: columns 2 i and 2 i + 1 take the sums of the i-th four values over four lanes.
    u32 pick[T / 4][2];
#pragma unroll
    for (int i = 0; i < T / 4; i++) {
        pick[i][0] = lane / 4 == 2 * i ? ONE : 0u;
        pick[i][1] = lane / 4 == 2 * i + 1 ? ONE : 0u;
    }
    for (int n = 0; n < N; n++) rates_sum[n * 32 + lane] = 0.f;
    const int put = (lane / 16 * N) * STRIDE + lane % 4 * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
    const u32 total = count_items(p);
    const u32 begin = u32(u64(total) * blockIdx.x / gridDim.x), end = u32(u64(total) * (blockIdx.x + 1) / gridDim.x);
    float bias = 0.f, skip = 0.f;
    int line = -1;
    for (u32 index = begin; index < end; index++) {
        const Item item(p, index, lane);
        if (line >= 0 && (item.line != line || (index - begin) % TOGETHER == 0)) {
            add_parameters(p, line, lane, rates_sum, bias, skip);
        }
        line = item.line;
        const float* rates = p.A + u64(item.route) * N * p.channels + item.channel;
        const float* states = p.states + item.carry * N * p.channels + item.channel;
        const float* adjoints = p.adjoints + item.carry * N * p.channels + item.channel;
        float rate = rates[0], h = states[0], carry = adjoints[0];
        float step[T], drive[T], gy[T], bdh[T], adh[T];
        __syncwarp();
        load_chunk(p, item, inputs, lane, step, drive, gy);
        __syncwarp();
#pragma unroll
        for (int t = 0; t < T; t++) bdh[t] = adh[t] = 0.f;
#pragma unroll 1
        for (int n = 0; n < N; n++) {
            const u32 ahead = u32(min(n + 1, N - 1)) * u32(p.channels);
            const float next_rate = rates[ahead], next_h = states[ahead], next_carry = adjoints[ahead];
            float decay[T], kept[T], db[4] = {0.f, 0.f, 0.f, 0.f}, dc[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int i = 0; i < T / 4; i++) {
                const float4 b4 = inputs4[(n * STRIDE) / 4 + i];
                const float b[4] = {b4.x, b4.y, b4.z, b4.w};
                u32 v[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int t = 4 * i + j;
                    decay[t] = ex2(fmaf(step[t], rate, EX2_BIAS));
                    kept[t] = decay[t] * h;
                    h = fmaf(drive[t], b[j], kept[t]);
                    v[j] = __float_as_uint(gy[t] * h);
                }
                mma_tf32(dc, v[0], v[2], v[1], v[3], pick[i][0], pick[i][1]);
            }
            float sum = 0.f;
#pragma unroll
            for (int i = T / 4 - 1; i >= 0; i--) {
                const float4 b4 = inputs4[(n * STRIDE) / 4 + i], c4 = inputs4[((N + n) * STRIDE) / 4 + i];
                const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
                u32 v[4];
#pragma unroll
                for (int j = 3; j >= 0; j--) {
                    const int t = 4 * i + j;
                    const float dh = fmaf(c[j], gy[t], carry), along = dh * kept[t];
                    carry = decay[t] * dh;
                    bdh[t] = fmaf(dh, b[j], bdh[t]);
                    adh[t] = fmaf(along, rate, adh[t]);
                    sum = fmaf(along, step[t], sum);
                    v[j] = __float_as_uint(dh * drive[t]);
                }
                mma_tf32(db, v[0], v[2], v[1], v[3], pick[i][0], pick[i][1]);
            }
            rates_sum[n * 32 + lane] += sum * LN2;
            const float both = add_quads(db, dc, lane);
            __syncwarp();
            inputs[put + n * STRIDE] = both;
            rate = next_rate;
            h = next_h;
            carry = next_carry;
        }
        __syncwarp();
        u32 again = index;
        forget(again);
        const Item same(p, again, lane);
        add_sums(p, same, inputs, lane);
        finish_chunk(p, same, step, gy, bdh, adh, bias, skip);
    }
    if (line >= 0) add_parameters(p, line, lane, rates_sum, bias, skip);
}
