// What the gradients of SS2D with several states need of low-rank steps; behind backward_states.cu.

constexpr int RANKS = (RANK + 3) / 4 * 4;

// ---- W r + b --------------------------------------------------------------------------------------------------------

// A block: 64 channels of TILE positions.
extern "C" __global__ void __launch_bounds__(64) ss2d_states_prepare(const __grid_constant__ Problem p) {
    __shared__ float4 ranks4[TILE * RANKS / 4];
    float* ranks = reinterpret_cast<float*>(ranks4);
    const u32 blocks = (p.channels + 63) / 64, tiles = (p.length + TILE - 1) / TILE;
    const u32 tile = blockIdx.x / blocks % tiles, sequence = blockIdx.x / blocks / tiles;
    const u32 image = sequence / p.routes, route = p.first_route + sequence % p.routes;
    const int wanted = blockIdx.x % blocks * 64 + threadIdx.x, channel = min(wanted, p.channels - 1);
    const int first = tile * TILE, count = min(TILE, p.length - first);
    const u16* from = p.projected + (u64(image) * p.length + first) * (4 * SHARE) + route * SHARE;
    for (int i = threadIdx.x; i < TILE * RANKS; i += 64) {
        const int position = i / RANKS, rank = i % RANKS;
        ranks[i] = position < count && rank < RANK ? widen(from[position * (4 * SHARE) + rank]) : 0.f;
    }
    const u64 row = u64(route) * p.channels + channel;
    float w[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++) w[r] = r < RANK ? p.weight[row * RANK + r] : 0.f;
    const float bias = p.bias[row];
    __syncthreads();
    if (wanted >= p.channels) return;
    float* to = p.raw + (u64(sequence) * p.length + first) * p.channels + channel;
    for (int position = 0; position < count; position++) {
        float sum = 0.f; // the bias, which is larger, last: only that sum is rounded as coarsely
#pragma unroll
        for (int i = 0; i < RANKS / 4; i++) {
            const float4 r = ranks4[position * (RANKS / 4) + i];
            sum = fmaf(r.w, w[4 * i + 3], fmaf(r.z, w[4 * i + 2], fmaf(r.y, w[4 * i + 1], fmaf(r.x, w[4 * i], sum))));
        }
        to[u64(position) * p.channels] = (sum + bias) * LOG2E;
    }
}

// ---- the ranks ------------------------------------------------------------------------------------------------------

// A block: TILE positions of one route. A warp sums over a quarter of the channels; a lane is a position.
extern "C" __global__ void __launch_bounds__(128) ss2d_states_finish(const __grid_constant__ Problem p) {
    __shared__ float gradients[32][TILE + 1];
    __shared__ float4 weights4[32 * RANKS / 4];
    __shared__ float found[4][TILE][RANKS + 1];
    float* weights = reinterpret_cast<float*>(weights4);
    const u32 tiles = (p.length + TILE - 1) / TILE, tile = blockIdx.x % tiles, sequence = blockIdx.x / tiles;
    const u32 image = sequence / p.routes, route = p.first_route + sequence % p.routes;
    const int first = tile * TILE, count = min(TILE, p.length - first), lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const float* from = p.raw + (u64(sequence) * p.length + first) * p.channels;
    const float* weight = p.weight + u64(route) * p.channels * RANK;
    float sum[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++) sum[r] = 0.f;
    for (int start = 0; start < p.channels; start += 32) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) {
            const int position = 4 * i + warp;
            const bool yes = position < count && start + lane < p.channels;
            gradients[lane][position] = yes ? from[u64(position) * p.channels + start + lane] : 0.f;
        }
        for (int i = threadIdx.x; i < 32 * RANKS; i += 128) {
            const int channel = start + i / RANKS, r = i % RANKS;
            weights[i] = channel < p.channels && r < RANK ? weight[channel * RANK + r] : 0.f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int channel = 8 * warp + i;
            const float g = gradients[channel][lane];
#pragma unroll
            for (int r = 0; r < RANKS / 4; r++) {
                const float4 w = weights4[channel * (RANKS / 4) + r];
                sum[4 * r] = fmaf(g, w.x, sum[4 * r]);
                sum[4 * r + 1] = fmaf(g, w.y, sum[4 * r + 1]);
                sum[4 * r + 2] = fmaf(g, w.z, sum[4 * r + 2]);
                sum[4 * r + 3] = fmaf(g, w.w, sum[4 * r + 3]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < RANKS; r++) found[warp][lane][r] = sum[r];
    __syncthreads();
    const float* sums = p.sums + (u64(sequence) * p.length + first) * (2 * N);
    u16* to = p.dprojected + (u64(image) * p.length + first) * (4 * SHARE) + route * SHARE;
    for (int i = threadIdx.x; i < count * SHARE; i += 128) {
        const int position = i / SHARE, value = i % SHARE;
        float v;
        if (value < RANK) {
            v = (found[0][position][value] + found[1][position][value]) +
                (found[2][position][value] + found[3][position][value]);
        } else {
            v = sums[position * (2 * N) + value - RANK] * TRUNCATED;
        }
        to[position * (4 * SHARE) + value] = u16(pack(v, 0.f));
    }
}

// A block: 32 channels of one route, a stretch of the positions of all images; a lane is a channel.
extern "C" __global__ void __launch_bounds__(128) ss2d_states_weights(const __grid_constant__ Problem p) {
    __shared__ float4 ranks4[TILE * RANKS / 4];
    float* ranks = reinterpret_cast<float*>(ranks4);
    const u32 lines = p.groups * p.routes, line = blockIdx.x % lines, part = blockIdx.x / lines;
    const u32 parts = gridDim.x / lines, local = line / p.groups, route = p.first_route + local;
    const u32 tiles = (p.length + TILE - 1) / TILE, all = tiles * p.images;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wanted = line % p.groups * 32 + lane;
    const int channel = min(wanted, p.channels - 1);
    float sum[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++) sum[r] = 0.f;
    for (u32 tile = part; tile < all; tile += parts) {
        const u32 image = tile / tiles;
        const int first = tile % tiles * TILE, count = min(TILE, p.length - first);
        const u16* from = p.projected + (u64(image) * p.length + first) * (4 * SHARE) + route * SHARE;
        const float* raw = p.raw + ((u64(image) * p.routes + local) * p.length + first) * p.channels + channel;
        float g[TILE / 4];
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) {
            const int position = 4 * i + warp;
            g[i] = position < count ? raw[u64(position) * p.channels] : 0.f;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * RANKS; i += 128) {
            const int position = i / RANKS, rank = i % RANKS;
            ranks[i] = position < count && rank < RANK ? widen(from[position * (4 * SHARE) + rank]) : 0.f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) {
#pragma unroll
            for (int q = 0; q < RANKS / 4; q++) {
                const float4 r = ranks4[(4 * i + warp) * (RANKS / 4) + q];
                sum[4 * q] = fmaf(g[i], r.x, sum[4 * q]);
                sum[4 * q + 1] = fmaf(g[i], r.y, sum[4 * q + 1]);
                sum[4 * q + 2] = fmaf(g[i], r.z, sum[4 * q + 2]);
                sum[4 * q + 3] = fmaf(g[i], r.w, sum[4 * q + 3]);
            }
        }
    }
    if (wanted >= p.channels) return;
#pragma unroll
    for (int r = 0; r < RANK; r++) add_global(p.dweight + (u64(route) * RANK + r) * p.channels + channel, sum[r]);
}
