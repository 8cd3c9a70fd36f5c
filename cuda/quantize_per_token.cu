// int8 codes and one dynamic scale a row: v = x * smooth, a = max |v|, scale = a / 127, code = round(v * (127 / a)).
//
//   x [rows, k] of TYPE, contiguous    codes int8 [rows, k]    scale float32 [rows]    smooth float32 [k] or null
//
// With GELU, x is what the function is yet to be applied to; with GATED, rows have k values and then k gates, and it is
// value * gelu(gate) that is quantized. With NORM, x is what layer normalization is yet to be applied to (arXiv 1607.06450),
// with `gain` and `bias` of TYPE [k] or null. What comes before v is rounded to TYPE, as by layers one after the other.
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
// Macros: TYPE (dtype.cuh), LANES, VECTORS, THREADS (of a block, a multiple of LANES and of 32), GELU (0: none; gelu.cuh),
// GATED, NORM (with VECTORS alone).
#include "chunk.cuh"
#include "dependent.cuh"
#include "gelu.cuh"
#include "token_scale.cuh"

struct Params {
    const void* x;
#if NORM
    const void* gain;
    const void* bias;
#endif
    const float* smooth;
    signed char* codes;
    float* scale;
    int rows;
    int k;
#if NORM
    float epsilon;
#endif
};

// Blocks of a multiprocessor, as far as registers go.
constexpr int REGISTERS = TYPE == DTYPE_F32 || VECTORS == 0 ? 96 : (GELU || NORM ? 40 : 32) + (GATED ? 12 : 8) * VECTORS;
constexpr int RESIDENT = 65536 / REGISTERS / THREADS;
static_assert(THREADS % LANES == 0 && THREADS % 32 == 0, "a block is a whole number of rows and of warps");

// A number of each of a row's threads, brought together by `of_lanes` and `of_two`; the result is in all of them. Every
// thread of the block calls it. USE tells the calls of a kernel apart, so that none waits for another's memory.
template <int USE, class Number, class OfLanes, class OfTwo>
__device__ __forceinline__ Number of_row(Number number, OfLanes of_lanes, OfTwo of_two) {
    number = of_lanes(number);
    if constexpr (LANES > 32) {
        __shared__ Number of_warp[THREADS / 32];
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = number;
        __syncthreads();
        const int first = threadIdx.x / LANES * (LANES / 32);
        number = of_warp[first];
#pragma unroll
        for (int i = 1; i < LANES / 32; ++i) number = of_two(number, of_warp[first + i]);
    }
    return number;
}

__device__ __forceinline__ unsigned largest_of_row(unsigned bits) {
    return of_row<0>(bits, largest_of_lanes<(LANES < 32 ? LANES : 32)>, larger);
}

template <int USE>
__device__ __forceinline__ float sum_of_row(float v) {
    auto of_two = [](float a, float b) { return __fadd_rn(a, b); };
    auto of_lanes = [&](float sum) {
#pragma unroll
        for (int distance = (LANES < 32 ? LANES : 32) / 2; distance > 0; distance /= 2) {
            sum = of_two(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
        }
        return sum;
    };
    return of_row<USE>(v, of_lanes, of_two);
}

#if VECTORS > 0

#if NORM
// The variance from the differences to the mean, which no mean is too large for.
__device__ __forceinline__ void normalize(const Params& p, Chunk<TYPE> (&chunk)[VECTORS], int lane) {
    float sum = 0.0f, squares = 0.0f, value[8];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        floats_of(chunk[i], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += value[j];
    }
    const float mean = __fdiv_rn(sum_of_row<1>(sum), static_cast<float>(p.k));
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        floats_of(chunk[i], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (8 * (lane + i * LANES) < p.k) squares = __fmaf_rn(value[j] - mean, value[j] - mean, squares);
        }
    }
    const float scale = rsqrtf(__fdiv_rn(sum_of_row<2>(squares), static_cast<float>(p.k)) + p.epsilon);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int at = 8 * (lane + i * LANES);
        floats_of(chunk[i], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) value[j] = at < p.k ? (value[j] - mean) * scale : 0.0f;
        if (p.gain != nullptr) {
            float gain[8];
            floats_of(load_chunk<TYPE>(p.gain, at, at < p.k), gain);
            scale_by(value, gain);
        }
        if (p.bias != nullptr) {
            float bias[8];
            floats_of(load_chunk<TYPE>(p.bias, at, at < p.k), bias);
#pragma unroll
            for (int j = 0; j < 8; ++j) value[j] += bias[j];
        }
        chunk[i] = chunk_of<TYPE>(value);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) quantize_per_token(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    const int row = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const int lane = threadIdx.x % LANES;
    const long long start = static_cast<long long>(row) * p.k;
    Chunk<TYPE> chunk[VECTORS], gate[GATED ? VECTORS : 1];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int at = 8 * (lane + i * LANES);
        const bool valid = row < p.rows && at < p.k;
        chunk[i] = load_chunk<TYPE>(p.x, (1 + GATED) * start + at, valid);
        if (GATED) gate[i] = load_chunk<TYPE>(p.x, 2 * start + p.k + at, valid);
    }
#pragma unroll
    for (int i = 0; GELU && i < VECTORS; ++i) {
        chunk[i] = GATED ? gated<GELU>(chunk[i], gate[GATED ? i : 0]) : activated<GELU>(chunk[i]);
    }
#if NORM
    normalize(p, chunk, lane);
#endif
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
    float v = load_float(p.x, TYPE, (1 + GATED) * start + at);
    if (GELU) v = GATED ? gated<GELU, TYPE>(v, load_float(p.x, TYPE, 2 * start + p.k + at)) : activated<GELU, TYPE>(v);
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
