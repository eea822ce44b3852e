// SS2D forward for maps larger than one block's shared memory: a cluster of CLUSTER blocks owns 16 channels of one image.
//
// Both directions of a layout, first of the rows, then of the columns, sweep the map in steps of CLUSTER * WARPS chunks.
// In a step a warp scans its chunk from zero; one more warp of each group, the joiner, composes what the group's chunks do
// to a state, sends that to all blocks, and from what all of them sent finds the state before each chunk. With DEPTH = 2 a warp
// scans its next chunk before it goes on with the last one, so that it seldom waits for the joiners. The same block owns
// a position in both directions, so their sums stay in its own shared memory.
// Between the layouts positions change owners. The sums of the rows are left in the result itself; a 16-bit result holds
// their upper halves, and shared memory the next 8 bits, in tiles of T x T positions dealt out among the blocks.

constexpr int LANES = 4;
constexpr int CHUNK = LANES * T;
constexpr int THREADS = 64 * (WARPS + 1);
constexpr int REST_BYTES = OUT == 0 ? 0 : 16;  // of a position: what the result has no room for
constexpr u32 TILE_BYTES = T * T * REST_BYTES + 16;  // neighbours differ in banks
constexpr u32 SPANS = 4 * WARPS;             // of a block in a step
constexpr u32 STEP = SPANS * CLUSTER;        // spans of a step

struct Shared {
    struct alignas(16) Group {
        float2 part[DEPTH][WARPS][16];          // product and end state of each chunk
        float2 whole[DEPTH + 1][CLUSTER][16];   // the same of each block, in reading order
        float carry[DEPTH][WARPS][16];          // state before each chunk
        u64 parts_given[DEPTH], carries_given[DEPTH], wholes_given[DEPTH + 1];
        u32 done;                            // how many warps have merged how many steps
    } group[2];
};

struct Spot {  // a span, from the place where a route enters it
    u32 line_start, place;  // position of the first place of its line; place in the line
    u32 line, block;        // the line; which span of it
};

struct Inputs {
    u64 x;          // address, at this image and lane's channels
    u64 projected;  // address, at this image, route and lane's rank pair
    u32 x_stride, projected_stride;  // bytes a position
    u32 second;     // bytes from the lane's first channel to its second
    u32 along, last;  // positions from place to place; the last place of a line
    int sign;         // of the steps through a span
    int x_step, projected_step, y_step;  // bytes from place to place of a span

    // Where the route is after i places of a span that begins at `spot`. A span that reaches past the end of its line
    // stays at the last place.
    __device__ __forceinline__ u64 go(u64 start, u32 stride, int step, const Spot& spot, int i) const {
        if (RAGGED) return step_on(at(start, spot.line_start, stride), min(spot.place + sign * i, last), along * stride);
        return step_on(start, i, step);
    }

    __device__ __forceinline__ u64 enter(u64 base, u32 stride, const Spot& spot) const {
        if (RAGGED) return base;
        u64 start = at(base, spot.line_start + spot.place * along, stride);
        pin(start);
        return start;
    }
};

struct Chunk {
    u32 x[T];
    u32 raw[PRODUCTS][FRAGMENTS];

    __device__ __forceinline__ void fetch_x(const Inputs& in, const Spot& spot) {
        const u64 start = in.enter(in.x, in.x_stride, spot);
#pragma unroll
        for (int i = 0; i < T; i++) x[i] = load_pair<EVEN_E>(in.go(start, in.x_stride, in.x_step, spot, i), in.second);
    }

    // Column g of product j is position 2 j + g % 2 of the span of lane g / 2.
    __device__ __forceinline__ void fetch_projected(const Inputs& in, const Spot& spot, int lane) {
        const Spot other = {__shfl_sync(~0u, spot.line_start, lane >> 3),
                            __shfl_sync(~0u, spot.place, lane >> 3) + (lane & 4 ? in.sign : 0), 0, 0};
        const u64 start = in.enter(in.projected, in.projected_stride, other);
#pragma unroll
        for (int j = 0; j < PRODUCTS; j++) {
            load_operands(raw[j], in.go(start, in.projected_stride, in.projected_step, other, 2 * j), lane & 3);
        }
    }
};

struct Held {  // a chunk between its two passes
    float a[T][2], b[T][2], c[T], product[2], h[2];
    u32 x[T];
    Spot here;
    u32 span;
};

// Distributed shared memory.

__device__ __forceinline__ u32 block_rank() {
    u32 r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

__device__ __forceinline__ u32 remote(u32 address, u32 rank) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}

__device__ __forceinline__ void send(u32 address, u32 barrier, float2 v) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
                 "f"(v.x), "f"(v.y), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;}" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Compose chunks and blocks of a group, step by step; lane i and lane i + 16 have channel i.
__device__ __forceinline__ void join(Shared::Group& own, u32 steps, u32 before, u32 reading_rank, int lane) {
    const int channel = lane & 15;
    float state = 0.f;
    for (u32 k = before; k < before + steps; k++) {
        const u32 i = k % DEPTH, j = k % (DEPTH + 1);
        if (lane == 0) barrier_expect(&own.wholes_given[j], CLUSTER * 16 * sizeof(float2));
        barrier_wait(&own.parts_given[i], k / DEPTH & 1);
        float2 part[WARPS], whole = make_float2(1.f, 0.f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) part[w] = load_shared_float2(shared_address(&own.part[i][w][channel]));
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            whole.y = fmaf(part[w].x, whole.y, part[w].y);
            whole.x *= part[w].x;
        }
        const u32 target = shared_address(&own.whole[j][reading_rank][channel]);
        const u32 barrier = shared_address(&own.wholes_given[j]);
#pragma unroll
        for (int two = 0; two < CLUSTER; two += 2) {
            const u32 rank = two + (lane >> 4);
            send(remote(target, rank), remote(barrier, rank), whole);
        }
        barrier_wait(&own.wholes_given[j], k / (DEPTH + 1) & 1);
        float mine = state;
#pragma unroll
        for (int block = 0; block < CLUSTER; block++) {
            const float2 other = load_shared_float2(shared_address(&own.whole[j][block][channel]));
            if (block == reading_rank) mine = state;
            state = fmaf(other.x, state, other.y);
        }
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (lane < 16) store_shared(shared_address(&own.carry[i][w][channel]), __float_as_uint(mine));
            mine = fmaf(part[w].x, mine, part[w].y);
        }
        barrier_arrive(&own.carries_given[i], lane);
    }
}

// The spans of a layout, numbered in reading order of its forward route, and where their sums are.
struct Layout {
    Fold blocks;        // spans of a line
    u32 total, steps;   // spans; steps that cover them
    u32 across, along;  // positions from line to line and within one

    __device__ __forceinline__ Layout(u32 lines, u32 length, u32 across_, u32 along_)
        : blocks((length + T - 1) / T), across(across_), along(along_) {
        total = lines * blocks.divisor;
        steps = (total + STEP - 1) / STEP;
    }

    __device__ __forceinline__ Spot spot(u32 span, bool backwards) const {
        u32 line, block;
        blocks.split(min(span, total - 1), line, block);
        return {line * across, block * T + (backwards ? T - 1 : 0), line, block};
    }
};

// Which of its owner's spans a span is.
__device__ __forceinline__ u32 local_span(u32 span) { return span / STEP * SPANS + span % SPANS; }

// Addresses of a span's sums, evenly spaced but for neighbours that change places; see lines.cu.
struct Slots {
    u32 even, odd;
    int step;

    __device__ __forceinline__ Slots(u32 base, u32 span, bool backwards, int g) {
        const u32 local = local_span(span), swap = (local & 2) * (SLOT_BYTES / 2);
        const u32 address = base + local * T * SLOT_BYTES + ((g * 8) ^ ((local & 1) * (SLOT_BYTES / 2)));
        const u32 last = backwards ? (T - 1) * SLOT_BYTES : 0;
        even = address + last + (backwards ? 0u - swap : swap);
        odd = address + last + (backwards ? swap : 0u - swap);
        step = backwards ? -SLOT_BYTES : SLOT_BYTES;
    }

    __device__ __forceinline__ u32 at(int i) const { return (i & 1 ? odd : even) + i * step; }
};

// ---- sums on their way ----------------------------------------------------------------------------------------------

__device__ __forceinline__ void pin(int& value) { asm volatile("" : "+r"(value)); }

// Of a block of the cluster by generic address, of this block by its own.
#if CLUSTER > 1
typedef u64 Place;

__device__ __forceinline__ Place place_of(u32 address, u32 rank) {
    u64 r;
    asm("{.reg .u64 generic; cvta.shared.u64 generic, %1; mapa.u64 %0, generic, %2;}" : "=l"(r) : "l"(u64(address)), "r"(rank));
    return r;
}

__device__ __forceinline__ void put_rest(Place address, u16 v) {
    asm volatile("st.b16 [%0], %1;" ::"l"(address), "h"(v) : "memory");
}

__device__ __forceinline__ u32 get_rest(Place address) {
    u16 v;
    asm volatile("ld.b16 %0, [%1];" : "=h"(v) : "l"(address) : "memory");
    return v;
}
#else
typedef u32 Place;

__device__ __forceinline__ Place place_of(u32 address, u32) { return address; }

__device__ __forceinline__ void put_rest(Place address, u16 v) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}

__device__ __forceinline__ u32 get_rest(Place address) {
    u16 v;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
    return v;
}
#endif

#if OUT == 0
typedef float2 Rows;  // of one position and two channels
#else
struct Rows {
    u32 upper;
};
#endif

// Two channels of a position of the result, past the caches that other multiprocessors do not see through. Lanes whose
// first channel does not exist do not come here.
__device__ __forceinline__ void put_pair(const Output& out, u64 target, u32 pair) {
    if (EVEN_E) {
        asm volatile("st.global.b32 [%0], %1;" ::"l"(target), "r"(pair) : "memory");
    } else {
        asm volatile("st.global.b16 [%0], %1;" ::"l"(target), "h"(u16(pair)) : "memory");
        if (out.valid[1]) asm volatile("st.global.b16 [%0], %1;" ::"l"(target + 2), "h"(u16(pair >> 16)) : "memory");
    }
}

__device__ __forceinline__ void put_result(const Output& out, u64 target, float v0, float v1) {
    if (OUT != 0) {
        put_pair(out, target, pack_as<OUT == 1>(v0, v1));
    } else if (EVEN_E) {
        asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(v0), "f"(v1) : "memory");
    } else {
        asm volatile("st.global.f32 [%0], %1;" ::"l"(target), "f"(v0) : "memory");
        if (out.valid[1]) asm volatile("st.global.f32 [%0], %1;" ::"l"(target + 4), "f"(v1) : "memory");
    }
}

template <int BITS>
__device__ __forceinline__ u32 get_fresh(u64 address, bool valid) {
    u32 r = 0;
    u16 half = 0;
    if (BITS == 32) {
        if (valid) asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(r) : "l"(address) : "memory");
        return r;
    }
    if (valid) asm volatile("ld.relaxed.gpu.global.b16 %0, [%1];" : "=h"(half) : "l"(address) : "memory");
    return half;
}

__device__ __forceinline__ void put_rows(const Output& out, u64 target, Place rest, float2 sum) {
#if OUT == 0
    put_result(out, target, sum.x, sum.y);
#else
    const u32 low = __float_as_uint(sum.x), high = __float_as_uint(sum.y);
    put_pair(out, target, __byte_perm(low, high, 0x7632));
    put_rest(rest, u16(__byte_perm(low, high, 0x0051)));
#endif
}

__device__ __forceinline__ Rows get_rows(const Output& out, u64 target) {
    Rows r;
#if OUT == 0
    r.x = __uint_as_float(get_fresh<32>(target, true));
    r.y = __uint_as_float(get_fresh<32>(target + 4, out.valid[1]));
#else
    r.upper = EVEN_E ? get_fresh<32>(target, true) : get_fresh<16>(target, true) | get_fresh<16>(target + 2, out.valid[1]) << 16;
#endif
    return r;
}

__device__ __forceinline__ float2 open_rows(const Rows& r, u32 rest) {
#if OUT == 0
    return r;
#else
    return make_float2(__uint_as_float(__byte_perm(r.upper, rest, 0x1046)),
                       __uint_as_float(__byte_perm(r.upper, rest, 0x3256)));
#endif
}

// Where the rest of a span's sums is: the first place, and bytes from place to place.
struct Rest {
    Place first;
    int step;

    __device__ __forceinline__ Rest() {}

    // pitch: tiles from one row of tiles to the next.
    __device__ __forceinline__ Rest(u32 base, u32 line, u32 block, u32 pitch, bool columns, bool backwards) {
        const u32 across = line / T, inside = line % T;
        const u32 tile = columns ? block * pitch + across : across * pitch + block;
        const u32 places = columns ? T : 1, lines = columns ? 1 : T;
        const u32 start = inside * lines + (backwards ? T - 1 : 0) * places;
        first = place_of(base + tile / CLUSTER * TILE_BYTES + start * REST_BYTES, tile % CLUSTER);
        step = (backwards ? -REST_BYTES : REST_BYTES) * int(places);
        pin(step);
    }

    __device__ __forceinline__ Place at(int i) const { return CLUSTER > 1 ? Place(step_on(first, i, step)) : first + i * step; }
};

// What a chunk does with its sums: it comes first in its layout, or second in the rows, or in the columns.
enum Merge { STORE, PASS, FINISH };

// Run the recurrence again, now from the right state, and merge C h into the map; `rows` are the sums of the rows.
template <Merge MODE>
__device__ __forceinline__ void merge(const float (&a)[T][2], const float (&b)[T][2], const float (&c)[T],
                                      float (&h)[2], const u32 (&x)[T], const Slots& slots, const Inputs& in,
                                      const Spot& spot, const Output& out, u64 start, bool writes,
                                      const Rows (&rows)[T], const Rest& rest) {
    constexpr int BATCH = MODE == STORE ? T : 5;
#pragma unroll
    for (int i0 = 0; i0 < T; i0 += BATCH) {
        float2 sum[BATCH];
        u32 low[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH && i0 + i < T; i++) {
            sum[i] = make_float2(0.f, 0.f);
            if (MODE == FINISH && OUT != 0) low[i] = get_rest(rest.at(i0 + i));
            if (MODE != STORE) sum[i] = load_shared_float2(slots.at(i0 + i));
        }
#pragma unroll
        for (int i = 0; i < BATCH && i0 + i < T; i++) {
            h[0] = fmaf(a[i0 + i][0], h[0], b[i0 + i][0]);
            h[1] = fmaf(a[i0 + i][1], h[1], b[i0 + i][1]);
            sum[i].x = fmaf(c[i0 + i], h[0], sum[i].x);
            sum[i].y = fmaf(c[i0 + i], h[1], sum[i].y);
            if (MODE == STORE) store_shared(slots.at(i0 + i), sum[i]);
        }
        if (MODE == STORE || !writes) continue;
#pragma unroll
        for (int i = 0; i < BATCH && i0 + i < T; i++) {
            if (RAGGED && spot.place + in.sign * (i0 + i) > in.last) continue;
            const u64 target = in.go(start, out.y_stride, in.y_step, spot, i0 + i);
            if (MODE == PASS) {
                put_rows(out, target, rest.at(i0 + i), sum[i]);
            } else {
                const float2 before = open_rows(rows[i0 + i], low[i]);
                const u32 both = x[i0 + i];
                put_result(out, target, fmaf(out.skip[0], unpack_low(both), LN2 * (before.x + sum[i].x)),
                           fmaf(out.skip[1], unpack_high(both), LN2 * (before.y + sum[i].y)));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    ss2d_forward_cluster(const u16* __restrict__ x, const u16* __restrict__ projected, const void* __restrict__ weight,
                         const float* __restrict__ dt_bias, const float* __restrict__ A, const float* __restrict__ D,
                         void* y, int batch, int H, int W, int E, int column_layouts, int slots_of_block) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    // The shuffle tells the compiler that a warp shares one index, so that what follows from it stays uniform.
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int group = warp / (WARPS + 1), rank = warp % (WARPS + 1);
    const bool backwards = group;
    Shared::Group& own = shared.group[group];
    if (threadIdx.x < 2) {
        Shared::Group& mine = shared.group[threadIdx.x];
        for (int i = 0; i < DEPTH; i++) {
            barrier_init(&mine.parts_given[i], WARPS);
            barrier_init(&mine.carries_given[i], 1);
        }
        for (int i = 0; i <= DEPTH; i++) barrier_init(&mine.wholes_given[i], 1);
        mine.done = 0;
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();

    const u32 sets = (E + 15) / 16, unit = blockIdx.x / CLUSTER, image = unit / sets, block = block_rank();
    const u32 reading_rank = backwards ? CLUSTER - 1 - block : block;
    const int channel = (unit % sets) * 16 + 2 * g;
    const u32 L = u32(H) * u32(W);
    const u32 map_base = shared_address(memory) + ((sizeof(Shared) + 127) & ~127);
    const u32 rest_base = map_base + slots_of_block * SLOT_BYTES + 2 * g, pitch = ((W + T - 1) / T) | 1;
    // Lanes without a channel of their own repeat the last one and write nothing.
    const int channel0 = min(channel, EVEN_E ? E - 2 : E - 1), channel1 = min(channel0 + 1, E - 1);
    Inputs in;
    in.x_stride = 2 * E;
    in.projected_stride = 2 * PROJECTED;
    pin(in.projected_stride);
    in.second = 2 * (channel1 - channel0);
    in.x = reinterpret_cast<u64>(x + u64(image) * L * E + channel0);
    pin(in.x);
    Output out;
    out.y_stride = (OUT == 0 ? 4 : 2) * E;
    out.y = reinterpret_cast<u64>(y) + (u64(image) * L * E + channel) * (OUT == 0 ? 4 : 2);
    pin(out.y);
    out.valid[0] = channel < E;
    out.valid[1] = channel + 1 < E;
    out.set_skip(D, E, channel0, channel1);

    u32 before = 0, signals = 0;  // steps of earlier layouts; signals to expect of the other direction
    for (u32 layout = 0; layout < 2; layout++) {
        const int route = layout + 2 * group;
        const bool columns = column_layouts && layout;
        const Layout order(columns ? W : H, columns ? H : W, columns ? 1 : W, columns ? W : 1);
        if (rank == WARPS) {
            join(own, order.steps, before, reading_rank, lane);
            before += order.steps;
            cluster_sync();
            continue;
        }
        in.projected = projected_of(projected + u64(image) * L * PROJECTED, route, t);
        pin(in.projected);
        in.sign = backwards ? -1 : 1;
        in.along = order.along;
        in.last = (columns ? H : W) - 1;
        in.x_step = in.sign * int(order.along * in.x_stride);
        in.projected_step = in.sign * int(order.along * in.projected_stride);
        in.y_step = in.sign * int(order.along * out.y_stride);
        pin(in.x_step);
        pin(in.projected_step);
        pin(in.y_step);
        // The chunk of this warp in step k, as the number of its first span, in reading order, in the forward route.
        const u32 chunk0 = (backwards ? order.steps * CLUSTER * WARPS - 1 - (reading_rank * WARPS + rank)
                                      : reading_rank * WARPS + rank);
        u32 span = chunk0 * 4 + (backwards ? 3 - t : t);
        Spot spot = order.spot(span, backwards);
        Chunk next;
        if (AHEAD >= 1) next.fetch_projected(in, spot, lane);
        if (AHEAD >= 2) next.fetch_x(in, spot);
        Step weights;
        weights.load(weight, dt_bias, route, E, channel0, channel1, t);
        const Selector selector(t);
        const float decay[2] = {A[route * E + channel0], A[route * E + channel1]};
        // In so many steps this direction comes first; the other does in the rest, and signals unless there are none.
        const u32 firsts = backwards ? order.steps / 2 : (order.steps + 1) / 2;
        signals += backwards || order.steps > 1 ? WARPS : 0;
        // A chunk from its loads to its part, and from its carry to its sums.
        auto scan = [&](Held& held, u32 k) {
            auto &a = held.a, &b = held.b;
            auto& c = held.c;
            auto &product = held.product, &h = held.h;
            auto& xs = held.x;
            const Spot here = spot;
            const bool inside = span < order.total;
            held.here = here;
            held.span = span;
            product[0] = product[1] = 1.f;
            h[0] = h[1] = 0.f;
            if (AHEAD < 2) next.fetch_x(in, here);
            if (AHEAD < 1) next.fetch_projected(in, here, lane);
#pragma unroll
            for (int i = 0; i < T; i++) xs[i] = next.x[i];
            project(weights, selector, next.raw, a, b, c);
            span += backwards ? 0u - STEP : STEP;
            spot = order.spot(span, backwards);
            if (k + 1 < order.steps) {
                if (AHEAD >= 1) next.fetch_projected(in, spot, lane);
                if (AHEAD >= 2) next.fetch_x(in, spot);
            }
            // Places past the end of a line have a step of zero, which leaves the state alone.
            auto mask = [&] {
#pragma unroll
                for (int i = 0; i < T; i++) {
                    if (RAGGED && here.place + in.sign * i > in.last) a[i][0] = a[i][1] = __int_as_float(0xff800000);
                }
            };
            mask();
            scan_lane<true, false>(a, b, xs, decay, product, h);
            if (overflowed(h)) {
                Chunk again;
                again.fetch_projected(in, here, lane);
                project(weights, selector, again.raw, a, b, c);
                mask();
                product[0] = product[1] = 1.f;
                h[0] = h[1] = 0.f;
                scan_lane<false, false>(a, b, xs, decay, product, h);
            }
            if (!inside) {  // backwards these come first, and must leave the state alone
                product[0] = product[1] = 1.f;
                h[0] = h[1] = 0.f;
            }
            join_lanes<4>(h[0], product[0]);
            join_lanes<4>(h[1], product[1]);
            const u32 i = (before + k) % DEPTH;
            if (t == 3) {
                asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(&own.part[i][rank][2 * g])),
                             "f"(product[0]), "f"(h[0]), "f"(product[1]), "f"(h[1])
                             : "memory");
            }
            barrier_arrive(&own.parts_given[i], lane);
        };
        auto finish = [&](Held& held, u32 k) {
            auto &a = held.a, &b = held.b;
            auto& c = held.c;
            auto &product = held.product, &h = held.h;
            auto& xs = held.x;
            const Spot here = held.here;
            const bool inside = held.span < order.total;
            const u64 target = in.enter(out.y, out.y_stride, here);
            const bool writes = inside && out.valid[0];
            Rows rows[T];
            if (layout && k >= firsts && writes) {
#pragma unroll
                for (int i = 0; i < T; i++) {
                    rows[i] = get_rows(out, in.go(target, out.y_stride, in.y_step, here, i));
                }
            }
            const u32 n = before + k, from = n % DEPTH;
            barrier_wait(&own.carries_given[from], n / DEPTH & 1);
            const float2 carry = load_shared_float2(shared_address(&own.carry[from][rank][2 * g]));
            const float incoming[2] = {carry.x, carry.y};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                h[i] = fmaf(product[i], incoming[i], h[i]);
                const float last = __shfl_up_sync(~0u, h[i], 1, 4);
                h[i] = t ? last : incoming[i];
            }
            const Slots slots(map_base, held.span, backwards, g);
            if (k == firsts) count_wait(&shared.group[1 - group].done, signals);
            if (k < firsts) {
                merge<STORE>(a, b, c, h, xs, slots, in, here, out, target, writes, rows, Rest());
            } else {
                const Rest rest(rest_base, here.line, here.block, pitch, columns, backwards);
                if (layout == 0) {
                    merge<PASS>(a, b, c, h, xs, slots, in, here, out, target, writes, rows, rest);
                } else {
                    merge<FINISH>(a, b, c, h, xs, slots, in, here, out, target, writes, rows, rest);
                }
            }
            // After the last step in which this direction comes first; a signal orders all that was written before.
            if (k + 1 == firsts) count_up(&own.done, lane);
        };
        Held even, odd;
        if (DEPTH == 2) scan(even, 0);
        for (u32 k = 0; k < order.steps; k += DEPTH) {
            if (DEPTH == 1) {
                scan(even, k);
                finish(even, k);
                continue;
            }
            if (k + 1 < order.steps) scan(odd, k + 1);
            finish(even, k);
            if (k + 2 < order.steps) scan(even, k + 2);
            if (k + 1 < order.steps) finish(odd, k + 1);
        }
        before += order.steps;
        // Between the layouts all sums of the rows must be seen; at the end a block's memory must outlive its readers.
        cluster_sync();
    }
}

