// x times the normal distribution's cumulative function, Gaussian error linear units (arXiv 1606.08415), and values gated
// by them (GEGLU, arXiv 2002.05202).
#pragma once

#include "chunk.cuh"
#include "fast_math.cuh"

// KIND 1: to 1.5e-7 |x| (Abramowitz and Stegun, 7.1.26); 2: the approximation by tanh of the paper, whose
// 0.5 (1 + tanh u) is 1 / (1 + exp(-2u)).
template <int KIND>
__device__ __forceinline__ float gelu(float x) {
    if (KIND == 2) return x * fast_reciprocal(1.0f + fast_exp2(x * __fmaf_rn(-0.1029432397f, x * x, -2.302208198f)));
    const float z = 0.70710678f * fabsf(x), t = fast_reciprocal(__fmaf_rn(0.3275911f, z, 1.0f));
    float sum = __fmaf_rn(1.061405429f, t, -1.453152027f);
    sum = __fmaf_rn(sum, t, 1.421413741f);
    sum = __fmaf_rn(sum, t, -0.284496736f);
    sum = __fmaf_rn(sum, t, 0.254829592f);
    const float beyond = 0.70710678f * z * t * sum * fast_exp2(-1.44269504f * z * z);  // |x| times what is beyond it
    return x > 0.0f ? x - beyond : -beyond;
}

template <int DATA>
__device__ __forceinline__ float rounded(float v) {
    return DATA == DTYPE_F32 ? v : float_of_bits(bits_of_float(v, DATA), DATA);
}

template <int KIND, int DATA>
__device__ __forceinline__ float activated(float v) {
    return rounded<DATA>(gelu<KIND>(v));
}

template <int KIND, int DATA>
__device__ __forceinline__ float gated(float v, float gate) {
    return rounded<DATA>(__fmul_rn(v, activated<KIND, DATA>(gate)));
}

template <int DATA>
__device__ __forceinline__ Chunk<DATA> chunk_of(const float (&value)[8]) {
    Chunk<DATA> chunk;
#pragma unroll
    for (int i = 0; i < Chunk<DATA>::WORDS; ++i) {
        if constexpr (DATA == DTYPE_F32) {
            chunk.word[i] = __float_as_uint(value[i]);
        } else {
            chunk.word[i] = bits_of_float(value[2 * i], DATA) | static_cast<unsigned>(bits_of_float(value[2 * i + 1], DATA)) << 16;
        }
    }
    return chunk;
}

template <int KIND, int DATA>
__device__ __forceinline__ Chunk<DATA> activated(const Chunk<DATA>& chunk) {
    float value[8];
    floats_of(chunk, value);
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = activated<KIND, DATA>(value[i]);
    return chunk_of<DATA>(value);
}

template <int KIND, int DATA>
__device__ __forceinline__ Chunk<DATA> gated(const Chunk<DATA>& chunk, const Chunk<DATA>& gates) {
    float value[8], gate[8];
    floats_of(chunk, value);
    floats_of(gates, gate);
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = gated<KIND, DATA>(value[i], gate[i]);
    return chunk_of<DATA>(value);
}
