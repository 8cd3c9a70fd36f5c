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
constexpr int OF_VECTOR = GATED ? 12 : NORM ? 16 : 8;
constexpr int REGISTERS = TYPE == DTYPE_F32 || VECTORS == 0 ? (NORM ? 200 : 96) : (GELU ? 64 : NORM ? 40 : 32) + OF_VECTOR * VECTORS;
constexpr int RESIDENT = 65536 / REGISTERS / THREADS;
static_assert(THREADS % LANES == 0 && THREADS % 32 == 0, "a block is a whole number of rows and of warps");

// A number of each of a row's threads, brought together two by two; the result is in all of them. Every thread of the
// block calls it, once for each type of number.
template <class Number, class Together>
__device__ __forceinline__ Number of_row(Number number, Together together) {
    number = of_lanes<(LANES < 32 ? LANES : 32)>(number, together);
    if constexpr (LANES > 32) {
        __shared__ Number of_warp[THREADS / 32];
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = number;
        __syncthreads();
        const int first = threadIdx.x / LANES * (LANES / 32);
        number = of_warp[first];
#pragma unroll
        for (int i = 1; i < LANES / 32; ++i) number = together(number, of_warp[first + i]);
    }
    return number;
}

// The largest of a row's magnitudes.
__device__ __forceinline__ unsigned largest_of_row(unsigned bits) { return of_row(bits, larger); }

__device__ __forceinline__ float2 sums_of_row(float2 sums) {
    return of_row(sums, [](float2 a, float2 b) { return make_float2(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y)); });
}

#if VECTORS > 0

#if NORM
// Sums of the differences to the row's first value: no mean is too large for them. Where that value is the row's outlier,
// the variance is off by up to k 2^-24 of itself.
__device__ __forceinline__ void normalize(const Params& p, long long start, Chunk<TYPE> (&chunk)[VECTORS], int lane) {
    // Asked for before the sums are there.
    Chunk<TYPE> gain[VECTORS], bias[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int at = 8 * (lane + i * LANES);
        gain[i] = load_cached<TYPE>(p.gain, at, p.gain != nullptr && at < p.k);
        bias[i] = load_cached<TYPE>(p.bias, at, p.bias != nullptr && at < p.k);
    }
    const float first = load_float(p.x, TYPE, start);
    float2 sums = make_float2(0.0f, 0.0f);
    float value[8];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        floats_of(chunk[i], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float difference = 8 * (lane + i * LANES) < p.k ? value[j] - first : 0.0f;
            sums.x += difference;
            sums.y = __fmaf_rn(difference, difference, sums.y);
        }
    }
    sums = sums_of_row(sums);
    const float count = static_cast<float>(p.k), mean = __fdiv_rn(sums.x, count);
    const float scale = rsqrtf(fmaxf(__fdiv_rn(sums.y, count) - mean * mean, 0.0f) + p.epsilon);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const bool valid = 8 * (lane + i * LANES) < p.k;
        float factor[8];
        floats_of(chunk[i], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) value[j] = valid ? (value[j] - first - mean) * scale : 0.0f;
        if (p.gain != nullptr) {
            floats_of(gain[i], factor);
            scale_by(value, factor);
        }
        if (p.bias != nullptr) {
            floats_of(bias[i], factor);
#pragma unroll
            for (int j = 0; j < 8; ++j) value[j] += factor[j];
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
    normalize(p, row < p.rows ? start : 0, chunk, lane);
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
