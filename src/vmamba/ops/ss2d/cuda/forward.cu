// SS2D forward, one state per channel: map and projections in, merged map out, nothing else written.
//
// A block owns 16 channels of one image and all four routes. Two groups of WARPS warps each sweep the two directions of
// one layout towards each other, first of layout 0 (rows), then of layout 1 (columns); the merge is a float32 map in
// shared memory. A warp takes every WARPS-th chunk of its route; within a chunk a lane owns two channels and T adjacent
// positions, all in registers. The state passes from chunk to chunk along a ring of the group's warps.
//
// Variations, set at compile time:
//   IMAGES      small maps: a block takes so many images one after another, so that weights are prepared once for all
//   TEAMS       small maps: so many groups of 16 channels in a block, each with warps and a map of its own
//   STAGED      1: the block first copies its images' projections, which all teams read, into shared memory
//   APART       1: few blocks: a cluster of four blocks, one for each route, each with a map of its own, added up last

constexpr int CHUNK = 4 * T;
constexpr int STEP = CHUNK * WARPS;  // positions of a route that its group handles at a time
constexpr int GROUPS = APART ? 1 : 2;
constexpr int THREADS = 32 * TEAMS * GROUPS * WARPS;
constexpr u32 FIRST = 1, OUTSIDE = 2;  // flags in the low bits of a slot
static_assert(CHUNK <= 32 && (T & (T - 1)) == 0, "a chunk's table has one entry a lane");

struct Shared {
    float dummy[16];  // where positions past the end go
    u32 position[THREADS / 32][2][CHUNK];
    u32 slot[THREADS / 32][2][CHUNK];
    struct Team {
        float carry[GROUPS][WARPS][16];
        u64 link[GROUPS][WARPS];  // the state that warp i of a group waits for has been written
        u32 done[2][WARPS];       // chunks that a warp has merged where it comes first, counted on from map to map
        u32 whole[2];             // how often a warp of the group has finished a map
    } team[TEAMS];
};

// The map in the reading order of one route, one position a lane, STEP apart from call to call. The 16 sums of a
// position are kept in slots permuted so that the quarters of a chunk, which a warp addresses together, lie in other
// banks; the permutation depends on the map position alone. One of slot_row and slot_column is 1, the other even.
struct Reader {
    int line, place;                    // of this lane's position
    int line_step, place_step, length;  // length: of a line
    int wrap, turn;                     // what to add to place and line where a line ends
    u32 n, L;
    u32 across, along, slot_across, slot_along;  // from one line, and one place, to the next
    u32 base;

    __device__ __forceinline__ Reader(u32 H, u32 W, u32 slot_row, u32 slot_column, bool columns, bool backwards,
                                      u32 first, u32 shared_base)
        : n(first), L(H * W), base(shared_base) {
        length = columns ? H : W;
        across = columns ? 1 : W;
        along = columns ? W : 1;
        slot_across = columns ? slot_column : slot_row;
        slot_along = columns ? slot_row : slot_column;
        const u32 from = min(first, L - 1), start = backwards ? L - 1 - from : from;
        line = start / u32(length);
        place = start - line * length;
        line_step = STEP / u32(length);
        place_step = STEP - line_step * length;
        wrap = backwards ? length : -length;
        turn = backwards ? -1 : 1;
        if (backwards) {
            line_step = -line_step;
            place_step = -place_step;
        }
    }

    __device__ __forceinline__ u32 slot_of(u32 line_, u32 place_) const {
        const u32 index = line_ * slot_across + place_ * slot_along, hash = line_ / T + place_ / T;
        return base + (index ^ (hash & 1)) * SLOT_BYTES + (hash & 2) * (SLOT_BYTES / 4);
    }

    __device__ __forceinline__ void next(u32 position_entry, u32 slot_entry, u32 dummy) {
        const bool inside = n < L;
        store_shared(position_entry, inside ? line * across + place * along : 0);
        store_shared(slot_entry, inside ? slot_of(line, place) : dummy | OUTSIDE);
        n += STEP;
        place += place_step;
        line += line_step;
        if (u32(place) >= u32(length)) {
            place += wrap;
            line += turn;
        }
    }
};

// Staged rows: an odd multiple of 16 bytes apart, and two rows skipped after every eight, so that the eight rows of an
// operand, pairs eight positions apart, lie in different banks.
constexpr u32 STAGED_PITCH = (8 * ROW + 15) / 32 * 32 + 16;
__device__ __forceinline__ u32 staged_row(u32 position) { return (position + (position >> 3) * 2) * STAGED_PITCH; }

__device__ __forceinline__ void stage(u32 target, u64 source, u32 rows) {
    for (u32 i = threadIdx.x; i < rows * ROW; i += THREADS) {
        const u32 row = i / ROW;
        store_shared(target + staged_row(row) + (i - row * ROW) * 8, load_64(source + u64(i) * 8));
    }
}

struct Inputs {
    u64 x;          // address, at this image and lane's channels
    u64 projected;  // address, at this image, route and lane's rank pair
    u32 staged;     // the same in shared memory
    u32 x_stride, projected_stride;  // bytes a position
    u32 second;     // bytes from the lane's first channel to its second
};

// High ranks need too many registers to be fetched a chunk ahead.
constexpr bool AHEAD = FRAGMENTS <= 2 && !STAGED;

struct Chunk {
    u32 x[T];
    u32 raw[PRODUCTS][FRAGMENTS];

    __device__ __forceinline__ void fetch_x(const Inputs& in, u32 positions, int lane) {
#pragma unroll
        for (int i = 0; i < T; i += 2) {
            const uint2 two = load_shared_pair(positions + ((lane & 3) * T + i) * 4);
            x[i] = load_pair<EVEN_E>(at(in.x, two.x, in.x_stride), in.second);
            x[i + 1] = load_pair<EVEN_E>(at(in.x, two.y, in.x_stride), in.second);
        }
    }

    // Column g of product j is position (g / 2) T + 2 j + g % 2 of the chunk.
    __device__ __forceinline__ void fetch_projected(const Inputs& in, u32 positions, int lane) {
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int j = 0; j < T / 2; j++) {
            const u32 position = load_shared(positions + ((g >> 1) * T + 2 * j + (g & 1)) * 4);
            const u64 row = at(in.projected, position, in.projected_stride);
            const u32 staged = in.staged + staged_row(position);
#pragma unroll
            for (int i = 0; i < FRAGMENTS; i++) {
                const int pair = 4 * i + t;
                u32 word = 0;
                if (4 * i + 3 < PAIRS || pair < PAIRS) {
                    if (ROW % 2 == 0) {
                        word = STAGED ? load_shared(staged + 16 * i) : load_32(row + 16 * i);
                    } else {
                        word = STAGED ? load_shared_16(staged + 16 * i) : load_16(row + 16 * i);
                        if (2 * pair + 1 < ROW) {
                            word |= (STAGED ? load_shared_16(staged + 16 * i + 2) : load_16(row + 16 * i + 2)) << 16;
                        }
                    }
                }
                raw[j][i] = word;
            }
        }
    }

    __device__ __forceinline__ void fetch(const Inputs& in, u32 positions, int lane) {
        if (AHEAD) fetch_projected(in, positions, lane);
        fetch_x(in, positions, lane);
    }
};

// What a chunk does with its sums: nothing has been added at its positions before, something has, or all has but them.
// The last two decide position by position, by flags in the slots, in the first and in the second layout.
enum Merge { STORE, ADD, FINISH, MIXED_STORE, MIXED_FINISH };

// Run the recurrence again, now from the right state, and merge C h into the map.
template <Merge MODE>
__device__ __forceinline__ void merge(const float (&a)[T][2], const float (&b)[T][2], const float (&c)[T],
                                      float (&h)[2], const u32 (&x)[T], u32 slots, u32 positions, const Output& out,
                                      int lane) {
    constexpr int BATCH = T < 4 ? T : 4;
    constexpr bool MIXED = MODE == MIXED_STORE || MODE == MIXED_FINISH;
    const u32 own = (lane >> 2) * 8, offset = (lane & 3) * T * 4;
#pragma unroll
    for (int i0 = 0; i0 < T; i0 += BATCH) {
        u32 slot[BATCH];
        float2 sum[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i += 2) {
            const uint2 two = load_shared_pair(slots + offset + (i0 + i) * 4);
            slot[i] = two.x;
            slot[i + 1] = two.y;
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            sum[i] = make_float2(0.f, 0.f);
            if (MODE != STORE && !(MODE == MIXED_STORE && (slot[i] & FIRST))) {
                sum[i] = load_shared_float2((MIXED ? slot[i] & ~3u : slot[i]) ^ own);
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            h[0] = fmaf(a[i0 + i][0], h[0], b[i0 + i][0]);
            h[1] = fmaf(a[i0 + i][1], h[1], b[i0 + i][1]);
            sum[i].x = fmaf(c[i0 + i], h[0], sum[i].x);
            sum[i].y = fmaf(c[i0 + i], h[1], sum[i].y);
            if (MODE == FINISH || (MODE == MIXED_FINISH && !(slot[i] & FIRST))) {
                if (!MIXED || !(slot[i] & OUTSIDE)) {
                    const u32 both = x[i0 + i];
                    out.write(load_shared(positions + offset + (i0 + i) * 4),
                              fmaf(out.skip[0], unpack_low(both), LN2 * sum[i].x),
                              fmaf(out.skip[1], unpack_high(both), LN2 * sum[i].y));
                }
            } else {
                store_shared((MIXED ? slot[i] & ~3u : slot[i]) ^ own, sum[i]);
            }
        }
    }
}

#if APART
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Add up the maps of the four blocks of a cluster; each writes a quarter of the positions.
__device__ __forceinline__ void merge_blocks(const Reader& reader, const u16* x, const float* D, void* y,
                                             u64 image_start, int E, int first_channel, u32 W, int quarter) {
    const int channel = first_channel + 2 * (threadIdx.x & 7);
    const int channel0 = min(channel, EVEN_E ? E - 2 : E - 1), channel1 = min(channel0 + 1, E - 1);
    Output out;
    out.y_stride = (OUT == 0 ? 4 : 2) * E;
    out.y = reinterpret_cast<u64>(y) + (image_start + channel) * (OUT == 0 ? 4 : 2);
    out.valid[0] = channel < E;
    out.valid[1] = channel + 1 < E;
    out.set_skip(D, E, channel0, channel1);
    const u64 source = reinterpret_cast<u64>(x + image_start + channel0);
    const Fold rows(W);
    const u32 end = min(reader.L, (quarter + 1) * ((reader.L + 3) / 4));
#pragma unroll 2
    for (u32 n = quarter * ((reader.L + 3) / 4) + threadIdx.x / 8; n < end; n += THREADS / 8) {
        u32 row, column;
        rows.split(n, row, column);
        const u32 address = reader.slot_of(row, column) ^ ((threadIdx.x & 7) * 8);
        const u32 packed = load_pair<EVEN_E>(at(source, n, 2 * E), 2 * (channel1 - channel0));
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int route = 0; route < 4; route++) {
            float2 part;
            asm volatile(
                "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %2, %3;"
                " ld.shared::cluster.v2.f32 {%0, %1}, [remote];}"
                : "=f"(part.x), "=f"(part.y)
                : "r"(address), "r"(route));
            sum.x += part.x;
            sum.y += part.y;
        }
        out.write(n, fmaf(out.skip[0], unpack_low(packed), LN2 * sum.x),
                  fmaf(out.skip[1], unpack_high(packed), LN2 * sum.y));
    }
}
#endif

// Wait until the other direction is through with the chunks that cover the one at `start`, as far as it comes first.
// Chunks are counted on from map to map; `before` were counted in earlier ones.
__device__ __forceinline__ void wait_for_cover(Shared::Team& team, int group, u32 start, u32 L, u32 middle,
                                               u32 before) {
    const u32 last = L - 1 - start, first = last - min(u32(CHUNK - 1), last);
    u32 end = last / CHUNK + 1;
    if (group) end = min(end, middle / CHUNK);
    for (; end > first / CHUNK; end--) count_wait(&team.done[1 - group][(end - 1) % WARPS], before + end);
}

// Choose how a chunk merges; its direction comes first before `border`.
__device__ __forceinline__ void merge_chunk(u32 layout, u32 start, u32 border, u32 L, const float (&a)[T][2],
                                            const float (&b)[T][2], const float (&c)[T], float (&h)[2],
                                            const u32 (&x)[T], u32 slots, u32 positions, const Output& out, int lane) {
    if (start + CHUNK <= min(border, L)) {
        if (layout == 0) {
            merge<STORE>(a, b, c, h, x, slots, positions, out, lane);
        } else {
            merge<ADD>(a, b, c, h, x, slots, positions, out, lane);
        }
    } else if (start >= border && start + CHUNK <= L) {
        if (layout == 0) {
            merge<ADD>(a, b, c, h, x, slots, positions, out, lane);
        } else {
            merge<FINISH>(a, b, c, h, x, slots, positions, out, lane);
        }
    } else {
        if (start + lane < min(border, L) && lane < CHUNK) {
            store_shared(slots + lane * 4, load_shared(slots + lane * 4) | FIRST);
        }
        __syncwarp();
        if (layout == 0) {
            merge<MIXED_STORE>(a, b, c, h, x, slots, positions, out, lane);
        } else {
            merge<MIXED_FINISH>(a, b, c, h, x, slots, positions, out, lane);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    ss2d_forward(const u16* __restrict__ x, const u16* __restrict__ projected, const void* __restrict__ weight,
                 const float* __restrict__ dt_bias, const float* __restrict__ A, const float* __restrict__ D, void* y,
                 int batch, int H, int W, int E, int column_layouts, int slot_row, int slot_column, int map_slots) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    // The shuffle tells the compiler that a warp shares one index, so that what follows from it stays uniform.
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int team = warp / (GROUPS * WARPS), group = warp / WARPS % GROUPS, rank = warp % WARPS;
    Shared::Team& own = shared.team[team];
    for (int i = threadIdx.x; i < TEAMS; i += THREADS) {
        for (int j = 0; j < GROUPS * WARPS; j++) barrier_init(&shared.team[i].link[j / WARPS][j % WARPS], 1);
        for (int j = 0; j < 2 * WARPS; j++) shared.team[i].done[j / WARPS][j % WARPS] = 0;
        shared.team[i].whole[0] = shared.team[i].whole[1] = 0;
    }

    const u32 sets = (E + 16 * TEAMS - 1) / (16 * TEAMS), unit = APART ? blockIdx.x / 4 : blockIdx.x;
    const u32 first_image = unit / sets * IMAGES, images = min(IMAGES, batch - first_image);
    const int channel = ((unit % sets) * TEAMS + team) * 16 + 2 * g;
    const u32 L = u32(H) * u32(W);
    const u32 memory_base = shared_address(memory), map_base = memory_base + ((sizeof(Shared) + 127) & ~127);
    const u32 map_bytes = map_slots * SLOT_BYTES, stage_base = map_base + TEAMS * IMAGES * map_bytes;
    const u32 stage_bytes = staged_row(L + 7);
    for (u32 turn = 0; STAGED && turn < images; turn++) {
        const u64 source = reinterpret_cast<u64>(projected + u64(first_image + turn) * L * PROJECTED);
        stage(stage_base + turn * stage_bytes, source, L);
    }
    __syncthreads();
    // Lanes without a channel of their own repeat the last one and write nothing.
    const int channel0 = min(channel, EVEN_E ? E - 2 : E - 1), channel1 = min(channel0 + 1, E - 1);
    Inputs in;
    in.x_stride = 2 * E;
    in.projected_stride = 2 * PROJECTED;
    pin(in.projected_stride);
    in.second = 2 * (channel1 - channel0);
    Output out;
    out.y_stride = (OUT == 0 ? 4 : 2) * E;
    out.valid[0] = channel < E;
    out.valid[1] = channel + 1 < E;
    out.set_skip(D, E, channel0, channel1);

    const u32 chunks = (L + CHUNK - 1) / CHUNK;
    // Where the two directions of a layout meet: group 0 comes first before it, group 1 after it.
    const u32 middle = APART ? L : chunks / 2 * CHUNK, border = APART ? ~0u : group ? L - middle : middle;
    const u32 dummy = shared_address(shared.dummy);
    const u32 positions0 = shared_address(shared.position[warp]), slots0 = shared_address(shared.slot[warp]);
    const int receiver = rank + 1 == WARPS ? 0 : rank + 1;
    const u32 carry_in = shared_address(&own.carry[group][rank][2 * g]);
    const u32 carry_out = shared_address(&own.carry[group][receiver][2 * g]);
    u64 *link_in = &own.link[group][rank], *link_out = &own.link[group][receiver];
    u32 link_parity = 0;

    for (u32 layout = 0; layout < (APART ? 1 : 2); layout++) {
        const int route = APART ? blockIdx.x % 4 : layout + 2 * group;
        const bool columns = column_layouts && (route & 1), backwards = route & 2;
        Step weights;
        weights.load(weight, dt_bias, route, E, channel0, channel1, t);
        const Selector selector(t);
        const float decay[2] = {A[route * E + channel0], A[route * E + channel1]};

        for (u32 turn = 0; turn < images; turn++) {
            const u32 image = first_image + turn, round = layout * images + turn;
            in.x = reinterpret_cast<u64>(x + u64(image) * L * E + channel0);
            in.projected = reinterpret_cast<u64>(projected + u64(image) * L * PROJECTED + route * ROW + 2 * t);
            out.y = reinterpret_cast<u64>(y) + (u64(image) * L * E + channel) * (OUT == 0 ? 4 : 2);
            in.staged = stage_base + turn * stage_bytes + (route * ROW + 2 * t) * 2;
            pin(in.x);
            pin(in.projected);
            pin(out.y);
            Reader reader(H, W, slot_row, slot_column, columns, backwards, rank * CHUNK + lane,
                          map_base + (team * IMAGES + turn) * map_bytes);
            u32 buffer = 0;
            auto tabulate = [&](u32 to) {
                __syncwarp();
                if (CHUNK == 32 || lane < CHUNK) reader.next(positions0 + to + lane * 4, slots0 + to + lane * 4, dummy);
                __syncwarp();
            };
            Chunk next;
            tabulate(buffer);
            next.fetch(in, positions0, lane);
            float incoming[2] = {0.f, 0.f};
            bool passed = false;
            for (u32 q = rank; q < chunks; q += WARPS) {
                const u32 start = q * CHUNK, positions = positions0 + buffer, slots = slots0 + buffer;
                float a[T][2], b[T][2], c[T], product[2] = {1.f, 1.f}, h[2] = {0.f, 0.f};
                u32 xs[T];
#pragma unroll
                for (int i = 0; i < T; i++) xs[i] = next.x[i];
                if (!AHEAD) next.fetch_projected(in, positions, lane);
                project(weights, selector, next.raw, a, b, c);
                buffer ^= CHUNK * 4;
                if (q + WARPS < chunks) {
                    tabulate(buffer);
                    next.fetch(in, positions0 + buffer, lane);
                }
                scan_lane<false, false>(a, b, xs, decay, product, h);
                join_lanes<4>(h[0], product[0]);
                join_lanes<4>(h[1], product[1]);

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
                    // The receiver must be through with the map before, or a signal and a state would be lost.
                    if (q < WARPS) count_wait(&own.done[group][receiver], round * chunks);
                    if (t == 3) store_shared(carry_out, make_float2(h[0], h[1]));
                    barrier_arrive(link_out, lane);
                }
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const float before = __shfl_up_sync(~0u, h[k], 1, 4);
                    const float last = WARPS > 1 ? 0.f : __shfl_sync(~0u, h[k], 3, 4);
                    h[k] = t ? before : incoming[k];
                    incoming[k] = last;
                }

                // Where the other direction came first, it must be through with the chunks that cover this one. Seen
                // once, it stays so: further on, the same warps' earlier chunks are asked for.
                if (start + CHUNK > border && !passed) {
                    passed = start >= border;
                    wait_for_cover(own, group, start, L, middle, round * chunks);
                }
                if (layout == 1 && q < WARPS) {
                    count_wait(&own.whole[0], (turn + 1) * WARPS);
                    count_wait(&own.whole[1], (turn + 1) * WARPS);
                }
                merge_chunk(layout, start, border, L, a, b, c, h, xs, slots, positions, out, lane);
                if (!APART && start < border) count_set(&own.done[group][rank], round * chunks + q + 1, lane);
            }
            count_set(&own.done[group][rank], (round + 1) * chunks, lane);
            count_up(&own.whole[group], lane);
        }
    }
#if APART
    cluster_sync();
    const Reader reader(H, W, slot_row, slot_column, false, false, 0, map_base);
    merge_blocks(reader, x, D, y, u64(first_image) * L * E, E, channel - 2 * g, W, blockIdx.x % 4);
    cluster_sync();  // a block's shared memory must outlive its readers
#endif
}
