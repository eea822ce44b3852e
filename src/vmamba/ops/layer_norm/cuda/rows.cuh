// Rows of 16-bit values, LANES threads a row, eight channels each at a time, CHUNKS times: widths of 2^n and 3 2^n leave no
// thread idle.
//
// Compile-time parameters (set by the Python side):
//   BF16      1: 16-bit values are bfloat16, 0: float16
//   CHANNELS  of a row, a multiple of 8
//   LANES     threads that share a row, a power of two up to 32
//   CHUNKS    groups of eight channels that a thread takes of a row
//   THREADS   of a block
//   BLOCKS    that a multiprocessor should hold, which bounds the registers of a thread

constexpr int UNIT = 8;             // channels in 16 bytes
constexpr int ROWS = THREADS / LANES;
constexpr bool WHOLE = LANES * CHUNKS * UNIT == CHANNELS;

__device__ __forceinline__ void unpack_unit(float (&v)[UNIT], const uint4& packed) {
    const u32 words[UNIT / 2] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < UNIT / 2; i++) {
        v[2 * i] = unpack_low(words[i]);
        v[2 * i + 1] = unpack_high(words[i]);
    }
}

// Over the lanes of a row.
__device__ __forceinline__ float add_up(float v) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(~0u, v, distance);
    return v;
}
