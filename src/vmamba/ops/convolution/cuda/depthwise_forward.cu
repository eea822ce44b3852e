// y (B, H, W, C) = silu(conv(x)).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    depthwise_silu(const u16* __restrict__ x, const void* __restrict__ weight, const void* __restrict__ offset,
                   u16* __restrict__ y, Map map) {
    const int channel = ((blockIdx.x % GROUPS) * PAIRS + threadIdx.x % PAIRS) * 2;
    if (channel >= CHANNELS) return;
    const Filters filters(weight, offset, channel);
    const u64 row_bytes = u64(map.width) * POSITION;
    for (u32 index = blockIdx.x / GROUPS * SLOTS + threadIdx.x / PAIRS; index < map.items;
         index += gridDim.x / GROUPS * SLOTS) {
        const Item item(index, map);
        const u32 inside = columns_inside<COLUMNS + 2>(item.column - 1, map.width);
        u64 from = item.at(x, item.row - 1, item.column - 1, channel, map);
        u64 to = item.at(y, item.row - 2, item.column, channel, map);
        u32 packed[COLUMNS + 2];
        load_row(packed, from, item.row > 0 ? inside : 0u);
        int r = item.row - 1;  // the row of x at hand
        // Adds row r to the rows of y around it; the one above is complete then.
        auto step = [&](float(&above)[COLUMNS][2], float(&here)[COLUMNS][2], float(&below)[COLUMNS][2]) {
            float v[COLUMNS + 2][2];
            unpack_row(v, packed);
            from += row_bytes;
            if (r < item.end) load_row(packed, from, r + 1 < map.height ? inside : 0u);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    below[j][k] = filters.bias[k];
#pragma unroll
                    for (int i = 0; i < 3; i++) {
                        above[j][k] = fmaf(filters.tap[2][i][k], v[j + i][k], above[j][k]);
                        here[j][k] = fmaf(filters.tap[1][i][k], v[j + i][k], here[j][k]);
                        below[j][k] = fmaf(filters.tap[0][i][k], v[j + i][k], below[j][k]);
                    }
                }
            }
            if (r > item.row) {
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
                    for (int k = 0; k < 2; k++) above[j][k] *= sigmoid(above[j][k]);
                }
                store_row(above, to, inside >> 1 & ((1u << COLUMNS) - 1));
            }
            to += row_bytes;
            return ++r <= item.end;
        };
        float a[COLUMNS][2] = {}, b[COLUMNS][2], c[COLUMNS][2];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
            for (int k = 0; k < 2; k++) b[j][k] = filters.bias[k];
        }
        while (step(a, b, c) && step(b, c, a) && step(c, a, b)) {
        }
    }
}
