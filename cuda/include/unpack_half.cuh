// Packed weights to pairs of half-precision integers, in registers: B (or A) fragments of mma m16n8k16, exact.
//
// A number whose last places count in ones, 1024 for float16 and 128 for bfloat16, takes a few low bits as it is; one
// fused multiply-add then subtracts it, and multiplies on the way. HALF is DTYPE_F16 or DTYPE_BF16.
#pragma once

#include "half_pairs.cuh"
#include "unpack.cuh"

template <int HALF>
constexpr unsigned PAIR_BASE = HALF == DTYPE_F16 ? 0x64006400u : 0x43004300u;
template <int HALF>
constexpr unsigned PAIR_ONE = HALF == DTYPE_F16 ? 0x3c003c00u : 0x3f803f80u;

// (word & mask) | base, in one instruction: left to itself the compiler makes it two.
__device__ __forceinline__ unsigned masked_onto(unsigned word, unsigned mask, unsigned base) {
#ifdef QDIFF_EMULATE
    return (word & mask) | base;
#else
    unsigned d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "r"(mask), "r"(base));
    return d;
#endif
}

// What turns the nibbles of a block into m * (u - 8), for the low and for the high ones of a byte:
// (base + u) * m - (base + 8) * m. In float16 high nibbles are read in place: (base + 16 u) * (m / 16) - (base / 16 +
// 8) * m.
template <int HALF>
struct BlockMultiplier {
    unsigned low, low_offset, high, high_offset;

    __device__ __forceinline__ void set(unsigned multiplier) {
        const unsigned minus_base = PAIR_BASE<HALF> | 0x80008000u;
        low = pair_fma<HALF>(multiplier * 0x00010001u + PAIR_BASE<HALF>, PAIR_ONE<HALF>, minus_base);
        if constexpr (HALF == DTYPE_F16) {
            low_offset = pair_fma<HALF>(low, 0xe408e408u, 0);   // -1032
            high = pair_fma<HALF>(low, 0x2c002c00u, 0);         // 1 / 16
            high_offset = pair_fma<HALF>(low, 0xd480d480u, 0);  // -72
        } else {
            high = low;
            low_offset = high_offset = pair_fma<HALF>(low, 0xc308c308u, 0);  // -136
        }
    }
};

// Word c of a block: pair[0] is k 4c, 4c+2; pair[1] is 4c+1, 4c+3; pair[2] and pair[3] the same 16 later.
template <int HALF>
__device__ __forceinline__ void unpack_s4_half(unsigned (&pair)[4], unsigned word, const BlockMultiplier<HALF>& m) {
    constexpr unsigned HIGH = HALF == DTYPE_F16 ? 0x00f000f0u : 0x000f000fu;  // bfloat16 has no room for 16 u
    constexpr int DOWN = HALF == DTYPE_F16 ? 0 : 4;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
        const unsigned bytes = word >> (8 * odd);
        pair[odd] = pair_fma<HALF>(masked_onto(bytes, 0x000f000fu, PAIR_BASE<HALF>), m.low, m.low_offset);
        pair[odd + 2] = pair_fma<HALF>(masked_onto(bytes >> DOWN, HIGH, PAIR_BASE<HALF>), m.high, m.high_offset);
    }
}

// Four int8: pair[0] is bytes 0 and 2, pair[1] bytes 1 and 3. The base takes seven bits; a negative byte's is 128 more.
template <int HALF>
__device__ __forceinline__ void unpack_s8_half(unsigned* pair, unsigned bytes) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
        const unsigned two = bytes >> (8 * odd);
        const unsigned minus_base = masked_onto(two, 0x00800080u, PAIR_BASE<HALF> | 0x80008000u);
        pair[odd] = pair_fma<HALF>(masked_onto(two, 0x007f007fu, PAIR_BASE<HALF>), PAIR_ONE<HALF>, minus_base);
    }
}
