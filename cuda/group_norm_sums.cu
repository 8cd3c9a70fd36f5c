// The first half of a group norm: of each run of pixels and each group of channels, the mean and the sum of squared
// differences from it, in float32. `quantize_group_norm` is the second.
//
//   x of TYPE: [batch, pixels, channels], contiguous    partial float2 [batch, groups, runs]
//
// Which thread has which pixels and channels: group_norm.cuh. It adds up differences from its first pixel, channel by
// channel: with n pixels, its sum of squares is at most n + 1 times what it wants to know, so that little is lost
// wherever the mean is and whatever the first pixel was. What threads have found is merged likewise (`Merged`): each
// channel over the block's lanes, then each group over its channels (cf. Chan, Golub and LeVeque, "Algorithms for
// computing the sample variance", 1983). Everything is added in a fixed order.
//
// Shared memory: two floats a thread and channel, 32 KiB with VALUES = 8. Any architecture. VALUES = 1 is for channels
// that are no multiple of 8.
//
// Macros: TYPE (dtype.cuh), VALUES (8 or 1). A block has up to 512 threads.
#include "dependent.cuh"
#include "group_norm.cuh"

constexpr int UNROLL = TYPE == DTYPE_F32 ? 4 : 8;  // pixels of a thread that are under way at once

struct Params {
    const void* x;
    float2* partial;
    int channels;
    int pixels;
    int groups;
    int width;           // channels of a group
    int slice;           // groups of a block
    int columns, lanes;  // of its threads
    int inverse;         // 2^20 / columns, rounded up
    int run;             // pixels of a block
    int runs;            // of a sample
};

// Where a lane's moments of a channel of the block are. Neighbouring threads write neighbours.
__device__ __forceinline__ int slot(int channel, int columns) { return channel % VALUES * columns + channel / VALUES; }

extern "C" __global__ void __launch_bounds__(THREADS, 1) group_norm_sums(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    __shared__ Moments found[THREADS * VALUES];  // [lane][slot]
    const Place place = place_of_thread(p);
    Loaded x[UNROLL];
    load_first(x, p, place);
    if (place.has_pixels) {
        float first[VALUES], sum[VALUES], squares[VALUES];
        floats_of(x[0], first);
#pragma unroll
        for (int i = 0; i < VALUES; ++i) sum[i] = squares[i] = 0.0f;
        int count = 0;
        for_each_pixel(x, p, place, [&](const float(&value)[VALUES], long long) {
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                const float difference = value[i] - first[i];
                sum[i] += difference;
                squares[i] += difference * difference;
            }
            ++count;
        });
        const float share = __fdiv_rn(1.0f, static_cast<float>(count));
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            const float offset = sum[i] * share;
            found[(place.lane * VALUES + i) * p.columns + place.column] = {
                first[i] + offset, fmaxf(squares[i] - sum[i] * offset, 0.0f)};
        }
    }
    __syncthreads();

    const int pixels = place.end - static_cast<int>(blockIdx.z) * p.run, row = p.columns * VALUES;
    const int lanes = min(p.lanes, pixels), each = pixels / p.lanes, more = pixels - each * p.lanes;
    const float share = __fdiv_rn(1.0f, static_cast<float>(pixels));
    for (int i = threadIdx.x; i < row; i += blockDim.x) {
        Merged channel(found[i].mean);
        for (int lane = 0; lane < lanes; ++lane) {
            channel.add(found[lane * row + i], static_cast<float>(each + (lane < more)));
        }
        found[i] = channel.moments(share);
    }
    __syncthreads();

    const int team = threadIdx.x / TEAM, member = threadIdx.x % TEAM, teams = blockDim.x / TEAM;
    const int first_group = blockIdx.y * p.slice, groups = min(p.slice, p.groups - first_group);
    for (int start = 0; start < groups; start += teams) {
        // Teams without a group follow the last one's: shuffles are of whole warps.
        const int first = min(start + team, groups - 1) * p.width;
        Merged part(found[slot(first, p.columns)].mean);
        for (int i = member; i < p.width; i += TEAM) {
            part.add(found[slot(first + i, p.columns)], static_cast<float>(pixels));
        }
        const Merged group = merged_by_team(part);
        if (member == 0 && start + team < groups) {
            const Moments moments = group.moments(__fdiv_rn(share, static_cast<float>(p.width)));
            const long long index = static_cast<long long>(blockIdx.x) * p.groups + first_group + start + team;
            p.partial[index * p.runs + blockIdx.z] = {moments.mean, moments.squares};
        }
    }
}
