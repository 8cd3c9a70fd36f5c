// What the two kernels of a group norm share: which pixels and channels of an image a thread has, and how what is known
// of some values and of others becomes what is known of all.
//
//   x of TYPE: [batch, pixels, channels]; a group is `width` neighbouring channels
//
// A block has a run of pixels of one sample, and `slice` whole groups of channels. A thread has VALUES neighbouring
// channels and every `lanes`-th pixel of the run.
//
//            c 0..7     8..15      ...
//   pixel 0  thread 0   1          ...  columns - 1           blockIdx.x: sample, y: slice of the channels, z: run
//   pixel 1  columns    columns+1  ...
//
// P is a kernel's parameter, which has what is read of it here. UNROLL: pixels of a thread that are under way at once.
#pragma once

#include "chunk.cuh"

constexpr int THREADS = 512;
constexpr int TEAM = 8;  // neighbouring threads that add up one group

// Neighbouring channels of a pixel, as they are read.
#if VALUES == 8
using Loaded = Chunk<TYPE>;
__device__ __forceinline__ Loaded load_values(const void* x, long long at) { return load_chunk<TYPE>(x, at, true); }
#else
using Loaded = float;
__device__ __forceinline__ Loaded load_values(const void* x, long long at) { return load_float(x, TYPE, at); }
__device__ __forceinline__ void floats_of(const Loaded& x, float (&value)[1]) { value[0] = x; }
#endif

struct Place {
    int lane, column, channel;
    int pixel, end;  // the first one of this thread, and where the block's run ends
    long long at;    // the first value of this thread
    bool has_pixels;
};

template <class P>
__device__ __forceinline__ Place place_of_thread(const P& p) {
    Place place;
    place.lane = threadIdx.x * p.inverse >> 20;  // a division by p.columns
    place.column = threadIdx.x - place.lane * p.columns;
    place.channel = blockIdx.y * p.slice * p.width + VALUES * place.column;
    place.pixel = blockIdx.z * p.run + place.lane;
    place.end = min(p.pixels, static_cast<int>(blockIdx.z + 1) * p.run);
    place.at = (static_cast<long long>(blockIdx.x) * p.pixels + place.pixel) * p.channels + place.channel;
    place.has_pixels = place.lane < p.lanes && place.channel < p.channels && place.pixel < place.end;
    return place;
}

// The first values of the thread.
template <int UNROLL, class P>
__device__ __forceinline__ void load_first(Loaded (&x)[UNROLL], const P& p, const Place& place) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        if (place.has_pixels && place.pixel + u * p.lanes < place.end) {
            x[u] = load_values(p.x, place.at + u * p.lanes * p.channels);
        }
    }
}

// Calls take(values, at) for each pixel of the thread, whose first ones are in x; others are asked for as soon as there
// is room.
template <int UNROLL, class P, class Take>
__device__ __forceinline__ void for_each_pixel(Loaded (&x)[UNROLL], const P& p, const Place& place, Take take) {
    int pixel = place.pixel;
    long long at = place.at;
    const int stride = p.lanes * p.channels;
    while (true) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            if (pixel >= place.end) return;
            float value[VALUES];
            floats_of(x[u], value);
            take(value, at);
            if (pixel + UNROLL * p.lanes < place.end) x[u] = load_values(p.x, at + UNROLL * stride);
            pixel += p.lanes;
            at += stride;
        }
    }
}

// What is known of some values: their mean, and the sum of their squared differences from it.
struct Moments {
    float mean, squares;
};

// Moments of several parts of the values, merged. Differences are from the first part's mean: what that adds to the sum
// of squares is at most as many times the sum as there are parts, so that little is lost when it is taken off again.
struct Merged {
    float first;
    float offset = 0.0f, squares = 0.0f;

    __device__ __forceinline__ explicit Merged(float first) : first(first) {}
    __device__ __forceinline__ void add(const Moments& part, float count) {
        const float difference = part.mean - first;
        offset += count * difference;
        squares += part.squares + count * (difference * difference);
    }
    // share: 1 / how many values there are.
    __device__ __forceinline__ Moments moments(float share) const {
        return {first + offset * share, fmaxf(squares - offset * offset * share, 0.0f)};
    }
};

// Of TEAM neighbouring lanes, in each of them, always in the same order.
__device__ __forceinline__ float sum_of_team(float value) {
#pragma unroll
    for (int distance = TEAM / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
}

// The same of what they have merged, if that is of one `first`.
__device__ __forceinline__ Merged merged_by_team(Merged part) {
    part.offset = sum_of_team(part.offset);
    part.squares = sum_of_team(part.squares);
    return part;
}
