// A block of GPTQ's columns on the chip: a row's values in the registers of a few lanes, the columns' matrix in shared
// memory.
//
//   values [columns, rows] float32, contiguous: what a row of the weight has at a column is at [column][row]
//   within [columns, columns] float32, rows `stride` apart, 16-byte aligned, each of whole chunks of 4
//
// LANES neighbouring lanes own a row, and lane l its columns l, l + LANES, ...: HELD registers for each kind of value.
//
//       register   0 0 0 .. 0 | 1 1 1 .. 1 | 2 ..       whichever column is next, all lanes have as many columns
//       lane       0 1 2 .. 7 | 0 1 2 .. 7 | 0 ..       behind it, give or take one
//
// Columns go one after the other, and what one costs is latency: a division, a few operations on its result, a shuffle.
// Rows know nothing of each other: a few warps a multiprocessor hide most of it.
#pragma once

#include "ptx.cuh"

constexpr int COLUMNS = 128, LANES = 8, HELD = COLUMNS / LANES;
constexpr unsigned WARP = 0xffffffffu;

// Which row and which of its columns this thread has.
struct Place {
    int row, lane;
    int first;  // lane of the warp: the row's lane 0

    __device__ Place()
        : row((blockIdx.x * blockDim.x + threadIdx.x) / LANES), lane(threadIdx.x % LANES),
          first(threadIdx.x % 32 / LANES * LANES) {}

    // What the lane of this row that has a column found out about it, in all of the row's lanes.
    __device__ float from(int owner, float value) const { return __shfl_sync(WARP, value, first + owner); }
};

// Loads this thread's part of a matrix; `absent` stands where there is none.
__device__ __forceinline__ void load_held(float (&held)[HELD], const float* matrix, const Place& place, int columns,
                                          int rows, float absent) {
#pragma unroll
    for (int r = 0; r < HELD; ++r) {
        const int column = r * LANES + place.lane;
        const bool inside = column < columns && place.row < rows;
        held[r] = inside ? __ldg(matrix + static_cast<long long>(column) * rows + place.row) : absent;
    }
}

__device__ __forceinline__ void store_held(float* matrix, const float (&held)[HELD], const Place& place, int columns,
                                           int rows) {
#pragma unroll
    for (int r = 0; r < HELD; ++r) {
        const int column = r * LANES + place.lane;
        if (column < columns && place.row < rows) {
            matrix[static_cast<long long>(column) * rows + place.row] = held[r];
        }
    }
}

// Begins to copy the upper triangle of `within` to shared memory, COLUMNS values a row. The rest of it is never used.
__device__ __forceinline__ void copy_within(float* shared, const float* within, int stride, int columns) {
    const int chunks = (columns + 3) / 4;
    for (int i = threadIdx.x; i < columns * chunks; i += blockDim.x) {
        const int row = i / chunks, column = i % chunks * 4;
        if (column + 3 < row) continue;
        cp_async_16(shared + row * COLUMNS + column, within + static_cast<long long>(row) * stride + column, true);
    }
    cp_async_commit();
}

__device__ __forceinline__ void wait_for_within() {
    cp_async_wait<0>();
    __syncthreads();
}

// The nearest whole number, half to even, in [low, high].
__device__ __forceinline__ float rounded(float value, float low, float high) {
    return fminf(fmaxf(rintf(value), low), high);
}
