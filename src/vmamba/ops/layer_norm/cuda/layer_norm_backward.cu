// The gradients of LayerNorm over channels, 16-bit rows (rows.cuh), the gradient that goes round the norm added to that
// of x. A thread sees the same channels in every row that it takes, so the sums for gamma and beta stay in its registers.
//
// Compile-time parameter beside those of rows.cuh:
//   SKIP      1: there is a gradient round the norm

constexpr int WARPS = THREADS / 32;

// dx (M, D), and the sums of a block for gamma and for beta, (blocks, 2, D). dy, round and x (M, D); mean and rstd (M).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    layer_norm_backward(const uint4* __restrict__ dy, const uint4* __restrict__ round, const uint4* __restrict__ x,
                        const float* __restrict__ mean, const float* __restrict__ rstd,
                        const float* __restrict__ gamma, uint4* __restrict__ dx, float* __restrict__ partial,
                        int rows) {
    __shared__ float sums[2 * CHANNELS];
    const int lane = threadIdx.x % LANES;
    float weight[CHUNKS][UNIT], dgamma[CHUNKS][UNIT] = {}, dbeta[CHUNKS][UNIT] = {};
    bool exists[CHUNKS];
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
        const int channel = (j * LANES + lane) * UNIT;
        exists[j] = WHOLE || channel < CHANNELS;
#pragma unroll
        for (int i = 0; i < UNIT; i++) weight[j][i] = exists[j] ? gamma[channel + i] : 0.f;
    }
    // All lanes of a warp stay together: those past the last row take it again, with gradients of zero.
    for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
        const int wanted = first + int(threadIdx.x) / LANES, row = min(wanted, rows - 1);
        const u64 start = u64(row) * (CHANNELS / UNIT) + lane;
        const uint4 none = make_uint4(0u, 0u, 0u, 0u);
        uint4 raw_x[CHUNKS], raw_dy[CHUNKS], raw_round[CHUNKS];
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
            raw_x[j] = exists[j] ? __ldg(x + start + j * LANES) : none;
            raw_dy[j] = exists[j] && wanted < rows ? __ldg(dy + start + j * LANES) : none;
            if (SKIP) raw_round[j] = exists[j] ? __ldg(round + start + j * LANES) : none;
        }
        const float centre = __ldg(mean + row), scale = __ldg(rstd + row);
        float whole = 0.f, along = 0.f;
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
            float v[UNIT], d[UNIT];
            unpack_unit(v, raw_x[j]);
            unpack_unit(d, raw_dy[j]);
#pragma unroll
            for (int i = 0; i < UNIT; i++) {
                const float normed = (v[i] - centre) * scale, g = d[i] * weight[j][i];
                dgamma[j][i] = fmaf(d[i], normed, dgamma[j][i]);
                dbeta[j][i] += d[i];
                whole += g;
                along = fmaf(g, normed, along);
            }
        }
        const float a = add_up(whole) * (scale / CHANNELS), b = add_up(along) * (scale / CHANNELS);
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
            float v[UNIT], d[UNIT], r[UNIT];
            unpack_unit(v, raw_x[j]);
            unpack_unit(d, raw_dy[j]);
            if (SKIP) unpack_unit(r, raw_round[j]);
#pragma unroll
            for (int i = 0; i < UNIT; i++) {
                const float normed = (v[i] - centre) * scale, g = d[i] * weight[j][i];
                v[i] = fmaf(-normed, b, fmaf(g, scale, -a));
                if (SKIP) v[i] += r[i];
            }
            const uint4 packed = make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
            if (exists[j] && wanted < rows) dx[start + j * LANES] = packed;
        }
    }
    // Over the rows of a warp, then warp after warp.
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
#pragma unroll
        for (int i = 0; i < UNIT; i++) {
#pragma unroll
            for (int distance = LANES; distance < 32; distance *= 2) {
                dgamma[j][i] += __shfl_xor_sync(~0u, dgamma[j][i], distance);
                dbeta[j][i] += __shfl_xor_sync(~0u, dbeta[j][i], distance);
            }
        }
    }
    for (int warp = 0; warp < WARPS; warp++) {
        if (int(threadIdx.x) / 32 == warp && threadIdx.x % 32 < LANES) {
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) {
                const int channel = (j * LANES + lane) * UNIT;
#pragma unroll
                for (int i = 0; i < UNIT; i++) {
                    if (!exists[j]) continue;
                    float &first = sums[channel + i], &second = sums[CHANNELS + channel + i];
                    first = warp ? first + dgamma[j][i] : dgamma[j][i];
                    second = warp ? second + dbeta[j][i] : dbeta[j][i];
                }
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < 2 * CHANNELS; i += THREADS) partial[u64(blockIdx.x) * (2 * CHANNELS) + i] = sums[i];
}

// The sums of all blocks, in a fixed order: 32 of the 2 D columns a block, their rows dealt out among its warps.
extern "C" __global__ void __launch_bounds__(256)
    layer_norm_sums(const float* __restrict__ partial, float* __restrict__ dgamma, float* __restrict__ dbeta,
                    int blocks) {
    __shared__ float parts[8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float sum = 0.f;
    if (column < 2 * CHANNELS) {
#pragma unroll 8
        for (int i = warp; i < blocks; i += 8) sum += __ldg(partial + u64(i) * (2 * CHANNELS) + column);
    }
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < 2 * CHANNELS) {
        for (int i = 1; i < 8; i++) sum += parts[i][lane];
        (column < CHANNELS ? dgamma : dbeta - CHANNELS)[column] = sum;
    }
}
