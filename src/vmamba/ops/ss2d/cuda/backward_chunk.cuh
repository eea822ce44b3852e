// Backward of SS2D with one state per channel. common.cuh and backward_tools.cuh come before this text.
//
// A layout (rows, then columns) is cut into segments, one for each t = lane % 4 of every warp: a lane takes channels
// 2 g, 2 g + 1 (g = lane / 4) through its segment, T neighbouring positions ("piece") at a time, so that both
// recurrences run in registers and no lane waits for another. What a warp does at once, pieces of four segments, is a
// "chunk". The two routes of a layout share what is loaded. "Ascending" and "descending" are directions along the
// layout: on a reversed route the state descends and its adjoint ascends.
// Step inputs and states are kept in base 2: Δ = ln 2 · step, h = ln 2 · state.
//
// Compile-time parameters beside those of common.cuh:
//   DY32       1: dy is float32, 0: it has the 16-bit type
//   TEAM       1: the warps of a block share one map, 0: each warp has a map (of another channel block) to itself
//   SPILL      1: the merged map and the carries do not fit in shared memory and lie in a workspace
//   ORDERED    1: sums over blocks are taken in a fixed order
//   REVERSED   1: the second route of a layout runs backwards, 0: forwards ("unidi")
//   STASH      1: sums of the gradient of dt_weight lie in shared memory, 0: in registers
//   THREADS, BLOCKS   launch bounds
// SPAN is 4, 8, or 7, which divides the maps of a 224 x 224 image; the eighth slot of a piece is then void.

constexpr int SLOTS = (T + 3) / 4 * 4;  // of a piece
constexpr int DUOS = SLOTS / 2;         // pairs of slots, a tensor core's tile each
constexpr int CHUNK = 4 * SLOTS;        // slots of a chunk
constexpr bool NARROW = BF16 && WEIGHT16;  // the gradient of the weights is rounded to bfloat16, so its operands may be
constexpr int TERMS = WEIGHT16 ? 1 : BF16 ? 3 : 2;  // 16-bit parts of a weight in the step input
constexpr int BACK_TERMS = NARROW ? 1 : 2;          // bfloat16 parts of it in the gradient of the ranks
constexpr int PARTS = BF16 ? 1 : 2;                 // and of what is multiplied by it: float16 has three bits more
constexpr int STEP_TILES = (RANK + 15) / 16;        // k = 16 operands that cover the ranks
constexpr int OUT_TILES = (ROW + 15) / 16;          // m = 16 results that cover a route's share
constexpr bool KEEP_RANKS = FRAGMENTS <= 2;         // whether there are registers to hold and prefetch them
// Operands of 16 channels of one route, 16 bytes a lane each: weights by channel, by rank, selectors of B and C,
// constants.
constexpr int BACK = STEP_TILES * TERMS;
constexpr int SELECT = BACK + STEP_TILES * BACK_TERMS;
constexpr int CONSTANTS = SELECT + (RANK + 1) / 16 - RANK / 16 + 1;
constexpr int ITEMS = CONSTANTS + 2;
// In shared memory a lane's constants, the same for all t, take 16 bytes for each g: bias and A, then the bias' rest.
constexpr int OPERANDS = CONSTANTS * 32 + 16;

struct Problem {
    const u16* x;          // (B, L, E)
    const void* dy;        // (B, L, E)
    const u16* projected;  // (B, L, 4, ROW)
    const uint4* packed;   // (4, channel blocks, ITEMS, 32)
    const float* D;        // (4, E)
    u16* dx;               // (B, L, E)
    float* dprojected;     // (B, 4, ROW, chunks, 32), slots of a chunk as `emit` writes them
    float* dweight;        // (4, E, RANK)
    float* dbias;          // (4, E)
    float* dA;             // (4, E)
    float* dD;             // (4, E)
    float* workspace;      // of a team: what pieces start from, (2, chunks, 32, 4); SPILL: and its merged map, (L, 16)
    u32* turns;            // the next map to take; ORDERED: (2, channel blocks), (B, 2, chunks); all zero
    int length, channels, channel_blocks, chunks;
    int images, maps, pieces;    // maps: what blocks take, over all; pieces of a segment
    int height, width, columns;  // columns: whether the second layout is by columns
};

// ---- what a chunk reads ---------------------------------------------------------------------------------------------

struct Layout {              // step s of a layout -> position of the map
    u32 line, stride, wrap;  // steps of a line, distance of two neighbours on it, and from its end to the next
    bool columns, straight;      // straight: a piece, which starts at a multiple of T, never leaves its line
    Fold fold;

    __device__ __forceinline__ Layout(bool by_columns, u32 height, u32 width)
        : line(by_columns ? height : 0x40000000u),
          stride(by_columns ? width : 1u),
          wrap(by_columns ? 1u - height * width : 0u),
          columns(by_columns),
          straight(!by_columns || height % T == 0),
          fold(height) {}

    __device__ __forceinline__ u32 start(u32 step) const {
        u32 column = 0, row = step;
        if (columns) fold.split(step, column, row);
        return row * stride + column;
    }

    // Positions of steps first, first + BY, ...; a piece touches at most two lines if a line is as long.
    template <int BY, int COUNT>
    __device__ __forceinline__ void positions(u32 first, u32 (&position)[COUNT]) const {
        u32 column = 0, row = first;
        if (columns) fold.split(first, column, row);
        const u32 start = row * stride + column;
        const int left = line - row;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            position[i] = start + i * BY * stride;
            if (i * BY >= left) position[i] += wrap;
        }
        if (line < T) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                fold.split(first + i * BY, column, row);
                position[i] = row * stride + column;
            }
        }
    }
};

#if DY32
struct Pair {
    float low, high;
    __device__ __forceinline__ float get(int c) const { return c ? high : low; }
};
#else
struct Pair {
    u32 raw;
    __device__ __forceinline__ float get(int c) const { return c ? unpack_high(raw) : unpack_low(raw); }
};
#endif

// `valid`: how many of the lane's two channels exist.
__device__ __forceinline__ u32 load_x(const char* p, int valid) {
#if FULL_E
    return load_once(p);
#elif EVEN_E
    return valid > 0 ? load_once(p) : 0u;
#else
    const u16* q = reinterpret_cast<const u16*>(p);
    return (valid > 0 ? u32(__ldg(q)) : 0u) | (valid > 1 ? u32(__ldg(q + 1)) << 16 : 0u);
#endif
}

__device__ __forceinline__ Pair load_dy(const char* p, int valid) {
    Pair pair;
#if DY32
    const float* q = reinterpret_cast<const float*>(p);
#if EVEN_E
    const float2 v = valid > 0 ? __ldg(reinterpret_cast<const float2*>(q)) : make_float2(0.f, 0.f);
    pair.low = v.x;
    pair.high = v.y;
#else
    pair.low = valid > 0 ? __ldg(q) : 0.f;
    pair.high = valid > 1 ? __ldg(q + 1) : 0.f;
#endif
#else
    pair.raw = load_x(p, valid);
#endif
    return pair;
}

__device__ __forceinline__ const char* at(const char* base, u32 position, u32 stride) {
    return reinterpret_cast<const char*>(at(reinterpret_cast<u64>(base), position, stride));
}

struct Source {  // of a lane, within one image
    const char *x, *dy;
    const char* projected;  // of the pass's first route, with the lane's place in an operand
    u32 x_row, dy_row;      // bytes from a position to the next
    int length, valid;

    int segment;            // positions of a segment

    __device__ __forceinline__ int first(int warp, int t, int piece) const {
        return (4 * warp + t) * segment + piece * T;
    }
};

// A piece. Slots past the end of the map read its last position again; `Steps` makes sure that this has no effect.
struct Inputs {
    u32 x[T];
    Pair dy[T];
    u32 place[T];          // in the merged map, bytes
    u32 rank_position[DUOS];  // of the slots whose projections this lane loads
    int left;              // slots that exist, or a number past T
    bool cut;              // whether some lane of the warp has fewer than T

    __device__ __forceinline__ void load(const Source& source, const Layout& layout, int warp, int piece, int lane) {
        const int g = lane >> 2, t = lane & 3, first = source.first(warp, t, piece),
                  rank_first = source.first(warp, g >> 1, piece) + (g & 1);
        u32 position[T];
        if (layout.straight) {
            const u32 start = layout.start(first);
            const u32 other = __shfl_sync(0xffffffffu, start, g >> 1) + (g & 1) * layout.stride;
#pragma unroll
            for (int i = 0; i < T; i++) position[i] = start + i * layout.stride;
#pragma unroll
            for (int j = 0; j < DUOS; j++) rank_position[j] = other + 2 * j * layout.stride;
        } else {
            layout.positions<1>(first, position);
            layout.positions<2>(rank_first, rank_position);
        }
        left = source.length - first;
        cut = source.first(warp, 3, piece) + T > source.length;
        if (T == 7 && (g & 1)) rank_position[DUOS - 1] = rank_position[DUOS - 2];  // the void slot
        if (cut) {
#pragma unroll
            for (int i = 0; i < T; i++) position[i] = i < left ? position[i] : source.length - 1;
#pragma unroll
            for (int j = 0; j < DUOS; j++) {
                rank_position[j] = rank_first + 2 * j < source.length ? rank_position[j] : source.length - 1;
            }
        }
#pragma unroll
        for (int i = 0; i < T; i++) {
            x[i] = load_x(at(source.x, position[i], source.x_row), source.valid);
            dy[i] = load_dy(at(source.dy, position[i], source.dy_row), source.valid);
            const u32 offset = position[i] * 64 + g * 8;
            place[i] = offset ^ (offset >> 2 & 32);  // spread over the banks
        }
    }
    __device__ __forceinline__ float channel(int c, int i) const { return c ? unpack_high(x[i]) : unpack_low(x[i]); }
};

// Operand `tile` of column g of product j: two neighbouring entries of that position's share of `projected`.
__device__ __forceinline__ u32 load_rank(const Inputs& in, const char* projected, int tile, int j, int t) {
    const u16* p = reinterpret_cast<const u16*>(at(projected, in.rank_position[j], 2 * PROJECTED)) + 8 * tile;
    const int slot = 8 * tile + 2 * t;
    if (ROW % 2 == 0) {
        if (8 * tile + 8 > ROW && slot >= ROW) return 0u;
        return KEEP_RANKS ? load_once(reinterpret_cast<const char*>(p)) : __ldg(reinterpret_cast<const u32*>(p));
    }
    return (slot < ROW ? u32(__ldg(p)) : 0u) | (slot + 1 < ROW ? u32(__ldg(p + 1)) << 16 : 0u);
}

struct Ranks {
    u32 raw[FRAGMENTS][DUOS];

    __device__ __forceinline__ void load(const Inputs& in, const char* projected, int t) {
#pragma unroll
        for (int tile = 0; tile < FRAGMENTS; tile++) {
#pragma unroll
            for (int j = 0; j < DUOS; j++) raw[tile][j] = load_rank(in, projected, tile, j, t);
        }
    }
};

// Asks for what `load_rank` will read: one of the 32 positions a lane, one route.
__device__ __forceinline__ void prefetch_ranks(const Inputs& in, const char* projected, int t) {
    const u32 position = t & 2 ? (t & 1 ? in.rank_position[3] : in.rank_position[2])
                               : (t & 1 ? in.rank_position[1] : in.rank_position[0]);
    const char* p = projected + u64(position) * u32(2 * PROJECTED) - 4 * t;
    asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
    asm volatile("prefetch.global.L1 [%0];" ::"l"(p + 2 * ROW - 2));
}

// ---- step sizes -----------------------------------------------------------------------------------------------------

struct Steps {
    float d[DUOS][4];   // -log2(e) times this and `bias` make the step input, negated, of two channels at two slots
    float bc[DUOS][4];  // B of these slots, then C
    float bias[2], A[2];

    __device__ __forceinline__ void compute(const Ranks& ranks, const uint4* packed, const InputOutputSelector& select,
                                            Inputs& in, int lane) {
        constexpr int I = RANK / 8;
        const float4* shared = reinterpret_cast<const float4*>(packed - lane) + CONSTANTS * 32 + (lane >> 2);
        const float4 constants = shared[0], rest = shared[8];
        bias[0] = constants.x;
        bias[1] = constants.y;
        A[0] = constants.z;
        A[1] = constants.w;
        float fine[DUOS][4];
#pragma unroll
        for (int j = 0; j < DUOS; j++) {
            if (RANK % 8 == 7) {
                product(bc[j], select.b, 0u, 0u, select.c, ranks.raw[I][j], ranks.raw[FRAGMENTS - 1][j]);
            } else {
                product(bc[j], select.b, select.c, ranks.raw[I][j]);
            }
        }
#pragma unroll
        for (int i = 0; i < BACK; i++) {  // the leading parts have sums of their own, which are rounded least
            const uint4 w = packed[i * 32];
            const int tile = 2 * (i % STEP_TILES);
            constexpr int MOST = RANK_FRAGMENTS - 1;
            constexpr int LAST = TERMS > 1 ? STEP_TILES : 0;  // what the bias' rest is added to
#pragma unroll
            for (int j = 0; j < DUOS; j++) {
                float (&sum)[4] = i < STEP_TILES ? d[j] : fine[j];
                const u32 first = ranks.raw[tile][j], second = ranks.raw[min(tile + 1, MOST)][j];
                if (i == LAST) {
                    if (tile < MOST) {
                        mma_k16(sum, w.x, w.y, w.z, w.w, first, second, rest.x, rest.y, rest.z, rest.w);
                    } else {
                        mma_k8(sum, w.x, w.y, first, rest.x, rest.y, rest.z, rest.w);
                    }
                } else if (i == 0) {
                    if (tile < MOST) {
                        product(sum, w.x, w.y, w.z, w.w, first, second);
                    } else {
                        product(sum, w.x, w.y, first);
                    }
                } else if (tile < MOST) {
                    add_product(sum, w.x, w.y, w.z, w.w, first, second);
                } else {
                    add_product(sum, w.x, w.y, first);
                }
            }
        }
        if (TERMS > 1) {
#pragma unroll
            for (int j = 0; j < 4 * DUOS; j++) d[j / 4][j % 4] += fine[j / 4][j % 4];
        }
        if (in.cut) {  // a step of zero leaves the state as it is, C = 0 the adjoint
#pragma unroll
            for (int i = 0; i < T; i++) {
                if (i >= in.left) {
                    d[i / 2][i % 2] = d[i / 2][2 + i % 2] = -1e4f;
                    bc[i / 2][2 + i % 2] = 0.f;
                    in.x[i] = 0u;
                }
            }
        }
    }
    // Of the step, negated, in base 2.
    __device__ __forceinline__ float input(int c, int i) const {
        return fmaf(d[i / 2][2 * c + i % 2], -LOG2E, bias[c]);
    }
    __device__ __forceinline__ float B(int i) const { return bc[i / 2][i % 2]; }
    __device__ __forceinline__ float C(int i) const { return bc[i / 2][2 + i % 2]; }
};

// ---- the two recurrences over a piece -------------------------------------------------------------------------------
// state <- decay state + step B x;  adjoint <- decay (adjoint + C dy), which a position hands to the one before.

// log2(1 + 2^-u). The hardware logarithm is good to 2^-22 absolute, too little where steps are small: hence a
// polynomial, log2(1 + e) / e on [0, 1] with relative error 3e-8.
__device__ __forceinline__ float soft_step(float u) {
    const float e = ex2(__uint_as_float(__float_as_uint(u) | 0x80000000u));  // one instruction, unlike -fabsf(u)
    float q = 0.00754918184f;
    q = fmaf(q, e, -0.0425670595f);
    q = fmaf(q, e, 0.112856187f);
    q = fmaf(q, e, -0.197118962f);
    q = fmaf(q, e, 0.275641407f);
    q = fmaf(q, e, -0.358408471f);
    q = fmaf(q, e, 0.480692953f);
    q = fmaf(q, e, -0.721340208f);
    q = fmaf(q, e, 1.442695f);
    return fmaf(q, e, fmaxf(-u, 0.f));
}

// The hardware's exponential is 1.8e-8 low on average where decays are slow (benchmarks/special_functions.py), and a
// state has hundreds of them in it. Added in the exponent that costs nothing.
constexpr float EX2_BIAS = 2.6e-8f;

__device__ __forceinline__ float decay_of(float step, float A) { return ex2(fmaf(step, A, EX2_BIAS)); }

struct Affine {  // of a piece, or of more: carry -> product carry + ascending (or descending)
    float product, ascending, descending;
};

// The two neighbours a < b, given which of them is `own`: carry through both.
__device__ __forceinline__ Affine compose(const Affine& own, const Affine& other, bool own_is_later) {
    const float up = fmaf(own.product, other.ascending, own.ascending),
                up2 = fmaf(other.product, own.ascending, other.ascending);
    const float down = fmaf(other.product, own.descending, other.descending);
    const float down2 = fmaf(own.product, other.descending, own.descending);
    return {own.product * other.product, own_is_later ? up : up2, own_is_later ? down : down2};
}

struct Join {                // over the four segments of a channel in a warp
    Affine near, pair, far;  // the neighbour, this lane with it, the other two

    __device__ __forceinline__ explicit Join(const Affine& own, int t) {
        near = {from_lane(own.product, 1), from_lane(own.ascending, 1), from_lane(own.descending, 1)};
        pair = compose(own, near, t & 1);
        far = {from_lane(pair.product, 2), from_lane(pair.ascending, 2), from_lane(pair.descending, 2)};
    }
    __device__ __forceinline__ Affine total(int t) const { return compose(pair, far, t & 2); }
    __device__ __forceinline__ float ascending(float carry, int t) const {
        const float past_far = fmaf(far.product, carry, far.ascending);
        carry = t & 2 ? past_far : carry;
        const float past_near = fmaf(near.product, carry, near.ascending);
        return t & 1 ? past_near : carry;
    }
    __device__ __forceinline__ float descending(float carry, int t) const {
        const float past_far = fmaf(far.product, carry, far.descending);
        carry = t & 2 ? carry : past_far;
        const float past_near = fmaf(near.product, carry, near.descending);
        return t & 1 ? carry : past_near;
    }
};

// Takes a lane's run through a piece, upwards: one recurrence goes along, the other one's effect is summed up.
template <bool REVERSE>
__device__ __forceinline__ void summarize(const Steps& s, const Inputs& in, Affine (&run)[2]) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float before = 1.f;  // the decay of the position before: the adjoint is handed on undecayed
#pragma unroll
        for (int i = 0; i < T; i++) {
            const float step = soft_step(s.input(c, i)), decay = decay_of(step, s.A[c]);
            const float input = step * (s.B(i) * in.channel(c, i)), drive = s.C(i) * in.dy[i].get(c);
            if (REVERSE) {
                run[c].ascending = i ? fmaf(before, run[c].ascending, drive) : run[c].ascending + drive;
                run[c].descending = fmaf(run[c].product, input, run[c].descending);
                run[c].product *= decay;
                before = decay;
            } else {
                run[c].ascending = fmaf(decay, run[c].ascending, input);
                run[c].product *= decay;
                run[c].descending = fmaf(run[c].product, drive, run[c].descending);
            }
        }
        if (REVERSE) run[c].ascending *= before;
    }
}

// ---- gradients ------------------------------------------------------------------------------------------------------

struct Sums {  // over positions, of one route
    float weight[STASH ? 1 : RANK_FRAGMENTS][4];
    float A[2], bias[2];
    float4* stash;  // (RANK_FRAGMENTS, 32) in shared memory: `weight`, where ranks are too many for registers

    __device__ __forceinline__ void begin(float4* place) {
#pragma unroll
        for (int c = 0; c < 2; c++) A[c] = bias[c] = 0.f;
        stash = place;
#pragma unroll
        for (int tile = 0; tile < RANK_FRAGMENTS; tile++) {
            if (STASH) {
                stash[tile * 32] = make_float4(0.f, 0.f, 0.f, 0.f);
            } else {
                for (int i = 0; i < 4; i++) weight[tile][i] = 0.f;
            }
        }
    }
    __device__ __forceinline__ void get(int tile, float (&sum)[4]) const {
        if (STASH) {
            const float4 v = stash[tile * 32];
            sum[0] = v.x;
            sum[1] = v.y;
            sum[2] = v.z;
            sum[3] = v.w;
        } else {
            for (int i = 0; i < 4; i++) sum[i] = weight[tile][i];
        }
    }
    __device__ __forceinline__ void put(int tile, const float (&sum)[4]) {
        if (STASH) {
            stash[tile * 32] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        } else {
            for (int i = 0; i < 4; i++) weight[tile][i] = sum[i];
        }
    }
};

struct Products {            // summed over channels by the tensor cores
    float step_input[2][SLOTS];  // gradient of the step input
    u32 narrow[2][DUOS];        // pairs of it in bfloat16
    float B[SLOTS], C[SLOTS];        // of the lane's two channels
};

// From what enters a piece from below and from above to its gradients; `above` becomes what enters the next one.
template <bool REVERSE>
__device__ __forceinline__ void adjoint_scan(const Steps& s, const Inputs& in, const float (&below)[2],
                                             float (&above)[2], const char* merged, float (&dx)[2][T], Sums& sums,
                                             Products& out) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float step[T], decay[T], slope[T], held[T];
#pragma unroll
        for (int i = 0; i < T; i++) {
            const float u = s.input(c, i);
            step[i] = soft_step(u);
            decay[i] = decay_of(step[i], s.A[c]);
            slope[i] = rcp(1.f + ex2(u));  // the sigmoid of the step input
        }
        float state = REVERSE ? above[c] : below[c], gradient = REVERSE ? below[c] : above[c];
#pragma unroll
        for (int n = 0; n < T; n++) {
            const int i = REVERSE ? T - 1 - n : n;
            held[i] = decay[i] * state;
            state = fmaf(step[i], s.B(i) * in.channel(c, i), held[i]);
            out.C[i] = c ? fmaf(in.dy[i].get(c), state, out.C[i]) : in.dy[i].get(c) * state;
        }
#pragma unroll
        for (int n = 0; n < T; n++) {
            const int i = REVERSE ? n : T - 1 - n, previous = n == 0 ? i : REVERSE ? i - 1 : i + 1;
            const float2& before = *reinterpret_cast<const float2*>(merged + in.place[i]);
            const float drive = s.C(i) * in.dy[i].get(c);
            gradient = n ? fmaf(decay[previous], gradient, drive) : gradient + drive;
            const float weighted = gradient * step[i];
            out.B[i] = c ? fmaf(weighted, in.channel(c, i), out.B[i]) : weighted * in.channel(c, i);
            dx[c][i] = fmaf(s.B(i), weighted, c ? before.y : before.x);
            sums.A[c] = fmaf(weighted, held[i], sums.A[c]);
            const float d = gradient * slope[i] * fmaf(s.A[c] * LN2, held[i], s.B(i) * in.channel(c, i));
            sums.bias[c] += d;
            out.step_input[c][i] = d;
        }
        above[c] = REVERSE ? state : decay[0] * gradient;
        if (T == 7) out.step_input[c][SLOTS - 1] = out.B[SLOTS - 1] = out.C[SLOTS - 1] = 0.f;
#pragma unroll
        for (int j = 0; j < DUOS; j++)
            out.narrow[c][j] = pack_bf16(out.step_input[c][2 * j], out.step_input[c][2 * j + 1]);
    }
}

__device__ __forceinline__ u32 by_position(const Ranks& ranks, const Inputs& in, const char* projected, int tile, int j,
                                           int t) {
    return transpose8(KEEP_RANKS ? ranks.raw[tile][j] : load_rank(in, projected, tile, j, t));
}

// The gradient of dt_weight: step input gradients (16 channels x 32 positions) times ranks (32 positions x RANK).
__device__ __forceinline__ void add_weight_gradient(const Products& out, const Ranks& ranks, const Inputs& in,
                                                    const char* projected, int t, Sums& sums) {
#pragma unroll
    for (int tile = 0; tile < RANK_FRAGMENTS; tile++) {
        float sum[4];
        sums.get(tile, sum);
        if (NARROW) {
#pragma unroll
            for (int j = 0; j < DUOS; j += 2) {
                mma_bf16(sum, out.narrow[0][j], out.narrow[1][j], out.narrow[0][j + 1],
                         out.narrow[1][j + 1], by_position(ranks, in, projected, tile, j, t),
                         by_position(ranks, in, projected, tile, j + 1, t));
            }
            sums.put(tile, sum);
            continue;
        }
        float high_sum[4] = {}, low_sum[4] = {};
#pragma unroll
        for (int j = 0; j < DUOS; j++) {  // two tf32 parts carry the gradient; a rank is one exactly
            const u32 pair = by_position(ranks, in, projected, tile, j, t);
            const u32 b0 = __float_as_uint(unpack_low(pair)), b1 = __float_as_uint(unpack_high(pair));
            u32 high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {  // the rest has either sign, so that cutting it off has no bias
                const float v = out.step_input[i & 1][2 * j + (i >> 1)];
                high[i] = nearest_tf32(v);
                low[i] = __float_as_uint(v - __uint_as_float(high[i])) & 0xffffe000u;
            }
            mma_tf32(low_sum, low[0], low[1], low[2], low[3], b0, b1);
            mma_tf32(high_sum, high[0], high[1], high[2], high[3], b0, b1);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += high_sum[i] + low_sum[i];
        sums.put(tile, sum);
    }
}

// What `emit` multiplies: operands whose inner dimension is channels, of the products j (positions 2 j, 2 j + 1).
struct ByChannel {
    u32 input[DUOS][2][PARTS];  // gradients of the step input, of the even and the odd channels
    u32 sum[DUOS][2][PARTS];    // for B and for C

    __device__ __forceinline__ static void turn(u32 (&part)[PARTS], float a, float b, u32 rounded) {
        part[0] = transpose8(rounded);
        if (PARTS == 2) {
            const float ra = a - __uint_as_float(rounded << 16), rb = b - __uint_as_float(rounded & 0xffff0000u);
            part[PARTS - 1] = transpose8(pack_bf16(ra, rb));
        }
    }
    __device__ __forceinline__ explicit ByChannel(const Products& out) {
#pragma unroll
        for (int j = 0; j < DUOS; j++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                turn(input[j][c], out.step_input[c][2 * j], out.step_input[c][2 * j + 1], out.narrow[c][j]);
            }
            turn(sum[j][0], out.B[2 * j], out.B[2 * j + 1], pack_bf16(out.B[2 * j], out.B[2 * j + 1]));
            turn(sum[j][1], out.C[2 * j], out.C[2 * j + 1], pack_bf16(out.C[2 * j], out.C[2 * j + 1]));
        }
    }
};

// Adds the gradients of one route's ranks, B and C at 32 positions; `destination` is this lane's place in row g.
__device__ __forceinline__ void emit(const ByChannel& turned, const uint4* packed, float* destination, u64 row_stride,
                                     int g) {
#pragma unroll
    for (int half = 0; half < SLOTS / 4; half++) {
#pragma unroll
        for (int tile = 0; tile < OUT_TILES; tile++) {
            float d[2][4] = {};
#pragma unroll
            for (int term = 0; term < (tile < STEP_TILES ? BACK_TERMS : 0); term++) {
                const uint4 w = packed[(BACK + tile * BACK_TERMS + term) * 32];
#pragma unroll
                for (int k = 0; k < 2 * PARTS; k++) {
                    const int e = k % 2, j = 2 * half + e, part = k / 2;
                    if (term + part < 2) {
                        mma_bf16(d[e], w.x, w.y, w.z, w.w, turned.input[j][0][part], turned.input[j][1][part]);
                    }
                }
            }
            if (tile == RANK / 16 || tile == (RANK + 1) / 16) {
                const uint4 w = packed[(SELECT + tile - RANK / 16) * 32];
#pragma unroll
                for (int k = 0; k < 2 * PARTS; k++) {
                    const int e = k % 2, j = 2 * half + e, part = k / 2;
                    mma_bf16(d[e], w.x, w.y, w.z, w.w, turned.sum[j][0][part], turned.sum[j][1][part]);
                }
            }
            const int row = 16 * tile + g;
            float* p = destination + 16 * tile * row_stride + 16 * half;
            if (16 * tile + 8 <= ROW || row < ROW) add_global4(p, d[0][0], d[0][1], d[1][0], d[1][1]);
            if (16 * tile + 8 < ROW && (16 * tile + 16 <= ROW || row + 8 < ROW)) {
                add_global4(p + 8 * row_stride, d[0][2], d[0][3], d[1][2], d[1][3]);
            }
        }
    }
}
