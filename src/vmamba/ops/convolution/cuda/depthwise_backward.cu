constexpr int SUMS = 9 + 1;  // gradients a channel: taps and bias

// dx (B, H, W, C), and for each row of blocks the gradients of the filters (C, 3, 3) and, behind them, of the bias (C).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    depthwise_silu_backward(const u16* __restrict__ dy, const u16* __restrict__ x, const void* __restrict__ weight,
                            const void* __restrict__ offset, u16* __restrict__ dx, float* __restrict__ partial,
                            Map map) {
    __shared__ float sums[THREADS / 32][PAIRS][2 * SUMS + 1];
    const int lane = threadIdx.x % PAIRS, own = ((blockIdx.x % GROUPS) * PAIRS + lane) * 2;
    const int channel = own < CHANNELS ? own : 0;
    const Filters filters(weight, offset, channel);
    const u64 row_bytes = u64(map.width) * POSITION;
    float found[SUMS][2] = {};
    for (u32 index = blockIdx.x / GROUPS * SLOTS + threadIdx.x / PAIRS; own < CHANNELS && index < map.items;
         index += gridDim.x / GROUPS * SLOTS) {
        const Item item(index, map);
        // The gradient before SiLU is needed one column beyond the strip and one row beyond the tile, x two.
        const u32 around = columns_inside<COLUMNS + 2>(item.column - 1, map.width);
        const u32 wide = columns_inside<COLUMNS + 4>(item.column - 2, map.width);
        u64 from_x = item.at(x, item.row - 2, item.column - 2, channel, map);
        u64 from_dy = item.at(dy, item.row - 1, item.column - 1, channel, map);
        u64 to = item.at(dx, item.row - 2, item.column, channel, map);
        auto row_of_x = [&](int row) { return row >= 0 && row < map.height ? wide : 0u; };
        auto row_of_dy = [&](int row) { return row >= 0 && row < map.height ? around : 0u; };
        u32 packed_x[COLUMNS + 4], packed_dy[COLUMNS + 2];
        float x0[COLUMNS + 4][2], x1[COLUMNS + 4][2], x2[COLUMNS + 4][2];
        load_row(packed_x, from_x, row_of_x(item.row - 2));
        unpack_row(x0, packed_x);
        load_row(packed_x, from_x + row_bytes, row_of_x(item.row - 1));
        unpack_row(x1, packed_x);
        from_x += 2 * row_bytes;
        load_row(packed_x, from_x, row_of_x(item.row));
        load_row(packed_dy, from_dy, row_of_dy(item.row - 1));
        int q = item.row - 1;  // the row of y at hand
        auto step = [&](const float(&xa)[COLUMNS + 4][2], const float(&xb)[COLUMNS + 4][2], float(&xc)[COLUMNS + 4][2],
                        float(&above)[COLUMNS][2], float(&here)[COLUMNS][2], float(&below)[COLUMNS][2]) {
            float d[COLUMNS + 2][2];
            unpack_row(xc, packed_x);
            unpack_row(d, packed_dy);
            from_x += row_bytes;
            from_dy += row_bytes;
            if (q < item.end) {
                load_row(packed_x, from_x, row_of_x(q + 2));
                load_row(packed_dy, from_dy, row_of_dy(q + 1));
            }
#pragma unroll
            for (int j = 0; j < COLUMNS + 2; j++) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    float v = filters.bias[k];
#pragma unroll
                    for (int i = 0; i < 3; i++) {
                        v = fmaf(filters.tap[0][i][k], xa[j + i][k], v);
                        v = fmaf(filters.tap[1][i][k], xb[j + i][k], v);
                        v = fmaf(filters.tap[2][i][k], xc[j + i][k], v);
                    }
                    const float s = sigmoid(v);
                    d[j][k] *= fmaf(s, fmaf(-v, s, v), s);
                }
            }
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    below[j][k] = filters.tap[2][0][k] * d[j + 2][k];
#pragma unroll
                    for (int i = 0; i < 3; i++) {
                        above[j][k] = fmaf(filters.tap[0][i][k], d[j + 2 - i][k], above[j][k]);
                        here[j][k] = fmaf(filters.tap[1][i][k], d[j + 2 - i][k], here[j][k]);
                        if (i) below[j][k] = fmaf(filters.tap[2][i][k], d[j + 2 - i][k], below[j][k]);
                    }
                }
            }
            if (q >= item.row && q < item.end) {
                // A row at a time, so that small values do not meet the sum of all one by one.
                float row[2] = {};
#pragma unroll
                for (int j = 0; BIAS && j < COLUMNS; j++) {
                    row[0] += d[j + 1][0];
                    row[1] += d[j + 1][1];
                }
                if (BIAS) found[9][0] += row[0];
                if (BIAS) found[9][1] += row[1];
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
                    for (int k = 0; k < 2; k++) {
#pragma unroll
                        for (int i = 0; i < 3; i++) {
                            found[i][k] = fmaf(d[j + 1][k], xa[j + 1 + i][k], found[i][k]);
                            found[3 + i][k] = fmaf(d[j + 1][k], xb[j + 1 + i][k], found[3 + i][k]);
                            found[6 + i][k] = fmaf(d[j + 1][k], xc[j + 1 + i][k], found[6 + i][k]);
                        }
                    }
                }
            }
            if (q > item.row) store_row(above, to, around >> 1 & ((1u << COLUMNS) - 1));
            to += row_bytes;
            return ++q <= item.end;
        };
        float a[COLUMNS][2] = {}, b[COLUMNS][2] = {}, c[COLUMNS][2];
        while (step(x0, x1, x2, a, b, c) && step(x1, x2, x0, b, c, a) && step(x2, x0, x1, c, a, b)) {
        }
    }
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float both = found[i][k] + __shfl_xor_sync(~0u, found[i][k], PAIRS);
            if (threadIdx.x % 32 < PAIRS) sums[threadIdx.x / 32][lane][2 * i + k] = both;
        }
    }
    __syncthreads();
    float* to = partial + u64(blockIdx.x / GROUPS) * (SUMS * CHANNELS);
    for (int i = threadIdx.x; i < 2 * SUMS * PAIRS; i += THREADS) {
        const int pair = i / (2 * SUMS), which = i % (2 * SUMS) / 2, of = i % 2;
        const int at = ((blockIdx.x % GROUPS) * PAIRS + pair) * 2 + of;
        float sum = 0.f;
        for (int warp = 0; warp < THREADS / 32; warp++) sum += sums[warp][pair][2 * which + of];
        if (at < CHANNELS) to[which < 9 ? at * 9 + which : 9 * CHANNELS + at] = sum;
    }
}
