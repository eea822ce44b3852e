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
//   SPILL      1: the merged map lies in a workspace, 0: in shared memory
//   CLUSTER    blocks that share a map
//   HELD       layouts whose operands are in shared memory at once
//   STAGES     chunks staged at once: 1, or 2 with the next one's copies a whole chunk ahead
//   STAGE_BYTES  shared memory of a staged chunk
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
constexpr int BACK_TERMS = BF16 ? 1 : 2;          // bfloat16 parts of it in the gradient of the ranks
constexpr int PARTS = BF16 ? 1 : 2;                 // and of what is multiplied by it: float16 has three bits more
constexpr int STEP_TILES = (RANK + 15) / 16;        // k = 16 operands that cover the ranks
constexpr int OUT_TILES = (ROW + 15) / 16;          // m = 16 results that cover a route's share
// A chunk is staged in shared memory by 16-byte copies, a chunk ahead. A route's share of `projected` starts at any
// multiple of 4 bytes, so what is copied are the 16-byte units that cover it.
constexpr bool COPY_RANKS = ROW % 2 == 0;
constexpr int share_start(int route) { return COPY_RANKS ? 2 * ROW * route : 0; }  // of a row, in bytes
constexpr int count_units() {
    int most = 0;
    for (int k = 0; k < 4; k++) {
        const int units = (share_start(k) % 16 + 2 * ROW + 15) / 16;
        most = units > most ? units : most;
    }
    return most;
}
constexpr int UNITS = count_units();
constexpr int RANK_PITCH = (UNITS | 1) * 16;  // of a slot; an odd number of units keeps eight slots on different banks
constexpr int DY_PITCH = DY32 ? 64 : 32;
constexpr int STAGE_DY = CHUNK * 32, STAGE_RANKS = STAGE_DY + CHUNK * DY_PITCH;
constexpr int STAGE_NOTES = STAGE_RANKS + 2 * CHUNK * RANK_PITCH;
constexpr int STAGE_MERGED = STAGE_NOTES + 1024;
constexpr int STAGE = STAGE_MERGED + (SPILL ? CHUNK * 64 : 0);
static_assert(STAGE == STAGE_BYTES, "the Python side allocates as much");
constexpr u32 VOID = 0x80000000u;  // marks a slot past the end
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
    const float* skip;     // (16 channel blocks): D, over routes
    u16* dx;               // (B, L, E)
    float* dprojected;     // (B, 4, ROW, chunks, 32), slots of a chunk as `emit` writes them
    float* dweight;        // (4, channel blocks, RANK_FRAGMENTS, 32, 4), as lanes hold them
    double* sums;          // (4, channel blocks, 8, 4): gradients of dt_bias and A (over ln2^2) of two channels; D's, (E)
    float* workspace;      // of a team: what pieces start from, (2, chunks, 32, 4); SPILL: and its merged map, (L, 16)
    u32* turns;            // the next map to take; ORDERED: (2, channel blocks), (B, 2, chunks); all zero
    int length, channels, channel_blocks, chunks;
    int images, maps, pieces;    // maps: what blocks take, over all; pieces of a segment
    int height, width, columns;  // columns: whether the second layout is by columns
    u32 magic;                   // of Fold(height)
};

// ---- what a chunk reads ---------------------------------------------------------------------------------------------

struct Layout {  // step s of a layout -> position of the map
    u32 width;
    bool columns;
    Fold fold;

    __device__ __forceinline__ Layout(bool by_columns, u32 height, u32 width, u32 magic)
        : width(width), columns(by_columns), fold(height, magic) {}

    __device__ __forceinline__ u32 position(u32 step) const {
        u32 column = 0, row = step;
        if (!columns) return step;
        fold.split(step, column, row);
        return row * width + column;
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

struct Source {  // of a warp, within one image and one block of channels
    const char *x, *dy, *projected;
    u32 x_row, dy_row;  // bytes from a position to the next
    int length, valid;  // valid: how many of the lane's two channels exist
    int segment;        // positions of a segment

    // The position of slot lane % CHUNK, i.e. of step i of segment t for slot 4 i + t. Slots past the end of the map
    // have x = dy = 0, so that neither recurrence sees them and no gradient comes of them.
    __device__ __forceinline__ u32 find(const Layout& layout, int warp, int piece, int lane) const {
        const int slot = lane % CHUNK, i = min(slot >> 2, T - 1), t = slot & 3;
        const int step = (4 * warp + t) * segment + piece * T + i;
        return step < length ? layout.position(step) : layout.position(length - 1) | VOID;
    }
};

__device__ __forceinline__ u32 of_slot(u32 where, int slot) { return __shfl_sync(0xffffffffu, where, slot); }

// Rows of BYTES, one a slot, for the slots of a chunk.
template <int BYTES>
__device__ __forceinline__ void copy_rows(char* to, const char* from, u32 row, u32 where, int lane) {
    constexpr int PER = BYTES / 16;
#pragma unroll
    for (int n = 0; n < CHUNK * PER / 32; n++) {
        const int k = lane + 32 * n;
        const u32 w = of_slot(where, k / PER);
        copy16(to + k * 16, at(from + k % PER * 16, w & ~VOID, row), int(w) < 0 ? 0 : 16);
    }
}

__device__ __forceinline__ void copy_ranks(char* to, const char* projected, int pass, u32 where, int lane) {
#if RANK % 2 == 0
#pragma unroll
    for (int n = 0; n < 2 * CHUNK * UNITS / 32; n++) {
        const int k = lane + 32 * n, unit = k % UNITS, slot = k / UNITS >> 1, route = k / UNITS & 1;
        const u32 start = u32(2 * ROW) * (pass + 2 * route) & ~15u;
        const u32 w = of_slot(where, slot);
        copy16(to + (route * CHUNK + slot) * RANK_PITCH + unit * 16,
               at(projected + start + unit * 16, w & ~VOID, 2 * PROJECTED), 16);
    }
#else
    for (int k = lane; k < 2 * CHUNK * ROW; k += 32) {
        const int entry = k % ROW, slot = k / ROW >> 1, route = k / ROW & 1;
        const u32 w = of_slot(where, slot);
        const char* p = at(projected + 2 * (ROW * (pass + 2 * route) + entry), w & ~VOID, 2 * PROJECTED);
        reinterpret_cast<u16*>(to + (route * CHUNK + slot) * RANK_PITCH)[entry] =
            __ldg(reinterpret_cast<const u16*>(p));
    }
#endif
}

// Starts to bring what a chunk reads into `stage`.
__device__ __forceinline__ void copy_inputs(char* stage, const Source& source, int pass, u32 where, int lane) {
#if FULL_E
    copy_rows<32>(stage, source.x, source.x_row, where, lane);
    copy_rows<DY_PITCH>(stage + STAGE_DY, source.dy, source.dy_row, where, lane);
#else
    const int g = lane >> 2, t = lane & 3;
#pragma unroll 1
    for (int i = 0; i < T; i++) {
        const u32 w = of_slot(where, 4 * i + t);
        const int valid = w & VOID ? 0 : source.valid;
        *reinterpret_cast<u32*>(stage + (4 * i + t) * 32 + g * 4) =
            load_x(at(source.x, w & ~VOID, source.x_row) + 4 * g, valid);
        *reinterpret_cast<Pair*>(stage + STAGE_DY + (4 * i + t) * DY_PITCH + g * (DY_PITCH / 8)) =
            load_dy(at(source.dy, w & ~VOID, source.dy_row) + g * (DY_PITCH / 8), valid);
    }
#endif
    copy_ranks(stage + STAGE_RANKS, source.projected, pass, where, lane);
}

struct Inputs {
    float x[T][2], dy[T][2];

    __device__ __forceinline__ void load(const char* stage, int lane) {
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int i = 0; i < T; i++) {
            const char* slope = stage + STAGE_DY + (4 * i + t) * DY_PITCH + g * (DY_PITCH / 8);
            const u32 both = *reinterpret_cast<const u32*>(stage + (4 * i + t) * 32 + g * 4);
            const Pair pair = *reinterpret_cast<const Pair*>(slope);
            x[i][0] = unpack_low(both);
            x[i][1] = unpack_high(both);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                dy[i][c] = pair.get(c);
                pin(x[i][c]);  // or they are unpacked anew at every use
                pin(dy[i][c]);
            }
        }
    }
};

// Operand `tile` of column g of product j: two neighbouring entries of that slot's share of `projected`. `ranks`: the
// lane's place in a chunk's share.
__device__ __forceinline__ u32 load_rank(const char* ranks, int tile, int j, int t) {
    if (8 * tile + 8 > ROW && 8 * tile + 2 * t >= ROW) return 0u;
    const u32 both = *reinterpret_cast<const u32*>(ranks + 8 * j * RANK_PITCH + 16 * tile);
    return ROW % 2 == 1 && 8 * tile + 8 > ROW && 8 * tile + 2 * t + 1 >= ROW ? both & 0xffffu : both;
}

struct Ranks {
    u32 raw[FRAGMENTS][DUOS];

    __device__ __forceinline__ void load(const char* ranks, int t) {
#pragma unroll
        for (int tile = 0; tile < FRAGMENTS; tile++) {
#pragma unroll
            for (int j = 0; j < DUOS; j++) raw[tile][j] = load_rank(ranks, tile, j, t);
        }
    }
};

// ---- step sizes -----------------------------------------------------------------------------------------------------

struct Steps {
    float d[DUOS][4];   // -log2(e) times this and `bias` make the step input, negated, of two channels at two slots
    float bc[DUOS][4];  // B of these slots, then C
    float bias[2], A[2];

    __device__ __forceinline__ void compute(const Ranks& ranks, const uint4* packed, const InputOutputSelector& select,
                                            int lane) {
        constexpr int I = RANK / 8;
        const float4* shared = reinterpret_cast<const float4*>(packed - lane) + CONSTANTS * 32 + (lane >> 2);
        const float4 constants = shared[0], rest = shared[8];
        bias[0] = constants.x;
        bias[1] = constants.y;
        A[0] = constants.z;
        A[1] = constants.w;
#pragma unroll
        for (int j = 0; j < DUOS; j++) {
            if (RANK % 8 == 7) {
                product(bc[j], select.b, 0u, 0u, select.c, ranks.raw[I][j], ranks.raw[FRAGMENTS - 1][j]);
            } else {
                product(bc[j], select.b, select.c, ranks.raw[I][j]);
            }
        }
#pragma unroll
        for (int n = 0; n < BACK; n++) {  // the smallest parts first
            const int i = BACK - 1 - n, tile = 2 * (i % STEP_TILES);
            const uint4 w = packed[i * 32];
            constexpr int MOST = RANK_FRAGMENTS - 1;
#pragma unroll
            for (int j = 0; j < DUOS; j++) {
                const u32 first = ranks.raw[tile][j], second = ranks.raw[min(tile + 1, MOST)][j];
                if (tile < MOST) {
                    if (n == 0) mma_k16(d[j], w.x, w.y, w.z, w.w, first, second, rest.x, rest.y, rest.z, rest.w);
                    if (n > 0) add_product(d[j], w.x, w.y, w.z, w.w, first, second);
                } else {
                    if (n == 0) mma_k8(d[j], w.x, w.y, first, rest.x, rest.y, rest.z, rest.w);
                    if (n > 0) add_product(d[j], w.x, w.y, first);
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
            const float input = step * (s.B(i) * in.x[i][c]), drive = s.C(i) * in.dy[i][c];
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
template <bool REVERSE, bool FIRST>
__device__ __forceinline__ void adjoint_scan(const Steps& s, const Inputs& in, const float (&below)[2],
                                             float (&above)[2], float (&dx)[2][T], Sums& sums,
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
        float piece_bias = 0.f;  // sums of sums err less
        float state = REVERSE ? above[c] : below[c], gradient = REVERSE ? below[c] : above[c];
#pragma unroll
        for (int n = 0; n < T; n++) {
            const int i = REVERSE ? T - 1 - n : n;
            held[i] = decay[i] * state;
            state = fmaf(step[i], s.B(i) * in.x[i][c], held[i]);
            out.C[i] = c ? fmaf(in.dy[i][c], state, out.C[i]) : in.dy[i][c] * state;
        }
#pragma unroll
        for (int n = 0; n < T; n++) {
            const int i = REVERSE ? n : T - 1 - n, previous = n == 0 ? i : REVERSE ? i - 1 : i + 1;
            const float drive = s.C(i) * in.dy[i][c];
            gradient = n ? fmaf(decay[previous], gradient, drive) : gradient + drive;
            const float weighted = gradient * step[i];
            out.B[i] = c ? fmaf(weighted, in.x[i][c], out.B[i]) : weighted * in.x[i][c];
            dx[c][i] = FIRST ? s.B(i) * weighted : fmaf(s.B(i), weighted, dx[c][i]);
            sums.A[c] = fmaf(weighted, held[i], sums.A[c]);
            const float d = gradient * slope[i] * fmaf(s.A[c] * LN2, held[i], s.B(i) * in.x[i][c]);
            piece_bias = n ? piece_bias + d : d;
            out.step_input[c][i] = d;
        }
        sums.bias[c] += piece_bias;
        above[c] = REVERSE ? state : decay[0] * gradient;
        if (T == 7) out.step_input[c][SLOTS - 1] = out.B[SLOTS - 1] = out.C[SLOTS - 1] = 0.f;
#pragma unroll
        for (int j = 0; j < DUOS; j++)
            out.narrow[c][j] = pack_bf16(out.step_input[c][2 * j], out.step_input[c][2 * j + 1]);
    }
}

__device__ __forceinline__ u32 by_position(const Ranks& ranks, const char* stage, int tile, int j, int t) {
    return transpose8(FRAGMENTS <= 2 ? ranks.raw[tile][j] : load_rank(stage, tile, j, t));
}

// The gradient of dt_weight: step input gradients (16 channels x 32 positions) times ranks (32 positions x RANK).
__device__ __forceinline__ void add_weight_gradient(const Products& out, const Ranks& ranks, const char* stage,
                                                    int t, Sums& sums) {
#pragma unroll
    for (int tile = 0; NARROW && tile < RANK_FRAGMENTS; tile++) {
        float sum[4];
        sums.get(tile, sum);
#pragma unroll
        for (int j = 0; j < DUOS; j += 2) {
            mma_bf16(sum, out.narrow[0][j], out.narrow[1][j], out.narrow[0][j + 1], out.narrow[1][j + 1],
                     by_position(ranks, stage, tile, j, t), by_position(ranks, stage, tile, j + 1, t));
        }
        sums.put(tile, sum);
    }
    // Two tf32 parts, cut off by the tensor cores; a rank is one. Two chains of products, since one alone is padded.
#pragma unroll
    for (int first = 0; !NARROW && first < RANK_FRAGMENTS; first += 2) {
        const bool two = first + 1 < RANK_FRAGMENTS;
        float here[2][4] = {}, sum[2][4];
        u32 pairs[2][DUOS];
#pragma unroll
        for (int k = 0; k < 1 + two; k++) {
            sums.get(first + k, sum[k]);
#pragma unroll
            for (int j = 0; j < DUOS; j++) pairs[k][j] = by_position(ranks, stage, first + k, j, t);
        }
#pragma unroll
        for (int n = 0; n < 2 * DUOS; n++) {
            const int j = two ? n % DUOS : n / 2, part = two ? 1 - n / DUOS : n % 2;
            u32 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float whole = out.step_input[i & 1][2 * j + (i >> 1)];
                const float high = __uint_as_float(__float_as_uint(whole) & 0xffffe000u);
                v[i] = __float_as_uint(part ? whole - high : whole);
            }
#pragma unroll
            for (int k = 0; k < 1 + two; k++) {
                const float b0 = unpack_low(pairs[k][j]), b1 = unpack_high(pairs[k][j]);
                mma_tf32(here[two ? k : part], v[0], v[1], v[2], v[3], __float_as_uint(b0), __float_as_uint(b1));
            }
        }
#pragma unroll
        for (int k = 0; k < 1 + two; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sum[k][i] += two ? here[k][i] : here[0][i] + here[1][i];
            sums.put(first + k, sum[k]);
        }
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
