// Values whose type is known at run time only: loaded as float32, stored with one rounding (to nearest, ties to even).
#pragma once

#ifdef QDIFF_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

constexpr int DTYPE_F32 = 0;
constexpr int DTYPE_F16 = 1;
constexpr int DTYPE_BF16 = 2;
constexpr int DTYPE_I32 = 3;  // outputs only: the bits of an accumulator, carried in a float

__device__ __forceinline__ int dtype_bytes(int dtype) { return dtype == DTYPE_F16 || dtype == DTYPE_BF16 ? 2 : 4; }

__device__ __forceinline__ float float_of_bits(unsigned short bits, int dtype) {
    return dtype == DTYPE_F16 ? __half2float(__ushort_as_half(bits)) : __bfloat162float(__ushort_as_bfloat16(bits));
}

__device__ __forceinline__ unsigned short bits_of_float(float value, int dtype) {
    return dtype == DTYPE_F16 ? __half_as_ushort(__float2half_rn(value))
                              : __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ __forceinline__ float load_float(const void* data, int dtype, long long index) {
    if (dtype == DTYPE_F32) return __ldg(static_cast<const float*>(data) + index);
    return float_of_bits(__ldg(static_cast<const unsigned short*>(data) + index), dtype);
}

__device__ __forceinline__ void store_float(void* data, int dtype, long long index, float value) {
    if (dtype_bytes(dtype) == 4) {
        static_cast<float*>(data)[index] = value;
    } else {
        static_cast<unsigned short*>(data)[index] = bits_of_float(value, dtype);
    }
}

// The first `count` of eight consecutive values; in pieces of 16 bytes where all are wanted and aligned.
__device__ __forceinline__ void load_floats(float (&value)[8], const void* data, int dtype, long long index,
                                            int count) {
    const char* start = static_cast<const char*>(data) + index * dtype_bytes(dtype);
    if (count < 8 || reinterpret_cast<unsigned long long>(start) % 16 != 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = i < count ? load_float(data, dtype, index + i) : 0.0f;
    } else if (dtype == DTYPE_F32) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 four = __ldg(reinterpret_cast<const float4*>(start) + i);
            value[4 * i] = four.x, value[4 * i + 1] = four.y, value[4 * i + 2] = four.z, value[4 * i + 3] = four.w;
        }
    } else {
        const uint4 eight = __ldg(reinterpret_cast<const uint4*>(start));
        const unsigned words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            value[2 * i] = float_of_bits(static_cast<unsigned short>(words[i] & 0xffffu), dtype);
            value[2 * i + 1] = float_of_bits(static_cast<unsigned short>(words[i] >> 16), dtype);
        }
    }
}

// The counterpart of `load_floats`.
__device__ __forceinline__ void store_floats(const float (&value)[8], void* data, int dtype, long long index,
                                             int count) {
    char* start = static_cast<char*>(data) + index * dtype_bytes(dtype);
    if (count < 8 || reinterpret_cast<unsigned long long>(start) % 16 != 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i < count) store_float(data, dtype, index + i, value[i]);
        }
    } else if (dtype_bytes(dtype) == 4) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            reinterpret_cast<float4*>(start)[i] =
                make_float4(value[4 * i], value[4 * i + 1], value[4 * i + 2], value[4 * i + 3]);
        }
    } else {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] = bits_of_float(value[2 * i], dtype) |
                       static_cast<unsigned>(bits_of_float(value[2 * i + 1], dtype)) << 16;
        }
        *reinterpret_cast<uint4*>(start) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}
