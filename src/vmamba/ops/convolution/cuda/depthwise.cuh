// Depthwise 3x3 convolution of a channels-last map, size kept, followed by SiLU, in both directions.
//
// A thread owns two adjacent channels and a strip of COLUMNS columns, and walks down the rows of its strip; 16 threads
// side by side take 32 channels. Nothing is staged: columns that strips share, and rows that tiles share, come from L1.
// The backward pass computes the convolution anew, so that nothing but x is kept for it, and finds the gradients of x,
// the filters and the bias in one sweep.
//
// Compile-time parameters (set by the Python side):
//   BF16       1: 16-bit values are bfloat16, 0: float16
//   WEIGHT16   1: filters and bias have the 16-bit type, 0: float32
//   BIAS       1: there is a bias
//   CHANNELS   C, even
//   COLUMNS    columns of a strip
//   THREADS    of a block
//   BLOCKS     that a multiprocessor should hold, which bounds the registers of a thread

constexpr int PAIRS = 16;                // threads side by side
constexpr int SLOTS = THREADS / PAIRS;   // strips a block takes at once
constexpr int GROUPS = (CHANNELS + 2 * PAIRS - 1) / (2 * PAIRS);
constexpr int POSITION = 2 * CHANNELS;   // bytes

struct Map {
    int height, width;
    int rows;           // of a tile
    int strips, tiles;  // side by side in an image; below each other
    int items;          // strips of tiles over all images
};

// The strip of a tile of an image that an item is.
struct Item {
    u64 image;  // its first position
    int column, row, end;

    __device__ __forceinline__ Item(u32 index, const Map& map) {
        const u32 above = index / u32(map.strips), which = above / u32(map.tiles);
        column = int(index - above * map.strips) * COLUMNS;
        row = int(above - which * map.tiles) * map.rows;
        end = min(row + map.rows, map.height);
        image = u64(which) * map.height * map.width;
    }

    // Address of a position, which may lie outside the map, in channels-last 16-bit data.
    __device__ __forceinline__ u64 at(const void* data, int y, int x, int channel, const Map& map) const {
        const long long position = (long long)(image) + (long long)(y) * map.width + x;
        return reinterpret_cast<u64>(data) + position * POSITION + 2 * channel;
    }
};

// Which of N columns from `first` on lie in the map, a bit each.
template <int N>
__device__ __forceinline__ u32 columns_inside(int first, int width) {
    constexpr u32 ALL = (1u << N) - 1;
    const u32 left = first < 0 ? ALL << -first : ALL;
    const int past = first + N - width;
    return ALL & left & (past > 0 ? ALL >> min(past, N) : ALL);
}

// N columns of a row from `address` on, zeros where a bit of `inside` is clear.
template <int N>
__device__ __forceinline__ void load_row(u32 (&row)[N], u64 address, u32 inside) {
    if (inside == (1u << N) - 1) {
#pragma unroll
        for (int j = 0; j < N; j++) row[j] = load_32(address + j * POSITION);
    } else {
#pragma unroll
        for (int j = 0; j < N; j++) {
            row[j] = 0;
            if (inside >> j & 1) row[j] = load_32(address + j * POSITION);
        }
    }
}

template <int N>
__device__ __forceinline__ void unpack_row(float (&row)[N][2], const u32 (&packed)[N]) {
#pragma unroll
    for (int j = 0; j < N; j++) {
        row[j][0] = unpack_low(packed[j]);
        row[j][1] = unpack_high(packed[j]);
    }
}

__device__ __forceinline__ void store_row(const float (&row)[COLUMNS][2], u64 address, u32 inside) {
    constexpr u32 ALL = (1u << COLUMNS) - 1;
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        if (inside == ALL || (inside >> j & 1)) store_32(address + j * POSITION, pack(row[j][0], row[j][1]));
    }
}

struct Filters {
    float tap[3][3][2], bias[2];  // of two channels

    __device__ __forceinline__ static float read(const void* values, int index) {
#if WEIGHT16
        return unpack_low(reinterpret_cast<const u16*>(values)[index]);
#else
        return reinterpret_cast<const float*>(values)[index];
#endif
    }

    // weight (C, 3, 3), bias (C).
    __device__ __forceinline__ Filters(const void* weight, const void* offset, int channel) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
#pragma unroll
            for (int i = 0; i < 9; i++) tap[i / 3][i % 3][k] = read(weight, (channel + k) * 9 + i);
            bias[k] = BIAS ? read(offset, channel + k) : 0.f;
        }
    }
};

__device__ __forceinline__ float sigmoid(float v) { return rcp(1.f + ex2(v * -LOG2E)); }
