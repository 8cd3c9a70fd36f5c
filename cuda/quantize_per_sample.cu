// int8 codes with given scales, one a sample and channel segment: code = clamp(round(x * r), -127, 127) with
// r[b, c] = smooth[c] / max(scale[b, segment of c], 1e-30).
//
//   x of TYPE: [batch, pixels, channels], or with TRANSPOSE [batch, channels, pixels]
//   codes int8 [batch, pixels, channels]; all contiguous    scale float32 [rows, segments]    smooth float32 or null
//
// A block has a run of pixels of one sample: blockIdx.x = sample * runs + run.
//
// Channels last in, channels last out (TRANSPOSE = 0): a thread owns VALUES channels, whose factors it keeps in
// registers, and every `lanes`-th pixel of the run, lanes = threads / columns:
//
//            c 0..7     8..15      ...
//   pixel 0  thread 0   1          ...  columns - 1           blockIdx.y: which `columns` chunks of the channels, where
//   pixel 1  columns    columns+1  ...                        a block has not room for all
//
// Channels first in (TRANSPOSE = 1): a run is 64 pixels, blockIdx.y picks 64 channels. A thread reads 8 pixels of 4
// neighbouring channels; the 4 codes of a pixel are one word of shared memory (64 pixels x 17 words, the 17th against
// bank conflicts: 4352 bytes).
//
// Any architecture. VALUES = 1 is for sizes and addresses that the 8-value chunks do not fit: with TRANSPOSE, pixels
// that are no multiple of 8 or channels that are none of 16.
//
// Macros: TYPE (dtype.cuh), TRANSPOSE, VALUES (8 or 1). A block has up to 256 threads; 128 with TRANSPOSE.
#include "chunk.cuh"
#include "dependent.cuh"

constexpr int MAX_SEGMENTS = 8;
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
    int columns;             // TRANSPOSE = 0
    int run;                 // pixels of a block
    int runs;                // of a sample
};

// Of COUNT neighbouring channels; 0 beyond the last.
template <int COUNT>
__device__ __forceinline__ void load_channel_factors(float (&factor)[COUNT], const Params& p, int sample, int channel) {
    const float* scale = p.scale + sample / p.samples_per_row * p.segments;
    const bool each = p.segments == p.channels;
    float step[COUNT];
    int segment = each ? channel : 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        step[i] = 1.0f, factor[i] = 0.0f;
        if (channel + i >= p.channels) continue;
        while (channel + i >= (each ? segment + 1 : p.ends[segment])) ++segment;
        step[i] = __ldg(scale + segment);
        factor[i] = p.smooth == nullptr ? 1.0f : __ldg(p.smooth + channel + i);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) factor[i] = __fdiv_rn(factor[i], step[i] < 1e-30f ? 1e-30f : step[i]);
}

// The low byte is the code.
__device__ __forceinline__ unsigned clamped_code(float v, float factor) {
    return code_of(fminf(fmaxf(__fmul_rn(v, factor), -127.0f), 127.0f));
}

#if !TRANSPOSE

#if VALUES == 8
using Loaded = Chunk<TYPE>;
#else
using Loaded = float;
#endif

__device__ __forceinline__ void load_pixels(Loaded (&x)[UNROLL], const Params& p, long long start, int first, int lanes,
                                            int end) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const int pixel = first + u * lanes;
        const long long at = start + static_cast<long long>(pixel) * p.channels;
#if VALUES == 8
        x[u] = load_chunk<TYPE>(p.x, at, pixel < end);
#else
        x[u] = pixel < end ? load_float(p.x, TYPE, at) : 0.0f;
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

constexpr int RESIDENT = TYPE == DTYPE_F32 ? 3 : 4;  // blocks of a multiprocessor, as far as registers go

extern "C" __global__ void __launch_bounds__(256, RESIDENT) quantize_per_sample(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    const int sample = blockIdx.x / p.runs, run = blockIdx.x % p.runs;
    const int lanes = blockDim.x / p.columns, lane = threadIdx.x / p.columns;
    const int channel = VALUES * (blockIdx.y * p.columns + threadIdx.x % p.columns);
    if (lane >= lanes || channel >= p.channels) return;
    const int end = min(p.pixels, (run + 1) * p.run);
    const long long start = static_cast<long long>(sample) * p.pixels * p.channels + channel;
    int first = run * p.run + lane;
    Loaded x[UNROLL];
    load_pixels(x, p, start, first, lanes, end);
    float factor[VALUES];
    load_channel_factors(factor, p, sample, channel);
    while (first < end) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int pixel = first + u * lanes;
            if (pixel >= end) break;
            store_codes(p.codes + start + static_cast<long long>(pixel) * p.channels, x[u], factor);
        }
        first += UNROLL * lanes;
        load_pixels(x, p, start, first, lanes, end);
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
    float value[4][8];
#if VALUES == 8
    Chunk<TYPE> chunk[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const bool valid = pixel < p.pixels && channel + c < p.channels;
        chunk[c] = load_chunk<TYPE>(p.x, start + static_cast<long long>(channel + c) * p.pixels + pixel, valid);
    }
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
    }
#endif
    float factor[4];
    load_channel_factors(factor, p, sample, channel);
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
