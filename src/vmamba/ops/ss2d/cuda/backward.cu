// Blocks of the backward of SS2D, and the kernels before and after. common.cuh, backward_tools.cuh and
// backward_chunk.cuh come before this text.

// ---- one block of channels of one map -------------------------------------------------------------------------------

struct Block {
    const Problem& p;
    int image, channel_block, channel, lane, g, t, warp;
    u64 map;  // start of the image and the channels in x
    char* stage;      // STAGES chunks of the warp
    Source source;
    uint4* operands;  // (HELD, 2, OPERANDS)
    char* merged;     // (positions, 16) float32
    float4* table;    // (2, chunks, 32): what each piece starts from
    float* joins;     // (2, warps, 3, 16)
    float4* stash;    // (2, RANK_FRAGMENTS, 32): see `Sums`
    u32* next;        // the map to take
    InputOutputSelector select;

    __device__ __forceinline__ explicit Block(const Problem& problem) : p(problem), select(0) {
        lane =
            __shfl_sync(0xffffffffu, threadIdx.x & 31, threadIdx.x & 31);  // or it is read anew, slowly, at every use
        g = lane >> 2;
        t = lane & 3;
        select = InputOutputSelector(t);
        const int index = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
        const int warps = blockDim.x / 32;
        const u32 rank = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0;
        warp = TEAM ? rank * warps + index : 0;
        extern __shared__ float4 shared[];
        const u64 entries = u64(2) * p.chunks * 32, merged_size = u64(p.length) * 64;
        next = reinterpret_cast<u32*>(shared);
        joins = reinterpret_cast<float*>(shared + 1);
        float4* rest = shared + 1 + (TEAM ? 24 * warps + (CLUSTER > 1 ? 24 : 0) : 0);
        stash = rest + index * (2 * RANK_FRAGMENTS * 32) + lane;
        if (STASH) rest += 2 * RANK_FRAGMENTS * 32 * warps;
        operands = reinterpret_cast<uint4*>(rest);
        rest += HELD * 2 * OPERANDS;
        stage = reinterpret_cast<char*>(rest) + index * (STAGES * STAGE);
        rest += warps * (STAGES * STAGE / 16);
        const u64 team = TEAM ? blockIdx.x / CLUSTER : blockIdx.x * warps + index;
        char* own = reinterpret_cast<char*>(p.workspace) + team * (entries * 16 + (SPILL ? merged_size : 0));
        table = reinterpret_cast<float4*>(own) + lane;
#if SPILL
        merged = own + entries * 16;
#else
        merged = reinterpret_cast<char*>(rest) + (TEAM ? 0 : index) * merged_size;
#endif
    }

    // Goes to a block of channels of an image; where maps are small the warps of a block take one image each.
    __device__ __forceinline__ void enter(int index) {
        image = index / p.channel_blocks;
        channel_block = index % p.channel_blocks;
        if (!TEAM) image = image * (blockDim.x / 32) + threadIdx.x / 32;
        channel = 16 * channel_block + 2 * g;
        map = u64(image) * p.length * p.channels + 16 * channel_block;
        source.x_row = u32(p.channels) * 2;
        source.dy_row = u32(p.channels) * (DY32 ? 4 : 2);
        source.x = reinterpret_cast<const char*>(p.x + map);
        source.dy = reinterpret_cast<const char*>(p.dy) + map * (DY32 ? 4 : 2);
        source.projected = reinterpret_cast<const char*>(p.projected + u64(image) * p.length * PROJECTED);
        pin(source.x);
        pin(source.dy);
        pin(source.projected);
        source.length = p.length;
        source.segment = p.pieces * T;
        source.valid = FULL_E ? 2 : min(max(p.channels - channel, 0), 2);
    }

    __device__ __forceinline__ void sync() const {
#if CLUSTER > 1
        cluster_sync();
#elif TEAM
        __syncthreads();
#else
        __syncwarp();
#endif
    }

    __device__ __forceinline__ const uint4* weights(int pass, int slot) const {
        return operands + (HELD == 2 ? 2 * pass + slot : slot) * OPERANDS + lane;
    }

    // Starts to bring the operands of a pass's two routes into shared memory, or before the first pass those of both.
    __device__ __forceinline__ void fetch_weights(int pass) {
        if (HELD == 2 && pass) return;
        if (!TEAM && pass) __syncthreads();
#pragma unroll 1
        for (int k = 0; k < 2 * HELD; k++) {
            const int route = HELD == 2 ? k / 2 + k % 2 * 2 : pass + 2 * k;
            const uint4* from = p.packed + (u64(route) * p.channel_blocks + channel_block) * ITEMS * 32;
            for (int i = threadIdx.x; i < OPERANDS; i += blockDim.x) {
                const uint4* item = from + (i < CONSTANTS * 32 ? i : 4 * i - 3 * CONSTANTS * 32);
                copy16(reinterpret_cast<char*>(operands + k * OPERANDS + i), reinterpret_cast<const char*>(item), 16);
            }
        }
    }

    __device__ __forceinline__ float4& entry(int slot, int piece) const {
        return table[(slot * p.chunks + warp * p.pieces + piece) * 32];
    }

    // Notes what a piece would start from if its segment started from zero, and the share of what enters it keeps:
    // beside what stays staged until the descending sweep, else in the table.
    __device__ __forceinline__ void note(int slot, int piece, bool stays, char* staged, const Affine (&run)[2]) const {
        const float4 noted = make_float4(run[0].ascending, run[1].ascending, run[0].product, run[1].product);
        if (stays) *reinterpret_cast<float4*>(staged + STAGE_NOTES + slot * 512 + lane * 16) = noted;
        if (!stays) entry(slot, piece) = noted;
    }

    // What enters the lane's segment from below and from above. The totals of warps meet in shared memory.
    __device__ __forceinline__ void join_segments(const Affine (&run)[2][2], float (&below)[2][2],
                                                  float (&above)[2][2]) {
        const Join join[2][2] = {{Join(run[0][0], t), Join(run[0][1], t)}, {Join(run[1][0], t), Join(run[1][1], t)}};
#if TEAM
        const int warps = blockDim.x / 32, own = CLUSTER > 1 ? threadIdx.x / 32 : warp;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Affine total = join[i / 2][i % 2].total(t);
            float* mine = joins + (i / 2 * warps + own) * 48 + 2 * g + i % 2;
            if (t == 0) {
                mine[0] = total.product;
                mine[16] = total.ascending;
                mine[32] = total.descending;
            }
        }
        __syncthreads();
#if CLUSTER > 1
        float* blocks = joins + 2 * warps * 48;  // what the block's warps make together, (2, 48)
        if (threadIdx.x < 32) {
            const float* other = joins + threadIdx.x / 16 * warps * 48 + threadIdx.x % 16;
            Affine run = {1.f, 0.f, 0.f};
            for (int w = 0; w < warps; w++) {
                run.ascending = fmaf(other[w * 48], run.ascending, other[w * 48 + 16]);
                run.descending = fmaf(run.product, other[w * 48 + 32], run.descending);
                run.product *= other[w * 48];
            }
            float* mine = blocks + threadIdx.x / 16 * 48 + threadIdx.x % 16;
            mine[0] = run.product;
            mine[16] = run.ascending;
            mine[32] = run.descending;
        }
        cluster_sync();
        const int rank = blockIdx.x % CLUSTER;
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* other = joins + i / 2 * warps * 48 + 2 * g + i % 2;
            float from_below = 0.f, from_above = 0.f;
#if CLUSTER > 1
            const float* total = blocks + i / 2 * 48 + 2 * g + i % 2;
#pragma unroll 4
            for (int r = 0; r < rank; r++) {
                from_below = fmaf(load_peer(total, r), from_below, load_peer(total + 16, r));
            }
#pragma unroll 4
            for (int r = CLUSTER - 1; r > rank; r--) {
                from_above = fmaf(load_peer(total, r), from_above, load_peer(total + 32, r));
            }
#endif
#pragma unroll 1
            for (int w = 0; w < own; w++) from_below = fmaf(other[w * 48], from_below, other[w * 48 + 16]);
#pragma unroll 1
            for (int w = warps - 1; w > own; w--) from_above = fmaf(other[w * 48], from_above, other[w * 48 + 32]);
            below[i / 2][i % 2] = join[i / 2][i % 2].ascending(from_below, t);
            above[i / 2][i % 2] = join[i / 2][i % 2].descending(from_above, t);
        }
#else
#pragma unroll
        for (int i = 0; i < 4; i++) {
            below[i / 2][i % 2] = join[i / 2][i % 2].ascending(0.f, t);
            above[i / 2][i % 2] = join[i / 2][i % 2].descending(0.f, t);
        }
#endif
    }

    __device__ __forceinline__ float2* place(u32 where) const {
        u32 offset = (where & ~VOID) * 64 + g * 8;
        if (!SPILL) offset ^= offset >> 2 & 32;  // spread over the banks
        return reinterpret_cast<float2*>(merged + (SPILL ? u64(where & ~VOID) * 64 + g * 8 : offset));
    }

    // After rows the merged map takes what they give, after columns dx takes the sum.
    __device__ __forceinline__ void keep(u32 where, const float (&dx)[2][T]) const {
#pragma unroll
        for (int i = 0; i < T; i++) {
            const u32 w = of_slot(where, 4 * i + t);
            store_float2_if(int(w) >= 0, place(w), dx[0][i], dx[1][i]);
        }
    }

    __device__ __forceinline__ float* destination(int route, int chunk) const {
        return p.dprojected + ((u64(image * 4 + route) * ROW + g) * u32(p.chunks) + chunk) * CHUNK + 4 * t;
    }

    // Sums of a route go where `ss2d_backward_finish` finds them, each lane's beside its neighbours'.
    __device__ __forceinline__ void flush(int route, const Sums& sums) const {
        const u32 block = route * p.channel_blocks + channel_block;
        float* to = p.dweight + (u64(block) * (RANK_FRAGMENTS * 32) + lane) * 4;
#pragma unroll
        for (int tile = 0; tile < RANK_FRAGMENTS; tile++) {
            float sum[4];
            sums.get(tile, sum);
            add_global4(to + tile * 128, sum[0], sum[1], sum[2], sum[3]);
        }
        // Over the lanes of a row: lane t is left with the sum of what is to become number t.
        const bool odd = t & 1, upper = t & 2;
        const float bias = (odd ? sums.bias[1] : sums.bias[0]) + from_lane(odd ? sums.bias[0] : sums.bias[1], 1);
        const float A = (odd ? sums.A[1] : sums.A[0]) + from_lane(odd ? sums.A[0] : sums.A[1], 1);
        add_global(p.sums + u64(block) * 32 + lane, (upper ? A : bias) + from_lane(upper ? bias : A, 2));
    }

    __device__ __forceinline__ void flush_skip(const float (&dD)[2]) const {
        float sum = (t & 1 ? dD[1] : dD[0]) + from_lane(t & 1 ? dD[0] : dD[1], 1);
        sum += from_lane(sum, 2);
        if (t < 2) add_global(p.sums + u64(p.channel_blocks) * 128 + 16 * channel_block + 2 * g + t, sum);
    }

    __device__ __forceinline__ void store_dx(u32 where, const char* staged, const Inputs& in, const float (&dx)[2][T],
                                             const float (&skip)[2]) const {
#pragma unroll
        for (int i = 0; i < T; i++) {
            const u32 w = of_slot(where, 4 * i + t);
            const char* own = staged + (4 * i + t) * 64 + g * 8;
            const float2 before = SPILL ? *reinterpret_cast<const float2*>(own) : *place(w);
            char* q = reinterpret_cast<char*>(p.dx + map + 2 * g) + u64(w & ~VOID) * source.x_row;
            const u32 both = pack(fmaf(in.dy[i][0], skip[0], (before.x + dx[0][i]) * LN2),
                                  fmaf(in.dy[i][1], skip[1], (before.y + dx[1][i]) * LN2));
            const bool exists = int(w) >= 0 && (FULL_E || source.valid > 0);
#if EVEN_E
            store_u32_if(exists, q, both);
#else
            if (exists) reinterpret_cast<u16*>(q)[0] = u16(both);
            if (exists && source.valid > 1) reinterpret_cast<u16*>(q)[1] = u16(both >> 16);
#endif
        }
    }

    // The lane's place among the staged ranks of a route.
    __device__ __forceinline__ const char* ranks_of(const char* staged, int pass, int slot) const {
        return staged + STAGE_RANKS + (slot * CHUNK + (g & 1) * 4 + (g >> 1)) * RANK_PITCH + 4 * t +
               (COPY_RANKS ? 2 * ROW * (pass + 2 * slot) & 15 : 0);
    }

    __device__ __forceinline__ char* buffer(int piece) const { return stage + (STAGES == 2 ? (piece & 1) * STAGE : 0); }

    // Notes what every piece starts from; gives what enters the lane's segment.
    __device__ __forceinline__ void summarize_pass(const Layout& layout, int pass, int pieces, float (&below)[2][2],
                                                   float (&above)[2][2]) {
        Affine run[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) run[i >> 1][i & 1] = {1.f, 0.f, 0.f};
        if (pieces > 0) copy_inputs(stage, source, pass, source.find(layout, warp, 0, lane), lane);
        if (HELD == 1 || pass == 0) {
            copies_arrived();
            __syncthreads();  // every warp's share of the operands
        }
#pragma unroll 1
        for (int piece = 0; piece < pieces; piece++) {
            char* staged = buffer(piece);
            copies_arrived();
            if (STAGES == 2 && piece + 1 < pieces) {
                copy_inputs(buffer(piece + 1), source, pass, source.find(layout, warp, piece + 1, lane), lane);
            }
            Inputs in;
            Steps steps;
            Ranks ranks;
            in.load(staged, lane);
            note(0, piece, piece >= pieces - STAGES, staged, run[0]);
            note(1, piece, piece >= pieces - STAGES, staged, run[1]);
            ranks.load(ranks_of(staged, pass, 0), t);
            steps.compute(ranks, weights(pass, 0), select, lane);
            summarize<false>(steps, in, run[0]);
            ranks.load(ranks_of(staged, pass, 1), t);
            if (STAGES == 1 && piece + 1 < pieces) {
                __syncwarp();
                copy_inputs(stage, source, pass, source.find(layout, warp, piece + 1, lane), lane);
            }
            steps.compute(ranks, weights(pass, 1), select, lane);
            summarize<REVERSED>(steps, in, run[1]);
        }
        __syncwarp();
        __threadfence_block();  // the notes, before they are copied
        join_segments(run, below, above);
    }

    // `stays`: the ascending sweep has left the chunk where it is to be.
    __device__ __forceinline__ u32 copy_chunk(char* to, const Layout& layout, int pass, int piece, bool stays) const {
        const u32 where = source.find(layout, warp, piece, lane);
        if (!stays) {
            copy_inputs(to, source, pass, where, lane);
#pragma unroll
            for (int slot = 0; slot < 2; slot++) {
                const float4& noted = entry(slot, piece);
                copy16(to + STAGE_NOTES + slot * 512 + lane * 16, reinterpret_cast<const char*>(&noted), 16);
            }
        }
        if (STAGES == 2) copy_merged(to, pass, where);
        return where;
    }

    __device__ __forceinline__ void copy_merged(char* to, int pass, u32 where) const {
        if (SPILL && pass) copy_rows<64>(to + STAGE_MERGED, merged, 64, where, lane);
    }

    template <bool REVERSE, bool FIRST>
    __device__ __forceinline__ void adjoin(const char* staged, int pass, float* first, int chunk,
                                           const float (&below)[2], float (&above)[2], const Inputs& in,
                                           float (&dx)[2][T], Sums& sums, const Layout& layout, int piece,
                                           u32& next) const {
        constexpr int slot = FIRST ? 0 : 1;
        Steps steps;
        Ranks ranks;
        Products out;
        const char* own = ranks_of(staged, pass, slot);
        ranks.load(own, t);
        steps.compute(ranks, weights(pass, slot), select, lane);
        const float4 noted = *reinterpret_cast<const float4*>(staged + STAGE_NOTES + slot * 512 + lane * 16);
        const float ascending[2] = {fmaf(noted.z, below[0], noted.x), fmaf(noted.w, below[1], noted.y)};
        adjoint_scan<REVERSE, FIRST>(steps, in, ascending, above, dx, sums, out);
        const ByChannel turned(out);
        add_weight_gradient(out, ranks, own, t, sums);
        if (!FIRST && STAGES == 1 && piece > 0) {  // all that this chunk reads has been read
            __syncwarp();
            next = copy_chunk(stage, layout, pass, piece - 1, false);
        }
        const u64 row_stride = u64(u32(p.chunks)) * CHUNK;
        float* to = first + chunk * CHUNK + (slot ? 2 * ROW * row_stride : 0);
        emit(turned, weights(pass, slot), to, row_stride, g);
    }

    __device__ __forceinline__ void layout_pass(int pass) {
        const Layout layout(pass && p.columns, p.height, p.width, p.magic);
        const int begun = p.length - 4 * warp * source.segment;  // positions from the warp on
        const bool exists = TEAM || image < p.images;
        const int pieces = exists ? max(min((begun + T - 1) / T, p.pieces), 0) : 0;
        float below[2][2], above[2][2];
        summarize_pass(layout, pass, pieces, below, above);

        Sums sums[2];
        sums[0].begin(stash);
        sums[1].begin(stash + RANK_FRAGMENTS * 32);
        float dD[2] = {};  // or, by columns, the sum of D
        if (pass) {
            const float2 skip = *reinterpret_cast<const float2*>(p.skip + channel);
            dD[0] = skip.x;
            dD[1] = skip.y;
        }
        float* first = destination(pass, 0);
        u32 next = 0;
        if (pieces > 0) next = copy_chunk(buffer(pieces - 1), layout, pass, pieces - 1, true);
        if (STAGES == 1 && pieces > 0) copy_merged(stage, pass, next);
#pragma unroll 1
        for (int piece = pieces - 1; piece >= 0; piece--) {
            const int chunk = warp * p.pieces + piece;
            const u32 where = next;
            const char* staged = buffer(piece);
            copies_arrived();
            if (STAGES == 2 && piece > 0) next = copy_chunk(buffer(piece - 1), layout, pass, piece - 1, piece == pieces - 1);
            float dx[2][T];
            Inputs in;
            in.load(staged, lane);
#if ORDERED
            u32* turn = p.turns + 1 + 2 * p.channel_blocks + (u64(image) * 2 + pass) * p.chunks + chunk;
            await_turn(turn, channel_block, lane);
#endif
            adjoin<false, true>(staged, pass, first, chunk, below[0], above[0], in, dx, sums[0], layout, piece, next);
            adjoin<REVERSED, false>(staged, pass, first, chunk, below[1], above[1], in, dx, sums[1], layout, piece,
                                    next);
            if (pass == 0) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float sum = in.dy[0][c] * in.x[0][c];
#pragma unroll
                    for (int i = 1; i < T; i++) sum = fmaf(in.dy[i][c], in.x[i][c], sum);
                    dD[c] += sum;
                }
                keep(where, dx);
            } else {
                store_dx(where, staged + STAGE_MERGED, in, dx, dD);
                if (STAGES == 1 && SPILL && piece > 0) {  // the place is free only now
                    __syncwarp();
                    copy_merged(stage, pass, next);
                }
            }
#if ORDERED
            pass_turn(turn, channel_block, lane);
#endif
        }
        sync();  // the other layout reads what other lanes merged, and reuses the carries
        if (!exists) return;
#if ORDERED
        u32* turn = p.turns + 1 + pass * p.channel_blocks + channel_block;
        const int warps = TEAM ? CLUSTER * (blockDim.x / 32) : 1;
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
};

static_assert(CLUSTER == 1 || TEAM && SPILL, "blocks of a cluster share a map, in the workspace");
static_assert(ITEMS == OPERAND_ITEMS, "the Python side allocates as many operands as there are");

// Blocks take one map, or one for each warp, after another until none is left. Whoever waits waits for earlier ones.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ss2d_backward(const __grid_constant__ Problem p) {
    Block block(p);
    u32* next = block.next;
    const bool leads = threadIdx.x == 0 && blockIdx.x % CLUSTER == 0;
    u32 coming = leads ? atomicAdd(p.turns, 1) : 0;
    for (;;) {
        if (leads) *next = coming;
#if CLUSTER > 1
        cluster_sync();
        const u32 index = __float_as_uint(load_peer(reinterpret_cast<const float*>(next), 0));
        if (index >= u32(p.maps)) {
            cluster_sync();  // a block's shared memory must outlive its readers
            return;
        }
#else
        __syncthreads();
        const u32 index = *next;
        if (index >= u32(p.maps)) return;
#endif
        if (leads) coming = atomicAdd(p.turns, 1);  // on its way while this map is dealt with
        block.enter(index);
#pragma unroll 1
        for (int pass = 0; pass < 2; pass++) {
            block.fetch_weights(pass);
            block.layout_pass(pass);
        }
    }
}

// ---- before and after -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float weight_at(const void* weight, int route, int channel, int rank, int channels) {
    if (channel >= channels || rank >= RANK) return 0.f;
    return StepWeights<TERMS>::read(weight, (u64(route) * channels + channel) * RANK + rank);
}

struct Preparation {
    const void* weight;
    const float *bias, *A, *D;
    uint4* packed;
    float* skip;     // (16 channel blocks): D, over routes
    float* zero[4];  // what sums are added to, and the turns
    u64 count[4];
    int channels, channel_blocks;
};

// Packs dt_weight, bias and A into operands, one 16-byte item a lane, and clears what sums are added to.
extern "C" __global__ void ss2d_backward_prepare(const __grid_constant__ Preparation p) {
    const u64 thread = u64(blockIdx.x) * blockDim.x + threadIdx.x, threads = u64(gridDim.x) * blockDim.x;
    for (u64 i = thread; i < p.count[0] / 4; i += threads) {
        reinterpret_cast<float4*>(p.zero[0])[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int k = 1; k < 4; k++) {
        for (u64 i = thread; i < p.count[k]; i += threads) p.zero[k][i] = 0.f;
    }
    for (u64 i = thread; i < p.channel_blocks * 16; i += threads) {
        float sum = 0.f;
        for (int k = 0; k < 4 && i < p.channels; k++) sum += p.D[k * p.channels + i];
        p.skip[i] = sum;
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
                const bool rest = item > CONSTANTS;  // what rounding leaves of log2(e) times the bias, over log2(e)
                const int c = channel + 2 * g + (rest ? n >> 1 : n & 1);
                const float v = c < p.channels ? (rest || n < 2 ? p.bias : p.A)[u64(route) * p.channels + c] : 0.f;
                const float scaled = v * -LOG2E;
                word[n] = __float_as_uint(rest ? float(v + scaled / 1.4426950408889634) : n < 2 ? scaled : v);
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
// The blocks together round the sums that are float64, for `channels` channels.
constexpr int FINISH = ROW * CHUNK > 2048 ? 1 : 2048 / (ROW * CHUNK);

struct Finish {
    const float* sums;      // see Problem::dprojected
    const float4* weights;  // see Problem::dweight
    const double* exact;    // see Problem::sums
    u16* dprojected;
    void* dweight;  // (4, E, RANK)
    float *dbias, *dA, *dD;
    int length, chunks, pieces, height, width, columns, channels, channel_blocks;
};

extern "C" __global__ void ss2d_backward_finish(const __grid_constant__ Finish p) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    for (int i = thread; i < 4 * p.channels; i += threads) {
        const int channel = i % p.channels, block = i / p.channels * p.channel_blocks + channel / 16;
        const double* from = p.exact + u64(block) * 32 + channel % 16 / 2 * 4 + channel % 2;
        p.dbias[i] = float(from[0]);
        p.dA[i] = float(from[2] * (0.6931471805599453 * 0.6931471805599453));
        p.dD[i] = float(p.exact[u64(p.channel_blocks) * 128 + channel]);
    }
    for (int i = thread; i < 4 * p.channels * RANK; i += threads) {
        const int rank = i % RANK, line = i / RANK, channel = line % p.channels;
        const int block = line / p.channels * p.channel_blocks + channel / 16;
        const int lane = channel % 16 / 2 * 4 + rank % 8 / 2;
        const float4 sum = p.weights[(u64(block) * RANK_FRAGMENTS + rank / 8) * 32 + lane];
        const float low = rank % 2 ? sum.y : sum.x, high = rank % 2 ? sum.w : sum.z;
#if WEIGHT16
        reinterpret_cast<u16*>(p.dweight)[i] = u16(pack(channel % 2 ? high : low, 0.f));
#else
        reinterpret_cast<float*>(p.dweight)[i] = channel % 2 ? high : low;
#endif
    }
    const int chunks = p.chunks;
    __shared__ float tile[ROW][FINISH * CHUNK + 1];
    const int groups = (chunks + FINISH - 1) / FINISH;
    const int first = blockIdx.x % groups * FINISH, route = blockIdx.x / groups % 4;
    const u64 image = blockIdx.x / (4 * groups);
    const int here = min(FINISH, chunks - first);
    const float4* source = reinterpret_cast<const float4*>(p.sums + ((image * 4 + route) * ROW * chunks + first) * CHUNK);
#pragma unroll 8
    for (int i = threadIdx.x; i < ROW * FINISH * SLOTS; i += blockDim.x) {
        const int row = i / (FINISH * SLOTS), quad = i % (FINISH * SLOTS);
        if (quad >= here * SLOTS) continue;
        const float4 v = source[u64(row) * chunks * SLOTS + quad];
        const float scale = row < RANK ? 1.f : LN2;
        // The order in which `emit` writes.
        float* to = tile[row] + quad / SLOTS * CHUNK + quad % 4 * SLOTS + quad % SLOTS / 4 * 4;
        to[0] = v.x * scale;
        to[1] = v.y * scale;
        to[2] = v.z * scale;
        to[3] = v.w * scale;
    }
    __syncthreads();
    const Fold fold(p.height), segment(p.pieces);
    constexpr int UNIT = ROW % 2 == 0 ? 2 : 1;
    for (int i = threadIdx.x; i < FINISH * CHUNK * (ROW / UNIT); i += blockDim.x) {
        const int local = i / (ROW / UNIT), entry = i % (ROW / UNIT) * UNIT;
        u32 warp, piece, column, row;
        segment.split(first + local / CHUNK, warp, piece);
        const u32 slot = local % SLOTS;
        u32 position = ((4 * warp + local / SLOTS % 4) * p.pieces + piece) * T + slot;
        if (slot >= T || position >= p.length) continue;
        if (p.columns && route % 2) {
            fold.split(position, column, row);
            position = row * p.width + column;
        }
        u16* to = p.dprojected + ((image * p.length + position) * 4 + route) * ROW + entry;
        const u32 both = pack(tile[entry][local], UNIT == 2 ? tile[entry + UNIT - 1][local] : 0.f);
        if (UNIT == 2) {
            *reinterpret_cast<u32*>(to) = both;
        } else {
            *to = u16(both);
        }
    }
}
