// The dynamic scale of a token, from the largest magnitude of its row.
//
// Magnitudes are compared as integers: the bits of non-negative floats are in the floats' order, with infinity above
// all numbers and NaN above infinity, so a row with NaN keeps it.
#pragma once

__device__ __forceinline__ unsigned magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

__device__ __forceinline__ unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

__device__ __forceinline__ unsigned from_lane(unsigned v, int distance) { return __shfl_xor_sync(0xffffffffu, v, distance); }
__device__ __forceinline__ float2 from_lane(float2 v, int distance) {
    return make_float2(__shfl_xor_sync(0xffffffffu, v.x, distance), __shfl_xor_sync(0xffffffffu, v.y, distance));
}

// The numbers of `COUNT` neighbouring lanes, a power of two up to 32, brought together two by two, in each of them.
template <int COUNT, class Number, class Together>
__device__ __forceinline__ Number of_lanes(Number number, Together together) {
#pragma unroll
    for (int distance = COUNT / 2; distance > 0; distance /= 2) number = together(number, from_lane(number, distance));
    return number;
}

template <int COUNT>
__device__ __forceinline__ unsigned largest_of_lanes(unsigned bits) {
    return of_lanes<COUNT>(bits, larger);
}

// Below 1e-30, 127 / absmax would overflow: such rows get the step of that magnitude. NaN passes.
__device__ __forceinline__ float token_step(unsigned absmax) {
    const float largest = __uint_as_float(absmax);
    return largest < 1e-30f ? 1e-30f : largest;
}

// 127 / step in two roundings, for that is how torch divides a number by a tensor.
__device__ __forceinline__ float token_factor(unsigned absmax) {
    return __fmul_rn(127.0f, __fdiv_rn(1.0f, token_step(absmax)));
}

// A row of zeros has scale 1.
__device__ __forceinline__ float token_scale(unsigned absmax) {
    return absmax == 0 ? 1.0f : __fdiv_rn(token_step(absmax), 127.0f);
}
