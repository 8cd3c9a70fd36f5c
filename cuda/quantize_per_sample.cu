// int8 codes with given scales, one a sample and channel segment: code = clamp(round(x * r), -127, 127) with
// r[b, c] = smooth[c] / max(scale[b, segment of c], 1e-30).
//
//   x of TYPE: [batch, pixels, channels], or with TRANSPOSE [batch, channels, pixels]
//   codes int8 [batch, pixels, channels]; all contiguous    scale float32 [rows, segments]    smooth float32 or null
//
// A block has a run of pixels of one sample.
//
// Channels last in, channels last out (TRANSPOSE = 0): a thread owns VALUES channels, whose factors it keeps in
// registers, and every `lanes`-th pixel of the run; it asks for UNROLL of them at once, before it computes the factors.
//
//            c 0..7     8..15      ...
//   pixel 0  thread 0   1          ...  columns - 1           blockIdx.y: which `columns` chunks of the channels, where
//   pixel 1  columns    columns+1  ...                        a block has not room for all; x: sample, z: run
//
// Channels first in (TRANSPOSE = 1): a run is 64 pixels, blockIdx.x = sample * runs + run, blockIdx.y picks 64 channels.
// A thread reads 8 pixels of 4 neighbouring channels; the 4 codes of a pixel are one word of shared memory (64 pixels x
// 17 words, the 17th against bank conflicts: 4352 bytes).
//
// Any architecture. VALUES = 1 is for sizes and addresses that the 8-value chunks do not fit: segments that are no
// multiples of 8, and with TRANSPOSE pixels that are none or channels that are none of 16.
//
// Macros: TYPE (dtype.cuh), TRANSPOSE, VALUES (8 or 1). A block has up to 256 threads; 128 with TRANSPOSE.
#include "dependent.cuh"
#include "sample_factors.cuh"

constexpr int UNROLL = 4;  // loads of a thread that are under way at once

struct Params {
    const void* x;
    const float* scale;
    const float* smooth;
    signed char* codes;
    int channels;
    int pixels;
    int samples_per_row;
    int segments;            // up to 8, or `channels`
    int ends[MAX_SEGMENTS];  // of up to 8 segments, in channels
    int columns, lanes;      // TRANSPOSE = 0, and so the next one
    int inverse;             // 65536 / columns, rounded up: below 256, division is a multiplication
    int run;                 // pixels of a block
    int runs;                // of a sample
};

#if !TRANSPOSE

#if VALUES == 8
using Loaded = Chunk<TYPE>;
#else
using Loaded = float;
#endif

// Of this thread's next pixels, the first of which is at `at`, those before `end`.
__device__ __forceinline__ void load_pixels(Loaded (&x)[UNROLL], const Params& p, long long at, int first, int end) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        if (first + u * p.lanes >= end) continue;
#if VALUES == 8
        x[u] = load_chunk<TYPE>(p.x, at + u * p.lanes * p.channels, true);
#else
        x[u] = load_float(p.x, TYPE, at + u * p.lanes * p.channels);
#endif
    }
}

__device__ __forceinline__ void store_codes(signed char* to, const Loaded& x, const float (&factor)[VALUES]) {
#if VALUES == 8
    float value[8];
    unsigned code[8];
    floats_of(x, value);
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = clamped_code(value[i], factor[i]);
    *reinterpret_cast<uint2*>(to) = packed(code);
#else
    *to = static_cast<signed char>(clamped_code(x, factor[0]));
#endif
}

constexpr int RESIDENT = TYPE == DTYPE_F32 ? 3 : 5;  // blocks of a multiprocessor, as far as registers go

extern "C" __global__ void __launch_bounds__(256, RESIDENT) quantize_per_sample(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    const int sample = blockIdx.x, run = blockIdx.z;
    const int lane = threadIdx.x * p.inverse >> 16, column = threadIdx.x - lane * p.columns;
    const int channel = VALUES * (blockIdx.y * p.columns + column);
    if (lane >= p.lanes || channel >= p.channels) return;
    const int end = min(p.pixels, (run + 1) * p.run);
    int first = run * p.run + lane;
    long long at = (static_cast<long long>(sample) * p.pixels + first) * p.channels + channel;
    Loaded x[UNROLL];
    load_pixels(x, p, at, first, end);
    float factor[VALUES];
    load_channel_factors(factor, p, sample, channel);
    while (true) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            if (first >= end) return;
            store_codes(p.codes + at, x[u], factor);
            first += p.lanes;
            at += p.lanes * p.channels;
        }
        load_pixels(x, p, at, first, end);
    }
}

#else

constexpr int TILE = 64;
constexpr int RESIDENT = VALUES == 8 ? 6 : 4;  // blocks of a multiprocessor, as far as registers go
constexpr int STRIDE = TILE / 4 + 1;  // words of a pixel in shared memory
constexpr int THREADS = TILE / 4 * (TILE / 8);

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) quantize_per_sample(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    __shared__ unsigned tile[TILE][STRIDE];
    const int sample = blockIdx.x / p.runs;
    const int first_pixel = TILE * (blockIdx.x % p.runs), first_channel = TILE * blockIdx.y;
    const long long start = static_cast<long long>(sample) * p.pixels * p.channels;

    const int local_pixel = 8 * (threadIdx.x % (TILE / 8)), quad = threadIdx.x / (TILE / 8);
    const int pixel = first_pixel + local_pixel, channel = first_channel + 4 * quad;
    const int row = sample / p.samples_per_row;
    float value[4][8], factor[4];
#if VALUES == 8
    Chunk<TYPE> chunk[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const bool valid = pixel < p.pixels && channel < p.channels;
        chunk[c] = load_chunk<TYPE>(p.x, start + static_cast<long long>(channel + c) * p.pixels + pixel, valid);
    }
    load_channel_factors(factor, p, row, min(channel, p.channels - 4));
#pragma unroll
    for (int c = 0; c < 4; ++c) floats_of(chunk[c], value[c]);
#else
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const bool valid = pixel + i < p.pixels && channel + c < p.channels;
            const long long at = start + static_cast<long long>(channel + c) * p.pixels + pixel + i;
            value[c][i] = valid ? load_float(p.x, TYPE, at) : 0.0f;
        }
        float one[1];
        load_channel_factors(one, p, row, min(channel + c, p.channels - 1));
        factor[c] = one[0];
    }
#endif
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        unsigned code[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) code[c] = clamped_code(value[c][i], factor[c]);
        tile[local_pixel + i][quad] = low_bytes(code[0], code[1], code[2], code[3]);
    }
    __syncthreads();

    // Four threads a pixel, 16 channels each.
#pragma unroll
    for (int i = threadIdx.x; i < TILE * 4; i += THREADS) {
        const int out_pixel = first_pixel + i / 4, out_channel = first_channel + 16 * (i % 4);
        if (out_pixel >= p.pixels || out_channel >= p.channels) continue;
        const unsigned* words = &tile[i / 4][4 * (i % 4)];
        signed char* to = p.codes + start + static_cast<long long>(out_pixel) * p.channels + out_channel;
#if VALUES == 8
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
#else
        const int count = min(16, p.channels - out_channel);
        for (int c = 0; c < count; ++c) to[c] = static_cast<signed char>(words[c / 4] >> (8 * (c % 4)));
#endif
    }
}

#endif
