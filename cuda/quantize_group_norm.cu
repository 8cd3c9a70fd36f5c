// The second half of a group norm, and what follows it: int8 codes, with given scales, of
// silu((x - mean) / sqrt(variance + eps) * weight + bias), without the silu where SILU = 0. Where CODES = 0 nothing is
// quantized, whatever the name says: the values themselves, of TYPE.
//
//   x of TYPE: [batch, pixels, channels]    out int8 or of TYPE likewise; all contiguous    weight, bias of TYPE or null
//   partial float2 [batch, groups, parts]: mean and sum of squared differences of each part of a group's pixels, as
//   `group_norm_sums` leaves them
//
// Which thread has which pixels and channels: group_norm.cuh. Its first reads are under way while the block merges the
// parts of its groups, always in the same order. A value is x * a + b in float32, with a = weight / sqrt(...) and
// b = bias - mean * a. It is rounded to TYPE there and after the silu, as it is between torch's modules; how it becomes
// a code: sample_factors.cuh.
//
// Shared memory: two floats a group, up to 16 KiB. Any architecture. VALUES = 1 is for channels or segments that are no
// multiple of 8.
//
// Macros: TYPE (dtype.cuh), VALUES (8 or 1), SILU (1 or 0), CODES (1 or 0). A block has up to 512 threads.
#include "dependent.cuh"
#include "fast_math.cuh"
#include "group_norm.cuh"
#include "sample_factors.cuh"

constexpr int MAX_GROUPS = THREADS / 2 * VALUES;  // of a block: two lanes or more share its channels

constexpr int UNROLL = TYPE == DTYPE_F32 ? 2 : 4;  // pixels of a thread that are under way at once

struct Params {
    const void* x;
    const float2* partial;
    const void* weight;
    const void* bias;
    const float* scale;  // of codes alone, as what is said of rows and segments
    const float* smooth;
    void* out;
    int channels;
    int pixels;
    int groups;
    int width;           // channels of a group
    int slice;           // groups of a block
    int columns, lanes;  // of its threads
    int inverse;         // 2^20 / columns, rounded up
    int run;             // pixels of a block
    int parts, part;     // of a sample, and pixels of one
    int samples_per_row;
    int segments;            // up to 8, or `channels`
    int ends[MAX_SEGMENTS];  // of up to 8 segments, in channels
    float eps;
};

__device__ __forceinline__ float silu(float x) { return x * fast_reciprocal(1.0f + fast_exp2(-1.44269504f * x)); }

// Two values of TYPE, which are rounded in one instruction.
#if TYPE == 2
using Pair = __nv_bfloat162;
__device__ __forceinline__ Pair pair_of(float a, float b) { return __floats2bfloat162_rn(a, b); }
__device__ __forceinline__ float2 floats_of(Pair pair) { return __bfloat1622float2(pair); }
#else
using Pair = __half2;
__device__ __forceinline__ Pair pair_of(float a, float b) { return __floats2half2_rn(a, b); }
__device__ __forceinline__ float2 floats_of(Pair pair) { return __half22float2(pair); }
#endif

// As torch stores it between two modules.
__device__ __forceinline__ void round_to_type(float (&value)[VALUES]) {
    if constexpr (TYPE == DTYPE_F32) return;
#pragma unroll
    for (int i = 0; i < VALUES; i += 2) {
        const float2 pair = floats_of(pair_of(value[i], VALUES == 1 ? 0.0f : value[i + (VALUES > 1)]));
        value[i] = pair.x;
        if (VALUES > 1) value[i + (VALUES > 1)] = pair.y;
    }
}

// The mean and 1 / sqrt(variance + eps) of the block's groups.
__device__ __forceinline__ void merge_parts(const Params& p, float* mean_of, float* rstd_of) {
    const int team = threadIdx.x / TEAM, member = threadIdx.x % TEAM, teams = blockDim.x / TEAM;
    const int first_group = blockIdx.y * p.slice, groups = min(p.slice, p.groups - first_group);
    const float share = __fdiv_rn(1.0f, static_cast<float>(p.width) * static_cast<float>(p.pixels));
    const float most = static_cast<float>(p.width * p.part);
    const float last = static_cast<float>(p.width * (p.pixels - (p.parts - 1) * p.part));
    for (int start = 0; start < groups; start += teams) {
        // Teams without a group follow the last one's: shuffles are of whole warps.
        const int group = first_group + min(start + team, groups - 1);
        const float2* part = p.partial + (static_cast<long long>(blockIdx.x) * p.groups + group) * p.parts;
        Merged merged(part[0].x);
#pragma unroll 8
        for (int i = member; i < p.parts; i += TEAM) {
            merged.add({part[i].x, part[i].y}, i + 1 < p.parts ? most : last);
        }
        const Moments moments = merged_by_team(merged).moments(share);
        if (member == 0 && start + team < groups) {
            mean_of[start + team] = moments.mean;
            rstd_of[start + team] = __fdiv_rn(1.0f, __fsqrt_rn(moments.squares * share + p.eps));
        }
    }
}

// What makes normalized values of this thread's channels: value * factor + term.
__device__ __forceinline__ void make_affine(float (&factor)[VALUES], float (&term)[VALUES], const Params& p,
                                            int channel, const Loaded& weight, const Loaded& bias,
                                            const float* mean_of, const float* rstd_of) {
    floats_of(weight, factor);
    floats_of(bias, term);
    const int local = channel - blockIdx.y * p.slice * p.width;
    int group = local / p.width, within = local - group * p.width;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        factor[i] = (p.weight == nullptr ? 1.0f : factor[i]) * rstd_of[group];
        term[i] = __fmaf_rn(-mean_of[group], factor[i], p.bias == nullptr ? 0.0f : term[i]);
        if (++within == p.width) within = 0, ++group;
    }
}

__device__ __forceinline__ void store_codes(signed char* to, const float (&value)[VALUES],
                                            const float (&factor)[VALUES]) {
#if VALUES == 8
    unsigned code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = clamped_code(value[i], factor[i]);
    *reinterpret_cast<uint2*>(to) = packed(code);
#else
    *to = static_cast<signed char>(clamped_code(value[0], factor[0]));
#endif
}

__device__ __forceinline__ void store_values(void* out, long long at, const float (&value)[VALUES]) {
#if VALUES == 1
    store_float(out, TYPE, at, value[0]);
#elif TYPE == 0
    float4* const to = reinterpret_cast<float4*>(static_cast<float*>(out) + at);
    to[0] = make_float4(value[0], value[1], value[2], value[3]);
    to[1] = make_float4(value[4], value[5], value[6], value[7]);
#else
    union {
        Pair pair[4];
        uint4 all;
    } bits;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits.pair[i] = pair_of(value[2 * i], value[2 * i + 1]);
    *reinterpret_cast<uint4*>(static_cast<unsigned short*>(out) + at) = bits.all;
#endif
}

constexpr int RESIDENT = TYPE == DTYPE_F32 ? 1 : 2;  // blocks of a multiprocessor, as far as registers go

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) quantize_group_norm(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    __shared__ float mean_of[MAX_GROUPS], rstd_of[MAX_GROUPS];
    const Place place = place_of_thread(p);
    Loaded x[UNROLL];
    load_first(x, p, place);
    Loaded weight = {}, bias = {};
    if (place.has_pixels && p.weight != nullptr) weight = load_values(p.weight, place.channel);
    if (place.has_pixels && p.bias != nullptr) bias = load_values(p.bias, place.channel);
    merge_parts(p, mean_of, rstd_of);
    __syncthreads();
    if (!place.has_pixels) return;
    float factor[VALUES], term[VALUES], code_factor[VALUES];
    if constexpr (CODES) load_channel_factors(code_factor, p, blockIdx.x / p.samples_per_row, place.channel);
    make_affine(factor, term, p, place.channel, weight, bias, mean_of, rstd_of);
    for_each_pixel(x, p, place, [&](float(&value)[VALUES], long long at) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) value[i] = __fmaf_rn(value[i], factor[i], term[i]);
        if constexpr (SILU) {
            round_to_type(value);
#pragma unroll
            for (int i = 0; i < VALUES; ++i) value[i] = silu(value[i]);
        }
        if constexpr (CODES) {
            round_to_type(value);
            store_codes(static_cast<signed char*>(p.out) + at, value, code_factor);
        } else {
            store_values(p.out, at, value);
        }
    });
}
