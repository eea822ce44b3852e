// LayerNorm over channels of 16-bit rows (rows.cuh), with what its backward pass needs of it: one read, one write.
//
// y (M, D), and in float32 mean (M) and rstd (M), the inverse of the standard deviation; x (M, D), gamma and beta (D).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    layer_norm_forward(const uint4* __restrict__ x, const float* __restrict__ gamma, const float* __restrict__ beta,
                       uint4* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, float eps,
                       int rows) {
    const int lane = threadIdx.x % LANES;
    float weight[CHUNKS][UNIT], bias[CHUNKS][UNIT];
    bool exists[CHUNKS];
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
        const int channel = (j * LANES + lane) * UNIT;
        exists[j] = WHOLE || channel < CHANNELS;
#pragma unroll
        for (int i = 0; i < UNIT; i++) {
            weight[j][i] = exists[j] ? gamma[channel + i] : 0.f;
            bias[j][i] = exists[j] ? beta[channel + i] : 0.f;
        }
    }
    // All lanes of a warp stay together: those past the last row compute it again, and store nothing.
    for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
        const int wanted = first + int(threadIdx.x) / LANES, row = min(wanted, rows - 1);
        const u64 start = u64(row) * (CHANNELS / UNIT) + lane;
        uint4 raw[CHUNKS];
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) raw[j] = exists[j] ? __ldg(x + start + j * LANES) : make_uint4(0u, 0u, 0u, 0u);
        float v[CHUNKS][UNIT], sum = 0.f, squares = 0.f;
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
            unpack_unit(v[j], raw[j]);
#pragma unroll
            for (int i = 0; i < UNIT; i++) sum += v[j][i];
        }
        const float centre = add_up(sum) * (1.f / CHANNELS);
        // About the mean, not about zero: rows may lie far from it.
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
#pragma unroll
            for (int i = 0; i < UNIT; i++) {
                v[j][i] -= centre;
                if (exists[j]) squares = fmaf(v[j][i], v[j][i], squares);
            }
        }
        const float scale = rsqrtf(fmaf(add_up(squares), 1.f / CHANNELS, eps));
        if (wanted >= rows) continue;
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
#pragma unroll
            for (int i = 0; i < UNIT; i++) v[j][i] = fmaf(v[j][i] * scale, weight[j][i], bias[j][i]);
            const uint4 packed = make_uint4(pack(v[j][0], v[j][1]), pack(v[j][2], v[j][3]), pack(v[j][4], v[j][5]),
                                            pack(v[j][6], v[j][7]));
            if (exists[j]) y[start + j * LANES] = packed;
        }
        if (lane == 0) {
            mean[row] = centre;
            rstd[row] = scale;
        }
    }
}
