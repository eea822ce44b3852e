// SS2D forward for maps whose sides are multiples of the span T: no tables. A lane's T positions then lie on one line
// of the map, evenly spaced, so an address is a start and a step.
//
// A team of 2 WARPS warps owns 16 channels of QUAD images and all four routes. Its two groups sweep the two directions
// of a layout towards each other, first of the rows, then of the columns, and merge in float32 in shared memory, as in
// forward.cu. A warp's tile is LANES neighbouring spans of each image; where that is one span (QUAD = 4), the recurrence
// runs once, from the true state.

constexpr int LANES = 4 / QUAD;     // of the four lanes that share two channels, those of one image
constexpr int CHUNK = LANES * T;    // positions of an image in a warp's tile
constexpr int STEP = LANES * WARPS; // spans of a route that its group handles at a time
constexpr int THREADS = 64 * WARPS * TEAMS;
static_assert(QUAD == 1 || WARPS == 1, "a ring of warps carries the state of one image");
static_assert(QUAD < 4 || !PIPED, "a whole sequence needs nothing completed");

struct Shared {
    struct Team {
        float carry[2][WARPS][16];
        u64 link[2][WARPS];  // the state that warp i of a group waits for has been written
        u32 done[2][WARPS];  // chunks that a warp has merged where it comes first, counted on from layout to layout
        u32 whole[2];        // how often a warp of the group has finished a layout
    } team[TEAMS];
};

// The spans of one route in reading order, one a lane, STEP apart from call to call.
struct Spans {
    int line, block;  // of this lane's span: the line, and which T positions of it
    int line_step, block_step, blocks;
    int wrap, turn;   // what to add to block and line where a line ends
    u32 n, total;

    __device__ __forceinline__ Spans(u32 lines, u32 length, bool backwards, u32 first) : n(first) {
        blocks = length / T;
        total = lines * blocks;
        const u32 from = min(first, total - 1), start = backwards ? total - 1 - from : from;
        line = start / u32(blocks);
        block = start - line * blocks;
        line_step = STEP / u32(blocks);
        block_step = STEP - line_step * blocks;
        wrap = backwards ? blocks : -blocks;
        turn = backwards ? -1 : 1;
        if (backwards) {
            line_step = -line_step;
            block_step = -block_step;
        }
    }

    __device__ __forceinline__ void next() {
        n += STEP;
        block += block_step;
        line += line_step;
        if (u32(block) >= u32(blocks)) {
            block += wrap;
            line += turn;
        }
        if (n >= total) line = block = 0;  // past the end: any span that exists
    }
};

struct Inputs {
    u64 x;          // address, at this lane's image and channels
    u64 projected;  // address, at this column's image, route and lane's rank pair
    u32 x_stride, projected_stride;  // bytes a position
    int x_step, projected_step;      // bytes from one position of a span to the next
    u32 second;     // bytes from the lane's first channel to its second
};

struct Chunk {
    u32 x[T];
    u32 raw[PRODUCTS][FRAGMENTS];

    __device__ __forceinline__ void fetch_x(const Inputs& in, u32 position) {
        u64 base = at(in.x, position, in.x_stride);
        pin(base);
#pragma unroll
        for (int i = 0; i < T; i++) x[i] = load_pair<EVEN_E>(step_on(base, i, in.x_step), in.second);
    }

    // Column g of product j is position 2 j + g % 2 of the span of lane g / 2; `position` that of the first product.
    __device__ __forceinline__ void fetch_projected(const Inputs& in, u32 position, int lane) {
        const int t = lane & 3;
        u64 base = at(in.projected, position, in.projected_stride);
        pin(base);
#pragma unroll
        for (int j = 0; j < PRODUCTS; j++) {
            // An odd span has no second column in its last product: it reads the first again.
            const bool past = 2 * j + 1 >= T && (lane & 4);
            const u64 row = step_on(base, past ? 2 * j - 1 : 2 * j, in.projected_step);
            load_operands(raw[j], row, t);
        }
    }
};

// What a chunk does with its sums: nothing has been added at its positions before, something has, or all has but them.
// In a mixed chunk that differs from lane to lane.
enum Merge { STORE, ADD, FINISH, MIXED_STORE, MIXED_FINISH };

// Where the sums of a lane's span are in shared memory. 16 sums of a position fill half of the banks; blocks of T
// differ in the half of the slot where a channel's sum is, and in whether neighbours are swapped, so that the spans of
// a chunk lie in different quarters of the banks.
struct Slots {
    u32 even, odd;  // addresses for the even and the odd positions of the span, less the steps to them
    int step;

    __device__ __forceinline__ Slots(u32 base, u32 line, u32 block, u32 place, u32 pitch, bool columns, bool backwards,
                                     int g) {
        const u32 row = columns ? place : line, column = columns ? line : place, hash = line / T + block;
        const u32 swap = T % 2 ? 0 : (hash & 2) * (SLOT_BYTES / 2), there = column & 1 ? 0u - swap : swap;
        const u32 half = ((T % 2 ? hash >> 1 : hash) & 1) * (SLOT_BYTES / 2);
        const u32 address = base + (row * pitch + column) * SLOT_BYTES + ((g * 8) ^ half);
        even = address + there;
        odd = columns ? even : address - there;
        step = (backwards ? -SLOT_BYTES : SLOT_BYTES) * (columns ? int(pitch) : 1);
    }

    __device__ __forceinline__ u32 at(int i) const { return (i & 1 ? odd : even) + i * step; }
};

// Run the recurrence again, now from the right state, or take the states (QUAD = 4), or complete them (PIPED: a holds
// the products from the span's start, b the states from zero), and merge C h into the map.
template <Merge MODE>
__device__ __forceinline__ void merge(const float (&a)[T][2], const float (&b)[T][2], const float (&c)[T],
                                      float (&h)[2], const u32 (&x)[T], const Slots& slots, u64 target, int y_step,
                                      const Output& out, bool first, bool inside) {
    constexpr bool MIXED = MODE == MIXED_STORE || MODE == MIXED_FINISH;
    constexpr int BATCH = 4;
    float2 sum[2][BATCH];
    auto load = [&](int from) {
#pragma unroll
        for (int i = 0; i < BATCH && from + i < T; i++) {
            float2& of = sum[from / BATCH % 2][i];
            of = make_float2(0.f, 0.f);
            if (MODE != STORE && !(MODE == MIXED_STORE && first)) of = load_shared_float2(slots.at(from + i));
        }
    };
    if (PIPED) load(0);
#pragma unroll
    for (int i0 = 0; i0 < T; i0 += BATCH) {
        if (PIPED) load(i0 + BATCH);  // before the stores of this batch, which loads do not pass
        // Not through `load`: the assembler then orders the instructions otherwise than when they were timed.
#pragma unroll
        for (int i = 0; i < BATCH && i0 + i < T && !PIPED; i++) {
            sum[0][i] = make_float2(0.f, 0.f);
            if (MODE != STORE && !(MODE == MIXED_STORE && first)) sum[0][i] = load_shared_float2(slots.at(i0 + i));
        }
#pragma unroll
        for (int i = 0; i < BATCH && i0 + i < T; i++) {
            float2& of = sum[PIPED ? i0 / BATCH % 2 : 0][i];
            float own[2];  // h stays the state before the span
            float(&state)[2] = PIPED ? own : h;
#pragma unroll
            for (int k = 0; k < 2; k++) state[k] = QUAD == 4 ? b[i0 + i][k] : fmaf(a[i0 + i][k], h[k], b[i0 + i][k]);
            of.x = fmaf(c[i0 + i], state[0], of.x);
            of.y = fmaf(c[i0 + i], state[1], of.y);
            if (MIXED && !inside) continue;
            if (MODE == FINISH || (MODE == MIXED_FINISH && !first)) {
                const u32 both = x[i0 + i];
                out.write_at(step_on(target, i0 + i, y_step), fmaf(out.skip[0], unpack_low(both), LN2 * of.x),
                             fmaf(out.skip[1], unpack_high(both), LN2 * of.y));
            } else {
                store_shared(slots.at(i0 + i), of);
            }
        }
    }
}

// Wait until the other direction is through with the chunks that cover the one at `start`, as far as it comes first.
__device__ __forceinline__ void wait_for_cover(Shared::Team& team, int group, u32 start, u32 L, u32 middle,
                                               u32 before) {
    const u32 last = L - 1 - start, first = last - min(u32(CHUNK - 1), last);
    u32 end = last / CHUNK + 1;
    if (group) end = min(end, middle / CHUNK);
    for (; end > first / CHUNK; end--) count_wait(&team.done[1 - group][(end - 1) % WARPS], before + end);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    ss2d_forward_lines(const u16* __restrict__ x, const u16* __restrict__ projected, const void* __restrict__ weight,
                       const float* __restrict__ dt_bias, const float* __restrict__ A, const float* __restrict__ D,
                       void* y, int batch, int H, int W, int E, int column_layouts, int pitch, int map_bytes) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    // The shuffle tells the compiler that a warp shares one index, so that what follows from it stays uniform.
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int team = warp / (2 * WARPS), group = warp / WARPS % 2, rank = warp % WARPS;
    Shared::Team& own = shared.team[team];
    for (int i = threadIdx.x; i < TEAMS; i += THREADS) {
        for (int j = 0; j < 2 * WARPS; j++) {
            barrier_init(&shared.team[i].link[j / WARPS][j % WARPS], 1);
            shared.team[i].done[j / WARPS][j % WARPS] = 0;
        }
        shared.team[i].whole[0] = shared.team[i].whole[1] = 0;
    }
    __syncthreads();

    const u32 sets = (E + 16 * TEAMS - 1) / (16 * TEAMS), first_image = blockIdx.x / sets * QUAD;
    const int channel = ((blockIdx.x % sets) * TEAMS + team) * 16 + 2 * g;
    const u32 L = u32(H) * u32(W), last_image = batch - 1;
    // Lanes without a channel or an image of their own repeat the last one and write nothing.
    const int channel0 = min(channel, EVEN_E ? E - 2 : E - 1), channel1 = min(channel0 + 1, E - 1);
    const u32 image = min(first_image + t / LANES, last_image);
    const bool exists = first_image + t / LANES <= last_image;
    const u32 map_base = shared_address(memory) + ((sizeof(Shared) + 127) & ~127) +
                         (team * QUAD + t / LANES) * map_bytes;
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
    out.valid[0] = channel < E && exists;
    out.valid[1] = channel + 1 < E && exists;
    out.skip[0] = out.skip[1] = 0.f;

    const u32 chunks = (L + CHUNK - 1) / CHUNK;
    // Where the two directions of a layout meet: group 0 comes first before it, group 1 after it.
    const u32 middle = chunks / 2 * CHUNK, border = group ? L - middle : middle;
    const int receiver = rank + 1 == WARPS ? 0 : rank + 1;
    const u32 carry_in = shared_address(&own.carry[group][rank][2 * g]);
    const u32 carry_out = shared_address(&own.carry[group][receiver][2 * g]);
    u64 *link_in = &own.link[group][rank], *link_out = &own.link[group][receiver];
    u32 link_parity = 0;

    for (u32 layout = 0; layout < 2; layout++) {
        const int route = layout + 2 * group;
        const bool columns = column_layouts && layout, backwards = group;
        const u32 column_image = min(first_image + (lane >> 3) / LANES, last_image);
        in.projected = projected_of(projected + u64(column_image) * L * PROJECTED, route, t);
        pin(in.projected);
        const u32 across = columns ? 1 : W, along = columns ? W : 1;
        const int sign = backwards ? -1 : 1;
        in.x_step = sign * int(along * in.x_stride);
        in.projected_step = sign * int(along * in.projected_stride);
        const int y_step = sign * int(along * out.y_stride);
        Spans spans(columns ? W : H, columns ? H : W, backwards, rank * LANES + t % LANES);
        auto place = [&] { return u32(spans.block * T + (backwards ? T - 1 : 0)); };
        u32 position = spans.line * across + place() * along;
        // Column g of a product belongs to the span of lane g / 2, and odd ones to the position after.
        auto product_position = [&] {
            return __shfl_sync(~0u, position, lane >> 3) + ((g & 1) ? sign * int(along) : 0);
        };
        Chunk next;
        if (AHEAD >= 1) next.fetch_projected(in, product_position(), lane);
        if (AHEAD >= 2) next.fetch_x(in, position);
        // These wait for memory too; the first chunk is under way by then.
        Step weights;
        weights.load(weight, dt_bias, route, E, channel0, channel1, t);
        const Selector selector(t);
        const float decay[2] = {A[route * E + channel0], A[route * E + channel1]};
        if (layout == 1) out.set_skip(D, E, channel0, channel1);
        float incoming[2] = {0.f, 0.f};
        bool passed = false;
        for (u32 q = rank; q < chunks; q += WARPS) {
            const u32 start = q * CHUNK, here = product_position();
            const Slots slots(map_base, spans.line, spans.block, place(), pitch, columns, backwards, g);
            const u64 target = at(out.y, position, out.y_stride);
            const bool inside = spans.n < spans.total, first = start + t % LANES * T < border;
            float a[T][2], b[T][2], c[T], product[2] = {1.f, 1.f}, h[2] = {0.f, 0.f};
            u32 xs[T];
            if (AHEAD < 2) next.fetch_x(in, position);
            if (AHEAD < 1) next.fetch_projected(in, here, lane);
#pragma unroll
            for (int i = 0; i < T; i++) xs[i] = next.x[i];
            project(weights, selector, next.raw, a, b, c);
            spans.next();
            position = spans.line * across + place() * along;
            if (q + WARPS < chunks) {
                if (AHEAD >= 1) next.fetch_projected(in, product_position(), lane);
                if (AHEAD >= 2) next.fetch_x(in, position);
            }
            if (QUAD == 4) h[0] = incoming[0], h[1] = incoming[1];
            scan_lane<true, QUAD == 4, PIPED>(a, b, xs, decay, product, h);
            if (overflowed(h)) {
                Chunk again;
                again.fetch_projected(in, here, lane);
                project(weights, selector, again.raw, a, b, c);
                product[0] = product[1] = 1.f;
                h[0] = QUAD == 4 ? incoming[0] : 0.f;
                h[1] = QUAD == 4 ? incoming[1] : 0.f;
                scan_lane<false, QUAD == 4, PIPED>(a, b, xs, decay, product, h);
            }
            if (QUAD == 4) {
                incoming[0] = h[0];
                incoming[1] = h[1];
            } else {
                join_lanes<LANES>(h[0], product[0]);
                join_lanes<LANES>(h[1], product[1]);
                if (WARPS > 1 && q > 0) {
                    barrier_wait(link_in, link_parity);
                    link_parity ^= 1;
                    const float2 carry = load_shared_float2(carry_in);
                    incoming[0] = carry.x;
                    incoming[1] = carry.y;
                }
#pragma unroll
                for (int k = 0; k < 2; k++) h[k] = fmaf(product[k], incoming[k], h[k]);
                if (WARPS > 1 && q + 1 < chunks) {
                    // The receiver must be through with the layout before, or a signal and a state would be lost.
                    if (q < WARPS) count_wait(&own.done[group][receiver], layout * chunks);
                    if (t == 3) store_shared(carry_out, make_float2(h[0], h[1]));
                    barrier_arrive(link_out, lane);
                }
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const float before = __shfl_up_sync(~0u, h[k], 1, LANES);
                    const float last = WARPS > 1 ? 0.f : __shfl_sync(~0u, h[k], LANES - 1, LANES);
                    h[k] = t % LANES ? before : incoming[k];
                    incoming[k] = last;
                }
            }

            // Where the other direction came first, it must be through with the chunks that cover this one. Seen
            // once, it stays so: further on, the same warps' earlier chunks are asked for.
            if (start + CHUNK > border && !passed) {
                passed = start >= border;
                wait_for_cover(own, group, start, L, middle, layout * chunks);
            }
            if (layout == 1 && q < WARPS) {
                count_wait(&own.whole[0], WARPS);
                count_wait(&own.whole[1], WARPS);
            }
            if (start + CHUNK <= min(border, L)) {
                if (layout == 0) {
                    merge<STORE>(a, b, c, h, xs, slots, target, y_step, out, first, inside);
                } else {
                    merge<ADD>(a, b, c, h, xs, slots, target, y_step, out, first, inside);
                }
            } else if (start >= border && start + CHUNK <= L) {
                if (layout == 0) {
                    merge<ADD>(a, b, c, h, xs, slots, target, y_step, out, first, inside);
                } else {
                    merge<FINISH>(a, b, c, h, xs, slots, target, y_step, out, first, inside);
                }
            } else if (layout == 0) {
                merge<MIXED_STORE>(a, b, c, h, xs, slots, target, y_step, out, first, inside);
            } else {
                merge<MIXED_FINISH>(a, b, c, h, xs, slots, target, y_step, out, first, inside);
            }
            // A signal waits for all that the warp has written; who asks, asks for the last ones before the border first.
            if (start < border && start + WARPS * CHUNK >= border) {
                count_set(&own.done[group][rank], layout * chunks + q + 1, lane);
            }
        }
        count_set(&own.done[group][rank], (layout + 1) * chunks, lane);
        count_up(&own.whole[group], lane);
    }
}
