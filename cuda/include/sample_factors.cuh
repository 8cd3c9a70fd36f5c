// Codes with given scales, one a sample and channel segment: code = clamp(round(x * r), -127, 127) with
// r[b, c] = smooth[c] / max(scale[b, segment of c], 1e-30).
//
// P is a kernel's parameter, which has
//
//   const float* scale;      [rows, segments]
//   const float* smooth;     [channels] or null
//   int channels, segments;  up to 8 segments, or `channels` of them
//   int ends[MAX_SEGMENTS];  of up to 8 segments, in channels
#pragma once

#include "chunk.cuh"

constexpr int MAX_SEGMENTS = 8;

// Of COUNT neighbouring channels of one segment; `row` is the sample's of `scale`.
template <int COUNT, class P>
__device__ __forceinline__ void load_channel_factors(float (&factor)[COUNT], const P& p, int row, int channel) {
    int segment = channel;
    if (p.segments != p.channels) {
        segment = 0;
#pragma unroll
        for (int i = 0; i < MAX_SEGMENTS - 1; ++i) segment += channel >= p.ends[i];
    }
    const float scale = __ldg(p.scale + row * p.segments + segment);
    if constexpr (COUNT == 1) {
        factor[0] = p.smooth == nullptr ? 1.0f : __ldg(p.smooth + channel);
    } else {
        load_factors(factor, p.smooth, channel, true);
    }
    const float step = scale < 1e-30f ? 1e-30f : scale;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) factor[i] = __fdiv_rn(factor[i], step);
}

// The low byte is the code.
__device__ __forceinline__ unsigned clamped_code(float v, float factor) {
    return code_of(fminf(fmaxf(__fmul_rn(v, factor), -127.0f), 127.0f));
}
