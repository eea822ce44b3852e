// Blocks of the backward of SS2D, and the kernels before and after. common.cuh, backward_tools.cuh and
// backward_chunk.cuh come before this text.

// ---- one block of channels of one map -------------------------------------------------------------------------------

struct Block {
    const Problem& p;
    int image, channel_block, channel, lane, g, t, warp;
    u64 map;  // start of the image and the lane's channels in x
    Source source;
    uint4* operands;                // (2, OPERANDS)
    float *merged, *carry, *joins;  // (positions, 16), (2, chunks, 8, TEAM ? 4 : 2), (2, warps, 3, 16)
    InputOutputSelector select;

    __device__ __forceinline__ explicit Block(const Problem& problem) : p(problem), select(0) {
        lane =
            __shfl_sync(0xffffffffu, threadIdx.x & 31, threadIdx.x & 31);  // or it is read anew, slowly, at every use
        g = lane >> 2;
        t = lane & 3;
        select = InputOutputSelector(t);
        const int warps = blockDim.x / 32;
        const int index = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
#if TEAM
        image = blockIdx.x / p.channel_blocks;
        channel_block = blockIdx.x % p.channel_blocks;
        warp = index;
#else
        const int groups = (p.channel_blocks + warps - 1) / warps;
        image = blockIdx.x / groups;
        channel_block = blockIdx.x % groups * warps + index;
        warp = 0;
#endif
        channel = 16 * channel_block + 2 * g;
        map = u64(image) * p.length * p.channels + channel;
        source.x_row = u32(p.channels) * 2;
        source.dy_row = u32(p.channels) * (DY32 ? 4 : 2);
        source.x = reinterpret_cast<const char*>(p.x + map);
        source.dy = reinterpret_cast<const char*>(p.dy) + map * (DY32 ? 4 : 2);
        source.projected = reinterpret_cast<const char*>(p.projected + u64(image) * p.length * PROJECTED + 2 * t);
        pin(source.x);
        pin(source.dy);
        pin(source.projected);
        source.length = p.length;
        source.valid = FULL_E ? 2 : min(max(p.channels - channel, 0), 2);
        extern __shared__ float4 shared[];
        const u32 carries = p.chunks * (TEAM ? 64 : 32);
        operands = reinterpret_cast<uint4*>(shared);
#if SPILL
        merged = p.workspace + u64(image * p.channel_blocks + channel_block) * (p.length * 16 + carries);
        carry = merged + u64(p.length) * 16;
        joins = reinterpret_cast<float*>(operands + 2 * OPERANDS);
#else
        if (!TEAM) operands += index * (2 * OPERANDS + p.length * 4 + carries / 4);
        merged = reinterpret_cast<float*>(operands + 2 * OPERANDS);
        carry = merged + p.length * 16;
        joins = carry + carries;
#endif
    }

    __device__ __forceinline__ void sync() const {
#if TEAM
        __syncthreads();
#else
        __syncwarp();
#endif
    }

    __device__ __forceinline__ const uint4* weights(int slot) const { return operands + slot * OPERANDS + lane; }

    // Brings the operands of a pass's two routes into shared memory.
    __device__ __forceinline__ void fetch_weights(int pass) {
        const int first = TEAM ? threadIdx.x : lane, step = TEAM ? blockDim.x : 32;
        for (int slot = 0; slot < 2; slot++) {
            const uint4* from = p.packed + (u64(pass + 2 * slot) * p.channel_blocks + channel_block) * ITEMS * 32;
            for (int i = first; i < OPERANDS; i += step) {
                operands[slot * OPERANDS + i] = __ldg(from + (i < CONSTANTS * 32 ? i : 4 * i - 3 * CONSTANTS * 32));
            }
        }
        sync();
    }

    __device__ __forceinline__ u32 place(int slot, int chunk) const { return (slot * p.chunks + chunk) * 8 + g; }

    // Notes what a chunk would start from if the warp's first one started from zero.
    __device__ __forceinline__ void note(int slot, int chunk, const Affine (&run)[2]) {
        if (t != 0) return;
#if TEAM
        reinterpret_cast<float4*>(carry)[place(slot, chunk)] =
            make_float4(run[0].ascending, run[1].ascending, run[0].product, run[1].product);
#else
        reinterpret_cast<float2*>(carry)[place(slot, chunk)] = make_float2(run[0].ascending, run[1].ascending);
#endif
    }

    __device__ __forceinline__ void follow(const Affine (&total)[2], Affine (&run)[2]) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            run[c].ascending = fmaf(total[c].product, run[c].ascending, total[c].ascending);
            run[c].descending = fmaf(run[c].product, total[c].descending, run[c].descending);
            run[c].product *= total[c].product;
        }
    }

    __device__ __forceinline__ void publish(int slot, const Affine (&run)[2]) {
        if (t != 0) return;
        float* mine = joins + (slot * (blockDim.x / 32) + warp) * 48 + 2 * g;
#pragma unroll
        for (int c = 0; c < 2; c++) {
            mine[c] = run[c].product;
            mine[16 + c] = run[c].ascending;
            mine[32 + c] = run[c].descending;
        }
    }

    // What enters the warp's last chunk from above; what enters its first one from below goes into the table.
    __device__ __forceinline__ void join_warps(int slot, int begin, int end, float (&above)[2]) {
        const int warps = blockDim.x / 32;
        const float* other = joins + slot * warps * 48 + 2 * g;
        float below[2] = {};
        for (int w = 0; w < warp; w++) {
#pragma unroll
            for (int c = 0; c < 2; c++) below[c] = fmaf(other[w * 48 + c], below[c], other[w * 48 + 16 + c]);
        }
        for (int w = warps - 1; w > warp; w--) {
#pragma unroll
            for (int c = 0; c < 2; c++) above[c] = fmaf(other[w * 48 + c], above[c], other[w * 48 + 32 + c]);
        }
        for (int chunk = begin + t; chunk < end; chunk += 4) {
            float4& noted = reinterpret_cast<float4*>(carry)[place(slot, chunk)];
            noted.x = fmaf(noted.z, below[0], noted.x);
            noted.y = fmaf(noted.w, below[1], noted.y);
        }
    }

    template <bool REVERSE>
    __device__ __forceinline__ void adjoin(int slot, int chunk, const Steps& steps, const Inputs& in, float (&above)[2],
                                           float (&dx)[2][8], Sums& sums, Products& out) {
        const float2 start = *reinterpret_cast<const float2*>(carry + place(slot, chunk) * (TEAM ? 4 : 2));
        const float ascending[2] = {start.x, start.y};
        adjoint_scan<REVERSE>(steps, in, ascending, above, lane, reinterpret_cast<const float2*>(merged) + g, dx, sums,
                              out);
    }

    __device__ __forceinline__ void keep(const Inputs& in, int chunk, const float (&dx)[2][8]) {
        const int left = source.left(chunk, t);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i >= left) continue;
            reinterpret_cast<float2*>(merged)[in.position[i] * 8 + g] = make_float2(dx[0][i], dx[1][i]);
        }
    }

    __device__ __forceinline__ float* destination(int route, int chunk) const {
        return p.dprojected + ((u64(image * 4 + route) * ROW + g) * u32(p.chunks) + chunk) * CHUNK + 4 * t;
    }

    __device__ __forceinline__ void flush(int route, Sums& sums) const {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const u64 line = u64(route) * p.channels + channel + c;
            const bool exists = channel + c < p.channels;
#pragma unroll
            for (int tile = 0; tile < RANK_FRAGMENTS; tile++) {
                const int rank = 8 * tile + 2 * t;
                float* q = p.dweight + line * RANK + rank;
                if (RANK % 2 == 0) {
                    if (exists && rank < RANK) add_global2(q, sums.weight[tile][2 * c], sums.weight[tile][2 * c + 1]);
                } else {
                    if (exists && rank < RANK) add_global(q, sums.weight[tile][2 * c]);
                    if (exists && rank + 1 < RANK) add_global(q + 1, sums.weight[tile][2 * c + 1]);
                }
            }
            float dA = sums.A[c] * 0.4804530139182014f, dbias = sums.bias[c];
            dA += from_lane(dA, 1);
            dbias += from_lane(dbias, 1);
            dA += from_lane(dA, 2);
            dbias += from_lane(dbias, 2);
            if (exists && t == 0) {
                add_global(p.dA + line, dA);
                add_global(p.dbias + line, dbias);
            }
        }
    }

    __device__ __forceinline__ void flush_skip(float (&dD)[2]) const {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            dD[c] += from_lane(dD[c], 1);
            dD[c] += from_lane(dD[c], 2);
            // Every route passes x on by D, so all four gradients are the same: lane t adds that of route t.
            if (channel + c < p.channels) add_global(p.dD + u64(t) * p.channels + channel + c, dD[c]);
        }
    }

    __device__ __forceinline__ void store_dx(const Inputs& in, int chunk, const float (&dx)[2][8],
                                             const float (&skip)[2]) const {
        const int left = source.left(chunk, t);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i >= left) continue;
            char* q = reinterpret_cast<char*>(p.dx + map) + u64(in.position[i]) * source.x_row;
            const u32 both =
                pack(fmaf(in.dy[i].get(0), skip[0], dx[0][i] * LN2), fmaf(in.dy[i].get(1), skip[1], dx[1][i] * LN2));
#if EVEN_E
            if (source.valid > 0) *reinterpret_cast<u32*>(q) = both;
#else
            if (source.valid > 0) reinterpret_cast<u16*>(q)[0] = u16(both);
            if (source.valid > 1) reinterpret_cast<u16*>(q)[1] = u16(both >> 16);
#endif
        }
    }

    // Ranks of both routes, or a request for them where registers are short.
    __device__ __forceinline__ void load_ranks(const Inputs& in, Ranks (&ranks)[2], const char* projected) const {
        if (KEEP_RANKS) {
            ranks[0].load(in, projected, t);
            ranks[1].load(in, projected + 4 * ROW, t);
        } else {
            prefetch_ranks(in, projected, t);
            prefetch_ranks(in, projected + 4 * ROW, t);
        }
    }

    // Composes each chunk's effect on what passes through, and what every chunk starts from.
    __device__ __forceinline__ void summarize_pass(int pass, const Layout& layout, int begin, int end,
                                                   float (&above)[2][2]) {
        const int last = TEAM ? end : end - 1;  // nothing follows a map's last chunk
        Affine run[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) run[i >> 1][i & 1] = {1.f, 0.f, 0.f};
        Inputs in;
        Ranks ranks[2];
        const char* projected = source.projected;
        if (begin < last) {
            in.load(source, layout, begin, lane);
            load_ranks(in, ranks, projected);
        }
#pragma unroll 1
        for (int chunk = begin; chunk < last; chunk++) {
            Affine total[2];
            Steps steps;
            if (!KEEP_RANKS) ranks[0].load(in, projected, t);
            steps.compute(ranks[0], weights(0), select, in, source, chunk, lane);
            note(0, chunk, run[0]);
            if (!KEEP_RANKS) ranks[1].load(in, projected + 4 * ROW, t);
            summarize<false>(steps, Drives(steps, in), t, total);
            follow(total, run[0]);
            steps.compute(ranks[1], weights(1), select, in, source, chunk, lane);
            note(1, chunk, run[1]);
            const Drives drives(steps, in);
            if (chunk + 1 < last) {
                in.load(source, layout, chunk + 1, lane);
                load_ranks(in, ranks, projected);
            }
            summarize<REVERSED>(steps, drives, t, total);
            follow(total, run[1]);
        }
#if TEAM
        publish(0, run[0]);
        publish(1, run[1]);
        __syncthreads();
        join_warps(0, begin, end, above[0]);
        join_warps(1, begin, end, above[1]);
#else
        note(0, last, run[0]);
        note(1, last, run[1]);
#endif
        __syncwarp();
    }

    __device__ __forceinline__ void layout_pass(int pass) {
        if (pass) source.projected += 2 * ROW;
        const Layout layout(pass && p.columns, p.height, p.width);
        const int warps = TEAM ? blockDim.x / 32 : 1;
        const int begin = p.chunks * warp / warps, end = p.chunks * (warp + 1) / warps;
        float above[2][2] = {};
        fetch_weights(pass);
        summarize_pass(pass, layout, begin, end, above);

        Sums sums[2] = {};
        float dD[2] = {}, skip[2] = {};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            for (int k = 0; k < 4 && channel + c < p.channels; k++) skip[c] += p.D[k * p.channels + channel + c];
        }
        const char* projected = source.projected;
        Inputs in;
        Ranks ranks[2];
        if (begin < end) {
            in.load(source, layout, end - 1, lane);
            load_ranks(in, ranks, projected);
        }
#pragma unroll 1
        for (int chunk = end - 1; chunk >= begin; chunk--) {
            float dx[2][8];
            Steps steps;
            Products out;
#if ORDERED
            u32* turn = p.turns + 2 * p.channel_blocks + (u64(image) * 2 + pass) * p.chunks + chunk;
            await_turn(turn, channel_block, lane);
#endif
            if (!KEEP_RANKS) ranks[0].load(in, projected, t);
            steps.compute(ranks[0], weights(0), select, in, source, chunk, lane);
            adjoin<false>(0, chunk, steps, in, above[0], dx, sums[0], out);
            const ByChannel first(out);
            keep(in, chunk, dx);
            add_weight_gradient(out, ranks[0], in, projected, t, sums[0]);
            if (!KEEP_RANKS) ranks[1].load(in, projected + 4 * ROW, t);
            emit(first, weights(0), destination(pass, chunk), u64(u32(p.chunks)) * CHUNK, g);
            steps.compute(ranks[1], weights(1), select, in, source, chunk, lane);
            adjoin<REVERSED>(1, chunk, steps, in, above[1], dx, sums[1], out);
            const ByChannel second(out);
            if (pass == 0) {
#pragma unroll
                for (int i = 0; i < 16; i++)
                    dD[i / 8] = fmaf(in.dy[i % 8].get(i / 8), in.channel(i / 8, i % 8), dD[i / 8]);
                keep(in, chunk, dx);
            } else {
                store_dx(in, chunk, dx, skip);
            }
            add_weight_gradient(out, ranks[1], in, projected + 4 * ROW, t, sums[1]);
            float* const here = destination(pass + 2, chunk);
            if (chunk > begin) {  // the loads return while the gradients of this chunk leave
                in.load(source, layout, chunk - 1, lane);
                load_ranks(in, ranks, projected);
            }
            emit(second, weights(1), here, u64(u32(p.chunks)) * CHUNK, g);
#if ORDERED
            pass_turn(turn, channel_block, lane);
#endif
        }
        sync();  // the other layout reads what other lanes merged, and reuses the carries
#if ORDERED
        u32* turn = p.turns + pass * p.channel_blocks + channel_block;
        for (int w = 0; w < warps; w++) {
            if (w == warp) {
                await_turn(turn, image * warps + w, lane);
                flush(pass, sums[0]);
                flush(pass + 2, sums[1]);
                if (pass == 0) flush_skip(dD);
                pass_turn(turn, image * warps + w, lane);
            }
        }
#else
        flush(pass, sums[0]);
        flush(pass + 2, sums[1]);
        if (pass == 0) flush_skip(dD);
#endif
    }

    // The merged map starts from zero; every lane clears what lanes of its warp or block will add to.
    __device__ __forceinline__ void clear() {
        float4* map_sums = reinterpret_cast<float4*>(merged);
        for (int i = TEAM ? threadIdx.x : lane; i < p.length * 4; i += TEAM ? blockDim.x : 32) {
            map_sums[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        }
        sync();
    }
};

static_assert(ITEMS == OPERAND_ITEMS, "the Python side allocates as many operands as there are");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ss2d_backward(const __grid_constant__ Problem p) {
    Block block(p);
    if (block.channel_block >= p.channel_blocks) return;
    block.clear();
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) block.layout_pass(pass);
}

// ---- before and after -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float weight_at(const void* weight, int route, int channel, int rank, int channels) {
    if (channel >= channels || rank >= RANK) return 0.f;
    return StepWeights<TERMS>::read(weight, (u64(route) * channels + channel) * RANK + rank);
}

struct Preparation {
    const void* weight;
    const float *bias, *A;
    uint4* packed;
    float* zero[6];  // what sums are added to, and the turns
    u64 count[6];
    int channels, channel_blocks;
};

// Packs dt_weight, bias and A into operands, one 16-byte item a lane, and clears what sums are added to.
extern "C" __global__ void ss2d_backward_prepare(const __grid_constant__ Preparation p) {
    const u64 thread = u64(blockIdx.x) * blockDim.x + threadIdx.x, threads = u64(gridDim.x) * blockDim.x;
    for (u64 i = thread; i < p.count[0] / 4; i += threads) {
        reinterpret_cast<float4*>(p.zero[0])[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int k = 1; k < 6; k++) {
        for (u64 i = thread; i < p.count[k]; i += threads) p.zero[k][i] = 0.f;
    }
    const u64 items = u64(4) * p.channel_blocks * ITEMS * 32;
    for (u64 i = thread; i < items; i += threads) {
        const int lane = i & 31, g = lane >> 2, t = lane & 3;
        const int item = i / 32 % ITEMS, channel = 16 * int(i / (32 * ITEMS) % p.channel_blocks);
        const int route = i / (u64(32) * ITEMS * p.channel_blocks);
        u32 word[4];
        for (int n = 0; n < 4; n++) {
            float low = 0.f, high = 0.f;
            int term = 0;
            if (item < BACK) {  // rows g, g + 8 are channels 2 g, 2 g + 1; columns are ranks
                const int c = channel + 2 * g + (n & 1), rank = 16 * (item % STEP_TILES) + 8 * (n >> 1) + 2 * t;
                low = weight_at(p.weight, route, c, rank, p.channels);
                high = weight_at(p.weight, route, c, rank + 1, p.channels);
                term = item / STEP_TILES;
            } else if (item <
                       SELECT) {  // rows are ranks; columns 2 t and 2 t + 1 are channels 4 t and 4 t + 2, then odd ones
                const int tile = (item - BACK) / BACK_TERMS;
                const int rank = 16 * tile + g + 8 * (n & 1), c = channel + 4 * t + (n >> 1);
                low = weight_at(p.weight, route, c, rank, p.channels);
                high = weight_at(p.weight, route, c + 2, rank, p.channels);
                term = (item - BACK) % BACK_TERMS;
            } else if (item < CONSTANTS) {  // the first eight columns are products for B, the others for C
                const int row = 16 * (item - SELECT + RANK / 16) + g + 8 * (n & 1);
                low = high = row == RANK + (n >> 1) ? 1.f : 0.f;
            } else {
                const int c = channel + 2 * g + (n & 1);
                const float v = c < p.channels ? (n < 2 ? p.bias : p.A)[u64(route) * p.channels + c] : 0.f;
                word[n] = __float_as_uint(n < 2 ? v * LOG2E : v);
                continue;
            }
            const bool as_bf16 = BF16 || item >= BACK;
            for (int k = 0;; k++) {
                word[n] = as_bf16 ? pack_as<true>(low, high) : pack_as<false>(low, high);
                if (k == term) break;
                low -= as_bf16 ? __uint_as_float(word[n] << 16) : unpack_low(word[n]);
                high -= as_bf16 ? __uint_as_float(word[n] & 0xffff0000u) : unpack_high(word[n]);
            }
        }
        p.packed[i] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

// Rounds the gradient of `projected` and puts it in map order: a block takes FINISH chunks of one route of an image.
constexpr int FINISH = ROW * CHUNK > 2048 ? 1 : 2048 / (ROW * CHUNK);

extern "C" __global__ void ss2d_backward_finish(const float* sums, u16* dprojected, int length, int chunks, int height,
                                                int width, int columns) {
    __shared__ float tile[ROW][FINISH * CHUNK + 1];
    const int groups = (chunks + FINISH - 1) / FINISH;
    const int first = blockIdx.x % groups * FINISH, route = blockIdx.x / groups % 4;
    const u64 image = blockIdx.x / (4 * groups);
    const int here = min(FINISH, chunks - first);
    const float4* source = reinterpret_cast<const float4*>(sums + ((image * 4 + route) * ROW * chunks + first) * CHUNK);
#pragma unroll 8
    for (int i = threadIdx.x; i < ROW * FINISH * 8; i += blockDim.x) {
        const int row = i / (FINISH * 8), quad = i % (FINISH * 8);
        if (quad >= here * 8) continue;
        const float4 v = source[u64(row) * chunks * 8 + quad];
        const float scale = row < RANK ? 1.f : LN2;
        float* to = tile[row] + quad / 8 * CHUNK + quad % 4 * 8 + quad / 4 % 2 * 4;  // the order in which `emit` writes
        to[0] = v.x * scale;
        to[1] = v.y * scale;
        to[2] = v.z * scale;
        to[3] = v.w * scale;
    }
    __syncthreads();
    const Fold fold(height);
    constexpr int UNIT = ROW % 2 == 0 ? 2 : 1;
    for (int i = threadIdx.x; i < FINISH * CHUNK * (ROW / UNIT); i += blockDim.x) {
        const int local = i / (ROW / UNIT), entry = i % (ROW / UNIT) * UNIT;
        u32 position = first * CHUNK + local, column, row;
        if (position >= length) continue;
        if (columns && route % 2) {
            fold.split(position, column, row);
            position = row * width + column;
        }
        u16* to = dprojected + ((image * length + position) * 4 + route) * ROW + entry;
        const u32 both = pack(tile[entry][local], UNIT == 2 ? tile[entry + UNIT - 1][local] : 0.f);
        if (UNIT == 2) {
            *reinterpret_cast<u32*>(to) = both;
        } else {
            *to = u16(both);
        }
    }
}
