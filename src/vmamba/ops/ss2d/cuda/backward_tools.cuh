// What the backward of SS2D needs of the hardware beyond common.cuh, which comes before this text.

// An 8 x 8 matrix of 16-bit values, row lane / 4 and columns 2 (lane % 4), transposed across the warp.
__device__ __forceinline__ u32 transpose8(u32 v) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) { return pack_as<true>(low, high); }

__device__ __forceinline__ void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void product(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.f));
}

__device__ __forceinline__ void product(float (&d)[4], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col." MMA_TYPES " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "f"(0.f));
}

__device__ __forceinline__ void add_product(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void add_product(float (&d)[4], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col." MMA_TYPES " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
}

__device__ __forceinline__ void mma_tf32(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Of many maps, whose float32 sum would err by more than their own sums do.
__device__ __forceinline__ void add_global(double* p, float v) {
    asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;" ::"l"(p), "d"(double(v)) : "memory");
}

// `p` is a multiple of 16 bytes.
__device__ __forceinline__ void add_global4(float* p, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
#else
    const float v[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p + i), "f"(v[i]) : "memory");
    }
#endif
}

// ---- sums in a fixed order: whoever has the ticket that a counter shows may add -------------------------------------

__device__ __forceinline__ void await_turn(const u32* counter, u32 ticket, int lane) {
    if (lane == 0) {
        u32 seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        } while (seen != ticket);
    }
    __syncwarp();
}

__device__ __forceinline__ void pass_turn(u32* counter, u32 ticket, int lane) {
    __threadfence();
    __syncwarp();
    if (lane == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(ticket + 1) : "memory");
}

// Keeps the compiler from spreading a 64-bit base over every address that is built on it.
__device__ __forceinline__ void pin(const char*& p) { asm("" : "+l"(p)); }

__device__ __forceinline__ float from_lane(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// What is read once before it is read anew long after should not push weights out of the small L1 cache.
__device__ __forceinline__ u32 load_once(const char* p) {
    u32 v;
    asm("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// 16 bytes from global to shared memory, on their way until `copies_arrived`; of `bytes` = 0 zeros.
__device__ __forceinline__ void copy16(char* to, const char* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copies_arrived() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
}

__device__ __forceinline__ void store_float2_if(bool yes, float2* p, float a, float b) {
    asm volatile("{.reg .pred q; setp.ne.s32 q, %0, 0; @q st.v2.f32 [%1], {%2, %3};}" ::"r"(int(yes)), "l"(p), "f"(a),
                 "f"(b)
                 : "memory");
}

__device__ __forceinline__ void store_u32_if(bool yes, char* p, u32 v) {
    asm volatile("{.reg .pred q; setp.ne.s32 q, %0, 0; @q st.global.b32 [%1], %2;}" ::"r"(int(yes)), "l"(p), "r"(v)
                 : "memory");
}

// Keeps a value from being computed anew at every use.
__device__ __forceinline__ void pin(float& v) { asm("" : "+f"(v)); }

// ---- clusters -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What lies at `p`, an address of this block's shared memory, in that of another block of the cluster.
__device__ __forceinline__ float load_peer(const float* p, u32 rank) {
    float v;
    asm volatile("{.reg .b32 remote; mapa.shared::cluster.u32 remote, %1, %2; ld.shared::cluster.f32 %0, [remote];}"
                 : "=f"(v)
                 : "r"(u32(__cvta_generic_to_shared(p))), "r"(rank)
                 : "memory");
    return v;
}
