// int8 codes and one dynamic scale a row: v = x * smooth, a = max |v|, scale = a / 127, code = round(v * (127 / a)).
//
//   x [rows, k] of TYPE, contiguous    codes int8 [rows, k]    scale float32 [rows]    smooth float32 [k] or null
//
// LANES threads (a power of two up to a warp, or whole warps) own a row. Thread l holds the row's chunks of eight values
// l, l + LANES, ..., VECTORS of them at most, in registers from the load to the store, so device memory is passed once:
//
//       lane   0 1 2 3 .. L-1 | 0 1 2 3 .. L-1 | 0 1 ..
//       chunk  0 1 2 3 ..  L-1  L L+1 ..                      a warp reads 512 bytes and writes 256 at a time
//
// VECTORS = 0 is for rows that are no whole number of aligned chunks, or too long for the registers: value by value,
// in two passes, the second of them from a cache. Any architecture.
//
// Registers set how many rows a multiprocessor has under way: it needs two at the least, one that is loaded while the
// other is stored.
//
// Macros: TYPE (dtype.cuh), LANES, VECTORS, THREADS (of a block, a multiple of LANES and of 32).
#include "chunk.cuh"
#include "dependent.cuh"
#include "token_scale.cuh"

struct Params {
    const void* x;
    const float* smooth;
    signed char* codes;
    float* scale;
    int rows;
    int k;
};

// Blocks of a multiprocessor, as far as registers go.
constexpr int REGISTERS = TYPE == DTYPE_F32 || VECTORS == 0 ? 96 : 32 + 8 * VECTORS;
constexpr int RESIDENT = 65536 / REGISTERS / THREADS;
static_assert(THREADS % LANES == 0 && THREADS % 32 == 0, "a block is a whole number of rows and of warps");

// The largest of a row's magnitudes, in each of its threads. Every thread of the block calls it.
__device__ __forceinline__ unsigned largest_of_row(unsigned bits) {
    if constexpr (LANES <= 32) return largest_of_lanes<LANES>(bits);
    constexpr int WARPS = LANES > 32 ? LANES / 32 : 1;
    __shared__ unsigned of_warp[THREADS / 32];
    bits = largest_of_lanes<32>(bits);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = bits;
    __syncthreads();
    const int first = threadIdx.x / LANES * WARPS;
    bits = of_warp[first];
#pragma unroll
    for (int i = 1; i < WARPS; ++i) bits = larger(bits, of_warp[first + i]);
    return bits;
}

#if VECTORS > 0

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) quantize_per_token(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    const int row = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const int lane = threadIdx.x % LANES;
    const long long start = static_cast<long long>(row) * p.k;
    Chunk<TYPE> chunk[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int at = 8 * (lane + i * LANES);
        chunk[i] = load_chunk<TYPE>(p.x, start + at, row < p.rows && at < p.k);
    }
    float value[VECTORS][8];
    unsigned absmax = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int at = 8 * (lane + i * LANES);
        float factor[8];
        load_factors(factor, p.smooth, at, at < p.k);
        floats_of(chunk[i], value[i]);
        scale_by(value[i], factor);
#pragma unroll
        for (int j = 0; j < 8; ++j) absmax = larger(absmax, magnitude(value[i][j]));
    }
    absmax = largest_of_row(absmax);
    if (row >= p.rows) return;
    const float factor = token_factor(absmax);
    if (lane == 0) p.scale[row] = token_scale(absmax);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int at = 8 * (lane + i * LANES);
        if (at < p.k) *reinterpret_cast<uint2*>(p.codes + start + at) = codes_of(value[i], factor);
    }
}

#else

__device__ __forceinline__ float smoothed(const Params& p, long long start, int at) {
    const float v = load_float(p.x, TYPE, start + at);
    return p.smooth == nullptr ? v : __fmul_rn(v, __ldg(p.smooth + at));
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) quantize_per_token(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    const int row = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const int lane = threadIdx.x % LANES;
    const long long start = static_cast<long long>(row) * p.k;
    const int count = row < p.rows ? p.k : 0;
    unsigned absmax = 0;
#pragma unroll 4
    for (int at = lane; at < count; at += LANES) absmax = larger(absmax, magnitude(smoothed(p, start, at)));
    absmax = largest_of_row(absmax);
    const float factor = token_factor(absmax);
    if (lane == 0 && row < p.rows) p.scale[row] = token_scale(absmax);
#pragma unroll 4
    for (int at = lane; at < count; at += LANES) {
        p.codes[start + at] = static_cast<signed char>(code_of(__fmul_rn(smoothed(p, start, at), factor)));
    }
}

#endif
