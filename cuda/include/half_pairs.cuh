// Two half-precision numbers in a word, the first in the low half: the operands of the half-precision mma.
//
// HALF is DTYPE_F16 or DTYPE_BF16 throughout.
#pragma once

#include "dtype.cuh"
#include "ptx.cuh"

// Both values rounded to nearest, ties to even.
template <int HALF>
__device__ __forceinline__ unsigned pair_of(float first, float second) {
    return bits_of_float(first, HALF) | static_cast<unsigned>(bits_of_float(second, HALF)) << 16;
}

// a * b + c with one rounding.
template <int HALF>
__device__ __forceinline__ unsigned pair_fma(unsigned a, unsigned b, unsigned c) {
#ifdef QDIFF_EMULATE
    unsigned result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float x = float_of_bits(static_cast<unsigned short>(a >> shift), HALF);
        const float y = float_of_bits(static_cast<unsigned short>(b >> shift), HALF);
        const float z = float_of_bits(static_cast<unsigned short>(c >> shift), HALF);
        const float sum = x * y + z;  // exact for the small integers it is used for
        result |= static_cast<unsigned>(bits_of_float(sum, HALF)) << shift;
    }
    return result;
#else
    unsigned d;
    if constexpr (HALF == DTYPE_F16) {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    }
    return d;
#endif
}

// d += a * b, 16 x 8 x 16, in float32.
template <int HALF>
__device__ __forceinline__ void mma_half(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef HAS_MMA_BF16
    if constexpr (HALF == DTYPE_BF16) {
        mma_bf16(d, a, b0, b1);
        return;
    }
#else
    static_assert(HALF == DTYPE_F16, "this architecture has no bfloat16 mma");
#endif
    mma_f16(d, a, b0, b1);
}
