// Values of 16 bits, special functions and loads, for every kernel in CUDA. The loader puts this text before theirs; no
// header is included, so that nothing but NVRTC is needed.
//
// Compile-time parameter (set by the Python side):
//   BF16   1: 16-bit values are bfloat16, 0: float16

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ __forceinline__ float ex2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

__device__ __forceinline__ float lg2(float v) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

__device__ __forceinline__ float rcp(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// ---- 16-bit values -------------------------------------------------------------------------------------------------

__device__ __forceinline__ float unpack_low(u32 v) {
#if BF16
    return __uint_as_float(v << 16);
#else
    float r;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(r) : "r"(v));
    return r;
#endif
}

__device__ __forceinline__ float unpack_high(u32 v) {
#if BF16
    return __uint_as_float(v & 0xffff0000u);
#else
    float r;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(v));
    return r;
#endif
}

template <bool TO_BF16>
__device__ __forceinline__ u32 pack_as(float low, float high) {
    u32 r;
    if (TO_BF16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    }
    return r;
}

__device__ __forceinline__ u32 pack(float low, float high) { return pack_as<BF16>(low, high); }

// base + position * stride bytes; an offset inside one image may pass 4 GiB. In this form it is one instruction.
__device__ __forceinline__ u64 at(u64 base, u32 position, u32 stride) {
    u64 offset;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(offset) : "r"(position), "r"(stride));
    return base + offset;
}

__device__ __forceinline__ u32 load_32(u64 address) {
    u32 r;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(r) : "l"(address));
    return r;
}

__device__ __forceinline__ u32 load_16(u64 address) {
    u16 r;
    asm volatile("ld.global.nc.b16 %0, [%1];" : "=h"(r) : "l"(address));
    return r;
}

__device__ __forceinline__ uint2 load_64(u64 address) {
    uint2 r;
    asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(address));
    return r;
}

__device__ __forceinline__ void store_32(u64 address, u32 v) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

// Keeps an address in one register pair, so that the additions above stay single instructions.
__device__ __forceinline__ void pin(u64& address) { asm("" : "+l"(address)); }

// Keeps the compiler from computing a value again, or from using what it knows of it.
__device__ __forceinline__ void pin(u32& value) { asm volatile("" : "+r"(value)); }

// Two 16-bit values. ALIGNED: adjacent, at a multiple of 4 bytes; otherwise the second is `distance` bytes on.
template <bool ALIGNED>
__device__ __forceinline__ u32 load_pair(u64 address, u32 distance) {
    return ALIGNED ? load_32(address) : load_16(address) | (load_16(address + distance) << 16);
}
