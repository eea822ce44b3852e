// SS2D forward for maps of any size, in three kernels; no warp waits for the state of another one.
//
// The map is cut into tiles of HIGH x WIDE positions. A run is a line of a tile: a row of it for the routes along rows, a
// column for those along columns.
//   summary  every run from a state of zero: the product of its decays and the state at its end
//   carry    along each route, from run to run: the state before every run, in place of the one at its end
//   merge    every run again from the state before it; the four routes of a tile meet in float32 in shared memory
// A lane owns two channels of one run and walks it in chunks of T positions; the four lanes that share two channels have
// four neighbouring runs. So nothing is joined across lanes, and summary and merge are one pass over a chunk each.
//
// Without columns (COLUMNS = 0) a map is one long line, which is folded into rows of WIDE positions.
//
// Compile-time parameters beside those of common.cuh: HIGH, WIDE (multiples of T and of 4), COLUMNS, RAGGED (1: a run
// may end within a chunk), AHEAD (what is loaded a chunk ahead: 1 projections, 2 x too), SEGMENTS (into which carry cuts
// a route), BLOCKS and SUMMARY_BLOCKS (that a multiprocessor should hold).

constexpr int PITCH = WIDE | 1;  // slots from row to row of a tile
constexpr int THREADS = 32 * WARPS;
constexpr int SUMMARY_WARPS = 8;  // two a route
constexpr int WORDS = 2 * TERMS * RANK_FRAGMENTS + 4;
static_assert(T % 2 == 0 && HIGH % T == 0 && WIDE % T == 0 && HIGH % 4 == 0 && WIDE % 4 == 0, "");

struct Shared {
    u32 steps[4][WORDS][32];  // what a lane needs of each route: weights, bias, decay
};

// A map as it is cut up: rows, columns, positions, tiles.
struct Map {
    u32 H, W, L, across, down;

    __device__ __forceinline__ Map(u32 height, u32 width) : H(height), W(width), L(height * width) {
        if (!COLUMNS) {
            W = WIDE;
            H = (L + WIDE - 1) / WIDE;
        }
        across = (W + WIDE - 1) / WIDE;
        down = (H + HIGH - 1) / HIGH;
    }

    __device__ __forceinline__ u32 runs(bool columns) const { return columns ? W * down : H * across; }

    // First of a route's runs, counted over all maps of 16 channels.
    __device__ __forceinline__ u64 first_run(u32 map, int route) const {
        const u32 rows = runs(false), others = runs(COLUMNS);
        return u64(map) * 2 * (u64(rows) + others) + (route & 1 ? 2 * u64(rows) : 0) +
               (route & 2 ? (route & 1 ? others : rows) : 0);
    }
};

// What a block works on, and the lane's part of it.
struct Task {
    u32 group, image, row, column;  // 16 channels; the tile's first position
    u32 rows, columns;              // of the tile, as far as the map goes
    int lane, channel, channel0, channel1;
    u32 x_stride, projected_stride, second;  // bytes a position; bytes from the lane's first channel to its second
    u64 x;                                   // address at this image and lane's channels

    // Channel groups of a tile are neighbours: they read the same projections.
    __device__ __forceinline__ Task(const Map& map, const u16* maps, int E, int thread_lane) : lane(thread_lane) {
        const u32 groups = u32(E + 15) / 16, tiles = map.across * map.down, rest = blockIdx.x / groups;
        const u32 tile = rest % tiles;
        group = blockIdx.x - rest * groups;
        image = rest / tiles;
        row = tile / map.across * HIGH;
        column = tile % map.across * WIDE;
        rows = min(u32(HIGH), map.H - row);
        columns = min(u32(WIDE), map.W - column);
        // Lanes without a channel of their own repeat the last one and write nothing.
        channel = int(group) * 16 + (lane >> 2) * 2;
        channel0 = min(channel, EVEN_E ? E - 2 : E - 1);
        channel1 = min(channel0 + 1, E - 1);
        second = 2 * (channel1 - channel0);
        x_stride = 2 * E;
        projected_stride = 2 * PROJECTED;
        pin(projected_stride);
        x = reinterpret_cast<u64>(maps + u64(image) * map.L * E + channel0);
        pin(x);
    }
};

// Four neighbouring runs, one a lane, walked in one direction.
template <bool DOWN, bool BACKWARDS>
struct Walk {
    static constexpr int SIGN = BACKWARDS ? -1 : 1;
    u32 line, run;  // which line of the tile this lane has, and which run of the layout in reading order
    bool own;       // lanes without a run repeat the last one and write nothing
    u32 start;      // first position of the run
    int limit;      // positions of it
    int chunks, along;

    __device__ __forceinline__ Walk(const Map& map, const Task& task, u32 quad) {
        const u32 lines = DOWN ? task.columns : task.rows, wanted = 4 * quad + (task.lane & 3);
        own = wanted < lines;
        line = min(wanted, lines - 1);
        start = DOWN ? task.row * map.W + task.column + line : (task.row + line) * map.W + task.column;
        limit = DOWN ? task.rows : task.columns;
        chunks = (limit + T - 1) / T;
        if (!COLUMNS) limit = min(u32(limit), map.L - start);
        run = DOWN ? (task.column + line) * map.down + task.row / HIGH
                   : (task.row + line) * map.across + task.column / WIDE;
        along = DOWN ? map.W : 1;
    }

    // Where in its run the walk begins; it goes on by SIGN.
    __device__ __forceinline__ int begin() const { return BACKWARDS ? chunks * T - 1 : 0; }
};

// What a lane reads, a chunk at a time: its own run of x, and of the projections a column of the products.
template <bool DOWN, bool BACKWARDS>
struct Reader {
    static constexpr int SIGN = BACKWARDS ? -1 : 1;
    u64 x, projected;  // addresses: of the next chunk, or RAGGED of the run's first position
    int x_step, projected_step;
    int place, limit, column_limit;  // RAGGED: where in its run the next chunk is, and what of the run there is

    // Column g of a product belongs to the run of lane g / 2, and odd ones to the position after.
    __device__ __forceinline__ Reader(const Map& map, const Task& task, const Walk<DOWN, BACKWARDS>& walk, int route,
                                      const u16* maps) {
        const int t = task.lane & 3, odd = task.lane >> 2 & 1;
        const int sign = RAGGED ? 1 : SIGN, first = RAGGED ? 0 : walk.begin();
        const u32 column = __shfl_sync(~0u, walk.start, task.lane >> 3);
        place = walk.begin();
        limit = walk.limit;
        column_limit = COLUMNS ? limit : __shfl_sync(~0u, limit, task.lane >> 3);
        x = at(task.x, walk.start + first * walk.along, task.x_stride);
        projected = at(projected_of(maps + u64(task.image) * map.L * PROJECTED, route, t),
                       column + (first + (RAGGED ? 0 : sign * odd)) * walk.along, task.projected_stride);
        x_step = sign * walk.along * int(task.x_stride);
        projected_step = sign * walk.along * int(task.projected_stride);
        pin(x);
        pin(projected);
    }

    // Positions past the end of a run read its last one: what is not finite there is so on the route from there on.
    __device__ __forceinline__ void fetch_x(u32 (&to)[T], u32 second) const {
#pragma unroll
        for (int i = 0; i < T; i++) {
            const int n = RAGGED ? min(place + SIGN * i, limit - 1) : i;
            to[i] = load_pair<EVEN_E>(step_on(x, n, x_step), second);
        }
    }

    __device__ __forceinline__ void fetch_projected(u32 (&to)[PRODUCTS][FRAGMENTS], int lane) const {
        const int first = place + SIGN * (lane >> 2 & 1);
#pragma unroll
        for (int j = 0; j < PRODUCTS; j++) {
            const int step = RAGGED ? min(first + SIGN * 2 * j, column_limit - 1) : 2 * j;
            load_operands(to[j], step_on(projected, step, projected_step), lane & 3);
        }
    }

    __device__ __forceinline__ void advance() {
        if (RAGGED) {
            place += SIGN * T;
        } else {
            x = step_on(x, T, x_step);
            projected = step_on(projected, T, projected_step);
        }
    }
};

// 2^-|v|; as one piece of assembly the sign costs nothing.
__device__ __forceinline__ float ex2_below(float v) {
    float r;
    asm("{.reg .f32 t; abs.f32 t, %1; neg.f32 t, t; ex2.approx.ftz.f32 %0, t;}" : "=f"(r) : "f"(v));
    return r;
}

// log2(1 + 2^v) by a polynomial, relative error 6e-5 or 9e-6, in place of the hardware's absolute 2^-22: special functions
// are what these kernels have least of. It takes steps of any size.
__device__ __forceinline__ float eased_step_size(float v) {
    const float e = ex2_below(v);
    float q;  // log2(1 + e) / e on [0, 1]
    if (OUT == 1) {
        q = fmaf(0.059651557356119156f, e, -0.22711950540542603f);
        q = fmaf(q, e, 0.4418988823890686f);
        q = fmaf(q, e, -0.7169874310493469f);
        q = fmaf(q, e, 1.4426132440567017f);
    } else {
        q = fmaf(-0.034435924142599106f, e, 0.14603295922279358f);
        q = fmaf(q, e, -0.30303630232810974f);
        q = fmaf(q, e, 0.4691741168498993f);
        q = fmaf(q, e, -0.7204262018203735f);
        q = fmaf(q, e, 1.4426828622817993f);
    }
    return fmaf(q, e, fmaxf(v, 0.f));
}

// From step sizes to decays and inputs, and the recurrence over a chunk from h on. KEPT: b becomes the states, otherwise
// the product of the decays is taken along.
template <bool KEPT>
__device__ __forceinline__ void scan_chunk(const float (&a)[T][2], float (&b)[T][2], const u32 (&x)[T],
                                           const float (&decay)[2], float (&product)[2], float (&h)[2]) {
#pragma unroll
    for (int i = 0; i < T; i++) {
        const float input[2] = {b[i][0] * unpack_low(x[i]), b[i][0] * unpack_high(x[i])};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float s = EXACT ? softplus2<EXACT>(a[i][k]) : eased_step_size(a[i][k]);
            const float factor = ex2(s * decay[k]);
            h[k] = fmaf(factor, h[k], s * input[k]);
            if (KEPT) b[i][k] = h[k];
            if (!KEPT) product[k] *= factor;
        }
    }
}

// Products of a chunk; past the end of a run the step is zero:
// such positions keep the state.
template <bool BACKWARDS>
__device__ __forceinline__ void project_chunk(const Step& step, const Selector& selector,
                                              const u32 (&raw)[PRODUCTS][FRAGMENTS], int place, int limit,
                                              float (&a)[T][2], float (&b)[T][2], float (&c)[T]) {
    project(step, selector, raw, a, b, c);
#pragma unroll
    for (int i = 0; i < T && RAGGED; i++) {
        if ((BACKWARDS ? place - i : place + i) >= limit) a[i][0] = a[i][1] = __int_as_float(0xff800000);
    }
}

// ---- summary ---------------------------------------------------------------------------------------------------------

template <bool DOWN, bool BACKWARDS>
__device__ __forceinline__ void summarise_run(Reader<DOWN, BACKWARDS> reader, const Task& task, int chunks,
                                              const Step& step, const Selector& selector, const float (&decay)[2],
                                              float (&product)[2], float (&h)[2]) {
    product[0] = product[1] = 1.f;
    h[0] = h[1] = 0.f;
    u32 raw[PRODUCTS][FRAGMENTS], next_x[T];
    reader.fetch_projected(raw, task.lane);
    if (AHEAD == 2) reader.fetch_x(next_x, task.second);
#pragma unroll 1
    for (int left = chunks; left > 0; left--) {
        float a[T][2], b[T][2], c[T];
        u32 x[T];
        if (AHEAD < 2) reader.fetch_x(next_x, task.second);
        project_chunk<BACKWARDS>(step, selector, raw, reader.place, reader.limit, a, b, c);
#pragma unroll
        for (int i = 0; i < T; i++) x[i] = next_x[i];
        if (left > 1) {
            reader.advance();
            reader.fetch_projected(raw, task.lane);
            if (AHEAD == 2) reader.fetch_x(next_x, task.second);
        }
        scan_chunk<false>(a, b, x, decay, product, h);
    }
}

// Runs of one route: every second four of the tile.
template <bool DOWN, bool BACKWARDS>
__device__ __forceinline__ void summarise(const Map& map, const Task& task, const u16* projected, int route,
                                          const Step& step, const Selector& selector, const float (&decay)[2],
                                          float* factors, float* states, u32 quad) {
    const u32 lines = DOWN ? task.columns : task.rows;
#pragma unroll 1
    for (; 4 * quad < lines; quad += SUMMARY_WARPS / 4) {
        const Walk<DOWN, BACKWARDS> walk(map, task, quad);
        const Reader<DOWN, BACKWARDS> reader(map, task, walk, route, projected);
        float product[2], h[2];
        summarise_run(reader, task, walk.chunks, step, selector, decay, product, h);
        if (walk.own) {
            const u64 place = u64(walk.run) * 16 + (task.lane >> 2) * 2;
            *reinterpret_cast<float2*>(factors + place) = make_float2(product[0], product[1]);
            *reinterpret_cast<float2*>(states + place) = make_float2(h[0], h[1]);
        }
    }
}

// Distance of the products from the states in the workspace.
__device__ __forceinline__ u64 workspace_half(const Map& map, int batch, int E) {
    return map.first_run(u32(batch) * (u32(E + 15) / 16), 0) * 16;
}

extern "C" __global__ void __launch_bounds__(32 * SUMMARY_WARPS, SUMMARY_BLOCKS)
    ss2d_forward_tiles_summary(const u16* __restrict__ x, const u16* __restrict__ projected,
                               const void* __restrict__ weight, const float* __restrict__ dt_bias,
                               const float* __restrict__ A, const float* __restrict__ D, void* y, float* workspace,
                               int batch, int H, int W, int E, int) {
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, route = warp & 3;
    const Map map(H, W);
    const Task task(map, x, E, lane);
    const u32 groups = u32(E + 15) / 16;
    float* states = workspace + map.first_run(task.image * groups + task.group, route) * 16;
    float* factors = states + workspace_half(map, batch, E);
    Step step;
    step.load(weight, dt_bias, route, E, task.channel0, task.channel1, lane & 3);
    const Selector selector(lane & 3);
    const float decay[2] = {A[route * E + task.channel0], A[route * E + task.channel1]};
    const u32 quad = warp >> 2;
    if (route == 0 || (!COLUMNS && route == 1)) {
        summarise<false, false>(map, task, projected, route, step, selector, decay, factors, states, quad);
    } else if (route == 2 || (!COLUMNS && route == 3)) {
        summarise<false, true>(map, task, projected, route, step, selector, decay, factors, states, quad);
    } else if (route == 1) {
        summarise<true, false>(map, task, projected, route, step, selector, decay, factors, states, quad);
    } else {
        summarise<true, true>(map, task, projected, route, step, selector, decay, factors, states, quad);
    }
}

// ---- carry -----------------------------------------------------------------------------------------------------------
// A block a route of 8 channels: a thread composes a segment of the runs, one a channel joins the segments, and then
// every thread goes through its segment again from the state before it.

constexpr int HELD = 18;  // runs of a segment that a thread keeps in registers

extern "C" __global__ void __launch_bounds__(8 * SEGMENTS)
    ss2d_forward_tiles_carry(const u16* __restrict__ x, const u16* __restrict__ projected,
                             const void* __restrict__ weight, const float* __restrict__ dt_bias,
                             const float* __restrict__ A, const float* __restrict__ D, void* y, float* workspace,
                             int batch, int H, int W, int E, int) {
    extern __shared__ __align__(128) char memory[];
    float2* ends = reinterpret_cast<float2*>(memory);  // product and state of a segment and channel
    const Map map(H, W);
    const u32 route = blockIdx.x >> 1 & 3, channel = threadIdx.x & 7, segment = threadIdx.x >> 3;
    const u32 runs = map.runs(COLUMNS && route & 1), share = (runs + SEGMENTS - 1) / SEGMENTS;
    const u32 first = min(segment * share, runs), last = min(first + share, runs);
    const int step = route & 2 ? -64 : 64;  // bytes
    const u32 start = route & 2 ? runs - 1 - first : first;
    float* states = workspace + (map.first_run(blockIdx.x >> 3, route) + start) * 16 + (blockIdx.x & 1) * 8 + channel;
    const u64 factors = workspace_half(map, batch, E) * 4;

    float product = 1.f, h = 0.f, factor[HELD], state[HELD];
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) {
#pragma unroll 1
        for (u32 n = first; n < last; n += HELD) {
            u64 here = step_on(reinterpret_cast<u64>(states), n - first, step);
            if (pass == 0 || share > HELD) {
#pragma unroll
                for (int i = 0; i < HELD; i++) {
                    factor[i] = 1.f;
                    state[i] = 0.f;
                    if (n + i < last) {
                        factor[i] = *reinterpret_cast<const float*>(step_on(here + factors, i, step));
                        state[i] = *reinterpret_cast<const float*>(step_on(here, i, step));
                    }
                }
            }
            pin(here);  // or every address would stay in registers
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                if (pass == 1 && n + i < last) *reinterpret_cast<float*>(step_on(here, i, step)) = h;
                h = fmaf(factor[i], h, state[i]);
                product *= factor[i];
            }
        }
        if (pass == 1) break;
        ends[segment * 8 + channel] = make_float2(product, h);
        __syncthreads();
        if (segment == 0) {
            h = 0.f;
#pragma unroll 8
            for (u32 i = 0; i < SEGMENTS; i++) {
                const float2 end = ends[i * 8 + channel];
                ends[i * 8 + channel].y = h;
                h = fmaf(end.x, h, end.y);
            }
        }
        __syncthreads();
        h = ends[segment * 8 + channel].y;
    }
}

// ---- merge -----------------------------------------------------------------------------------------------------------

// What a lane needs of a route, kept in shared memory for all warps.
__device__ __forceinline__ void put_step(u32 place, const Step& step, const float (&decay)[2]) {
#pragma unroll
    for (int i = 0; i < WORDS - 4; i++) {
        store_shared(place + 128 * i, step.part[i / 2 / TERMS][i / 2 % TERMS][i % 2]);
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        store_shared(place + 128 * (WORDS - 4 + k), __float_as_uint(step.accumulator[2 * k]));
        store_shared(place + 128 * (WORDS - 2 + k), __float_as_uint(decay[k]));
    }
}

__device__ __forceinline__ void get_step(u32 place, Step& step, float (&decay)[2]) {
#pragma unroll
    for (int i = 0; i < WORDS - 4; i++) {
        step.part[i / 2 / TERMS][i / 2 % TERMS][i % 2] = load_shared(place + 128 * i);
    }
    float bias[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        bias[k] = __uint_as_float(load_shared(place + 128 * (WORDS - 4 + k)));
        decay[k] = __uint_as_float(load_shared(place + 128 * (WORDS - 2 + k)));
    }
    mma_k8(step.accumulator, 0u, 0u, 0u, bias[0], bias[0], bias[1], bias[1]);  // see Step
}

// Where the sums of a chunk are. 16 sums of a position fill half of the banks; every second pair of rows, and of columns,
// the halves of a slot change places, so that four neighbouring lines lie in different quarters of the banks.
template <int STEP>
struct Slots {
    u32 even, odd;  // addresses for even and odd pairs of positions, less the steps to them

    __device__ __forceinline__ Slots(u32 base, u32 row, u32 column, int g) {
        even = base + (row * PITCH + column) * SLOT_BYTES + ((g * 8) ^ (((row >> 1) + (column >> 1)) & 1) * 32);
        odd = even ^ 32;
    }

    __device__ __forceinline__ u32 at(int i) const { return (i & 2 ? odd : even) + i * STEP; }

    __device__ __forceinline__ void advance() {
        const u32 before = even;
        even = (T & 2 ? odd : even) + T * STEP;
        odd = (T & 2 ? before : odd) + T * STEP;
    }
};

// The first to come at a tile's sums stores, the last one writes the result.
template <int LAYOUT, bool BACKWARDS>
__device__ __forceinline__ void merge_run(const Map& map, const Task& task, const Output& of_task, const u16* projected,
                                          const float* workspace, u32 steps, u32 sums,
                                          const Selector& selector, u32 quad) {
    constexpr bool DOWN = COLUMNS && LAYOUT, FIRST = !LAYOUT && !BACKWARDS, LAST = LAYOUT && BACKWARDS;
    constexpr int ROUTE = LAYOUT + 2 * BACKWARDS, SIGN = BACKWARDS ? -1 : 1;
    const Walk<DOWN, BACKWARDS> walk(map, task, quad);
    Reader<DOWN, BACKWARDS> reader(map, task, walk, ROUTE, projected);
    Output out = of_task;
    for (int k = 0; k < 2; k++) out.valid[k] = out.valid[k] && walk.own;
    const int g = task.lane >> 2;
    u32 raw[PRODUCTS][FRAGMENTS], next_x[T];
    reader.fetch_projected(raw, task.lane);
    if (AHEAD == 2) reader.fetch_x(next_x, task.second);
    const float2 before = *reinterpret_cast<const float2*>(workspace + map.first_run(0, ROUTE) * 16 +
                                                           u64(walk.run) * 16 + 2 * g);
    float decay[2], h[2] = {before.x, before.y};
    Step step;
    get_step(steps + ROUTE * WORDS * 128, step, decay);
    Slots<SIGN * SLOT_BYTES*(DOWN ? PITCH : 1)> slots(sums, DOWN ? walk.begin() : walk.line,
                                                       DOWN ? walk.line : walk.begin(), g);
    const int y_step = SIGN * walk.along * int(out.y_stride);
    u64 target = at(out.y, walk.start + walk.begin() * walk.along, out.y_stride);
#pragma unroll 1
    for (int left = walk.chunks; left > 0; left--) {
        const Reader<DOWN, BACKWARDS> here = reader;
        float a[T][2], b[T][2], c[T], product[2];
        u32 x[T];
        if (AHEAD < 2) reader.fetch_x(next_x, task.second);
        project_chunk<BACKWARDS>(step, selector, raw, here.place, here.limit, a, b, c);
#pragma unroll
        for (int i = 0; i < T; i++) x[i] = next_x[i];
        if (left > 1) {
            reader.advance();
            reader.fetch_projected(raw, task.lane);
            if (AHEAD == 2) reader.fetch_x(next_x, task.second);
        }
        scan_chunk<true>(a, b, x, decay, product, h);
        u32 own = walk.own;
        pin(own);  // or the assembler may make a second loop for lanes without a run
        constexpr int BATCH = 4;
#pragma unroll
        for (int i0 = 0; i0 < T; i0 += BATCH) {
            float2 sum[BATCH];
#pragma unroll
            for (int i = i0; i < i0 + BATCH && i < T; i++) {
                sum[i - i0] = make_float2(0.f, 0.f);
                if (!FIRST) sum[i - i0] = load_shared_float2(slots.at(i));
            }
#pragma unroll
            for (int i = i0; i < i0 + BATCH && i < T; i++) {
                float2& of = sum[i - i0];
                of.x = fmaf(c[i], b[i][0], of.x);
                of.y = fmaf(c[i], b[i][1], of.y);
                if (RAGGED && here.place + SIGN * i >= here.limit) continue;
                if (LAST) {
                    out.write_at(step_on(target, i, y_step), fmaf(out.skip[0], unpack_low(x[i]), LN2 * of.x),
                                 fmaf(out.skip[1], unpack_high(x[i]), LN2 * of.y));
                } else if (own) {
                    store_shared(slots.at(i), of);
                }
            }
        }
        slots.advance();
        if (LAST) target = step_on(target, T, y_step);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    ss2d_forward_tiles_merge(const u16* __restrict__ x, const u16* __restrict__ projected,
                             const void* __restrict__ weight, const float* __restrict__ dt_bias,
                             const float* __restrict__ A, const float* __restrict__ D, void* y,
                             const float* __restrict__ workspace, int batch, int H, int W, int E, int) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const u32 warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    const int lane = threadIdx.x & 31;
    const Map map(H, W);
    const Task task(map, x, E, lane);
    for (u32 route = warp; route < 4; route += WARPS) {
        Step step;
        step.load(weight, dt_bias, route, E, task.channel0, task.channel1, lane & 3);
        const float decay[2] = {A[route * E + task.channel0], A[route * E + task.channel1]};
        put_step(shared_address(&shared.steps[route][0][lane]), step, decay);
    }
    Output out;
    out.y_stride = (OUT == 0 ? 4 : 2) * E;
    out.y = reinterpret_cast<u64>(y) + (u64(task.image) * map.L * E + task.channel) * (OUT == 0 ? 4 : 2);
    pin(out.y);
    out.valid[0] = task.channel < E;
    out.valid[1] = task.channel + 1 < E;
    const u32 groups = u32(E + 15) / 16, steps = shared_address(&shared.steps[0][0][lane]);
    const u32 sums = shared_address(memory) + sizeof(Shared);
    workspace += map.first_run(task.image * groups + task.group, 0) * 16;
    const Selector selector(lane & 3);
    __syncthreads();
#pragma unroll 1
    for (u32 quad = warp; 4 * quad < task.rows; quad += WARPS) {
        merge_run<0, false>(map, task, out, projected, workspace, steps, sums, selector, quad);
        merge_run<0, true>(map, task, out, projected, workspace, steps, sums, selector, quad);
    }
    out.set_skip(D, E, task.channel0, task.channel1);
    __syncthreads();
    const u32 lines = COLUMNS ? task.columns : task.rows;
#pragma unroll 1
    for (u32 quad = warp; 4 * quad < lines; quad += WARPS) {
        merge_run<1, false>(map, task, out, projected, workspace, steps, sums, selector, quad);
        merge_run<1, true>(map, task, out, projected, workspace, steps, sums, selector, quad);
    }
}
