// Plain sequences for the kernels of backward_states.cu, which comes before this.

// ---- channels side by side, and back --------------------------------------------------------------------------------

// A block: 32 channels of 32 positions.
struct Turn {
    u32 sequence;
    int position, channel, lane, warp;

    __device__ __forceinline__ explicit Turn(const Problem& p) {
        const u32 across = p.groups, along = (p.length + TILE - 1) / TILE;
        channel = blockIdx.x % across * 32;
        position = blockIdx.x / across % along * TILE;
        sequence = blockIdx.x / across / along;
        lane = threadIdx.x % 32;
        warp = threadIdx.x / 32;
    }
};

extern "C" __global__ void __launch_bounds__(256) ss2d_states_gather(const __grid_constant__ Problem p) {
    __shared__ float us[32][33], deltas[32][33], dys[32][33];
    const Turn turn(p);
    const u64 from = (u64(turn.sequence) * p.channels + turn.channel) * p.length + turn.position + turn.lane;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = 8 * i + turn.warp;
        if (turn.position + turn.lane < p.length && turn.channel + row < p.channels) {
            const u64 index = from + u64(row) * p.length;
            us[row][turn.lane] = widen(p.u[index]);
            deltas[row][turn.lane] = widen(p.delta[index]);
            dys[row][turn.lane] = p.sequences_dy[index];
        }
    }
    __syncthreads();
    const int channel = turn.channel + turn.lane;
    if (channel >= p.channels) return;
    const float bias = p.bias[turn.sequence % p.routes * p.channels + channel];
    u16* x = const_cast<u16*>(p.x);
    float* dy = reinterpret_cast<float*>(const_cast<void*>(p.dy));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = 8 * i + turn.warp;
        if (turn.position + row < p.length) {
            const u64 index = (u64(turn.sequence) * p.length + turn.position + row) * p.channels + channel;
            x[index] = u16(pack(us[turn.lane][row], 0.f));
            p.raw[index] = (deltas[turn.lane][row] + bias) * LOG2E;
            dy[index] = dys[turn.lane][row];
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) ss2d_states_scatter(const __grid_constant__ Problem p) {
    __shared__ float dus[32][33], ddeltas[32][33];
    const Turn turn(p);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = 8 * i + turn.warp;
        if (turn.position + row < p.length && turn.channel + turn.lane < p.channels) {
            const u64 position = u64(turn.sequence) * p.length + turn.position + row;
            dus[row][turn.lane] = p.dx[position * p.channels + turn.channel + turn.lane];
            ddeltas[row][turn.lane] = p.raw[position * p.channels + turn.channel + turn.lane];
        }
    }
    __syncthreads();
    if (turn.position + turn.lane >= p.length) return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = 8 * i + turn.warp;
        if (turn.channel + row < p.channels) {
            const u64 line = u64(turn.sequence) * p.channels + turn.channel + row;
            p.du[line * p.length + turn.position + turn.lane] = u16(pack(dus[turn.lane][row], 0.f));
            p.ddelta[line * p.length + turn.position + turn.lane] = u16(pack(ddeltas[turn.lane][row], 0.f));
        }
    }
}
