// Eight consecutive values of a compile-time type: loaded in pieces of 16 bytes, as floats, and on to int8 codes.
#pragma once

#include "dtype.cuh"

template <int DATA>
struct Chunk {
    static constexpr int WORDS = DATA == DTYPE_F32 ? 8 : 4;
    unsigned word[WORDS];
};

// A read that leaves the L1 cache to what is read more than once. The address is a multiple of 16.
__device__ __forceinline__ uint4 load_once(const void* address) {
#ifdef QDIFF_EMULATE
    return *static_cast<const uint4*>(address);
#else
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address));
    return v;
#endif
}

// Values index..index + 7, or zeros.
template <int DATA>
__device__ __forceinline__ Chunk<DATA> load_chunk(const void* data, long long index, bool valid) {
    constexpr int WORDS = Chunk<DATA>::WORDS;
    Chunk<DATA> chunk;
    const char* start = static_cast<const char*>(data) + index * (WORDS / 2);
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
        const uint4 v = valid ? load_once(start + 4 * i) : make_uint4(0, 0, 0, 0);
        chunk.word[i] = v.x, chunk.word[i + 1] = v.y, chunk.word[i + 2] = v.z, chunk.word[i + 3] = v.w;
    }
    return chunk;
}

// The same of what other rows want too: through the L1 cache.
template <int DATA>
__device__ __forceinline__ Chunk<DATA> load_cached(const void* data, int index, bool valid) {
    constexpr int WORDS = Chunk<DATA>::WORDS;
    Chunk<DATA> chunk;
    const uint4* const start = reinterpret_cast<const uint4*>(static_cast<const char*>(data) + index * (WORDS / 2));
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
        const uint4 v = valid ? __ldg(start + i / 4) : make_uint4(0, 0, 0, 0);
        chunk.word[i] = v.x, chunk.word[i + 1] = v.y, chunk.word[i + 2] = v.z, chunk.word[i + 3] = v.w;
    }
    return chunk;
}

template <int DATA>
__device__ __forceinline__ void floats_of(const Chunk<DATA>& chunk, float (&value)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if constexpr (DATA == DTYPE_F32) {
            value[i] = __uint_as_float(chunk.word[i]);
        } else if constexpr (DATA == DTYPE_BF16) {
            value[i] = __uint_as_float(i % 2 ? chunk.word[i / 2] & 0xffff0000u : chunk.word[i / 2] << 16);
        } else {
            value[i] = float_of_bits(static_cast<unsigned short>(chunk.word[i / 2] >> (16 * (i % 2))), DATA);
        }
    }
}

// COUNT factors of a float32 vector from `index` on, read through the cache, for other rows want them too; ones without
// one. COUNT and `index` are multiples of 4.
template <int COUNT>
__device__ __forceinline__ void load_factors(float (&factor)[COUNT], const float* factors, int index, bool valid) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        float4 f = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
        if (factors != nullptr && valid) f = __ldg(reinterpret_cast<const float4*>(factors + index + i));
        factor[i] = f.x, factor[i + 1] = f.y, factor[i + 2] = f.z, factor[i + 3] = f.w;
    }
}

__device__ __forceinline__ void scale_by(float (&value)[8], const float (&factor)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = __fmul_rn(value[i], factor[i]);
}

// v rounded to an integer, half to even, as a two's complement number in the low byte: adding 1.5 * 2^23 leaves no
// bits for a fraction. |v| < 2^22.
__device__ __forceinline__ unsigned code_of(float v) { return __float_as_uint(__fadd_rn(v, 12582912.0f)); }

// The low bytes of four words, the first lowest.
__device__ __forceinline__ unsigned low_bytes(unsigned a, unsigned b, unsigned c, unsigned d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// The low bytes of eight words.
__device__ __forceinline__ uint2 packed(const unsigned (&code)[8]) {
    return make_uint2(low_bytes(code[0], code[1], code[2], code[3]), low_bytes(code[4], code[5], code[6], code[7]));
}

// The codes of value * factor, the product rounded to float32.
__device__ __forceinline__ uint2 codes_of(const float (&value)[8], float factor) {
    unsigned code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = code_of(__fmul_rn(value[i], factor));
    return packed(code);
}
