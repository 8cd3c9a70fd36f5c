// What quantize_per_token computes, and the first half of the low-rank branch from the same read of x:
// low = round(x * smooth) @ down.T, summed in float32 on the tensor cores, rounded to x's type.
//
//   x [rows, k], down [rank, k], low [rows, rank] of TYPE; codes int8 [rows, k]; scale float32 [rows]; all contiguous;
//   k a multiple of 32
//
// A block owns 16 * ROW_TILES rows and the whole of k. Its warps take turns at slices of 32 values; in a slice lane
// 4 g + t holds values 8t..8t+7 of rows g and g + 8 as it loaded them:
//
//            slice of warp 0       slice of warp 1      ...
//   row g    t=0 t=1 t=2 t=3       t=0 t=1 t=2 t=3            each t: 8 values, 16 bytes
//
// Those are two A fragments of mma m16n8k16 if k is renumbered, which a sum does not notice: words 0 and 1 are a
// thread's share of the first product, words 2 and 3 of the second. Rows of `down` are read in the same pattern, so
// both operands come straight from memory in 16-byte loads; `down` is every block's and stays in L1.
//
// The SLICES slices of a batch stay in registers. Up to WARPS * SLICES * 32 values a row there is one batch and x is
// read once; longer rows are read again for the codes, last batch first, since that is what the L2 cache still has.
//
// Shared memory: 2560 bytes a warp for sums on their way from the warps to one. sm_75 and later; bfloat16 from sm_80.
//
// Macros: TYPE (float16 or bfloat16), ROW_TILES, RANK_TILES (ceil(rank / 8)), WARPS, SLICES.
#include "chunk.cuh"
#include "dependent.cuh"
#include "half_pairs.cuh"
#include "token_scale.cuh"

constexpr int ROWS = 16 * ROW_TILES;
constexpr int THREADS = 32 * WARPS;
// Blocks of a multiprocessor, as far as registers go: half of them, 128, are enough for a thread with few sums.
constexpr int RESIDENT = (ROW_TILES * RANK_TILES <= 4 ? 512 : 256) / THREADS;
static_assert(RESIDENT > 0, "16 warps for up to 4 tiles, 8 for more");
constexpr int COLUMNS = 32;     // of low that go through shared memory at once
constexpr int SUM_STRIDE = 40;  // of its rows: 32 columns, and 8 that spread a quad's rows over the banks

struct Params {
    const void* x;
    const float* smooth;
    const void* down;
    signed char* codes;
    float* scale;
    void* low;
    int rows;
    int k;
    int rank;
};

using Batch = Chunk<TYPE>[SLICES][ROW_TILES][2];

__device__ __forceinline__ int row_of(int tile, int half) {
    return blockIdx.x * ROWS + 16 * tile + 8 * half + threadIdx.x % 32 / 4;
}

// The first of this thread's eight values in a slice of a batch.
__device__ __forceinline__ int column_of(int batch, int slice) {
    return 32 * ((batch * SLICES + slice) * WARPS + threadIdx.x / 32) + 8 * (threadIdx.x % 4);
}

__device__ __forceinline__ void load_batch(Batch& batch, const Params& p, int index) {
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
        const int at = column_of(index, i);
#pragma unroll
        for (int r = 0; r < 2 * ROW_TILES; ++r) {
            const int row = row_of(r / 2, r % 2);
            const long long start = static_cast<long long>(row) * p.k + at;
            batch[i][r / 2][r % 2] = load_chunk<TYPE>(p.x, start, row < p.rows && at < p.k);
        }
    }
}

// Fold a batch into the rows' largest magnitudes and into the products with `down`.
__device__ __forceinline__ void reduce_batch(unsigned (&absmax)[ROW_TILES][2], float (&sum)[ROW_TILES][RANK_TILES][4],
                                             const Batch& batch, const Params& p, int index) {
    const auto* down = static_cast<const unsigned short*>(p.down);
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
        const int at = column_of(index, i);
        // A slice is a warp's, and k a whole number of slices: all lanes leave. Besides, the compiler then does not
        // begin every slice's loads at once, for which there are no registers; other warps hide their latency.
        if (at >= p.k) break;
        float smooth[8];
        load_factors(smooth, p.smooth, at, true);
        unsigned a[ROW_TILES][2][4];
#pragma unroll
        for (int r = 0; r < 2 * ROW_TILES; ++r) {
            float value[8];
            floats_of(batch[i][r / 2][r % 2], value);
            scale_by(value, smooth);
#pragma unroll
            for (int j = 0; j < 8; ++j) absmax[r / 2][r % 2] = larger(absmax[r / 2][r % 2], magnitude(value[j]));
#pragma unroll
            for (int j = 0; j < 4; ++j) a[r / 2][r % 2][j] = pair_of<TYPE>(value[2 * j], value[2 * j + 1]);
        }
        uint4 b[RANK_TILES];
#pragma unroll
        for (int n = 0; n < RANK_TILES; ++n) {
            const int line = 8 * n + threadIdx.x % 32 / 4;
            b[n] = make_uint4(0, 0, 0, 0);
            if (line < p.rank) b[n] = __ldg(reinterpret_cast<const uint4*>(down + line * p.k + at));
        }
#pragma unroll
        for (int n = 0; n < RANK_TILES; ++n) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                mma_half<TYPE>(sum[r][n], {a[r][0][0], a[r][1][0], a[r][0][1], a[r][1][1]}, b[n].x, b[n].y);
                mma_half<TYPE>(sum[r][n], {a[r][0][2], a[r][1][2], a[r][0][3], a[r][1][3]}, b[n].z, b[n].w);
            }
        }
    }
}

__device__ __forceinline__ void store_codes(const Batch& batch, const float (&factor)[ROW_TILES][2], const Params& p,
                                            int index) {
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
        const int at = column_of(index, i);
        if (at >= p.k) break;
        float smooth[8];
        load_factors(smooth, p.smooth, at, true);
#pragma unroll
        for (int r = 0; r < 2 * ROW_TILES; ++r) {
            const int row = row_of(r / 2, r % 2);
            float value[8];
            floats_of(batch[i][r / 2][r % 2], value);
            scale_by(value, smooth);
            const uint2 codes = codes_of(value, factor[r / 2][r % 2]);
            signed char* to = p.codes + static_cast<long long>(row) * p.k + at;
            if (row < p.rows) *reinterpret_cast<uint2*>(to) = codes;
        }
    }
}

// Add up what the warps have for the 16 rows of a tile and the columns from `first`; store the sums.
__device__ __forceinline__ void store_low(float (&shared)[WARPS][16][SUM_STRIDE], const float (&sum)[RANK_TILES][4],
                                          const Params& p, int tile, int first) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float(&mine)[16][SUM_STRIDE] = shared[threadIdx.x / 32];
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) {
        if (first / 8 + n >= RANK_TILES) break;
        const float(&d)[4] = sum[first / 8 + n];
        *reinterpret_cast<float2*>(&mine[g][8 * n + 2 * t]) = make_float2(d[0], d[1]);
        *reinterpret_cast<float2*>(&mine[g + 8][8 * n + 2 * t]) = make_float2(d[2], d[3]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * COLUMNS; i += THREADS) {
        const int local = i / COLUMNS, row = blockIdx.x * ROWS + 16 * tile + local, column = first + i % COLUMNS;
        if (row >= p.rows || column >= p.rank) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total += shared[w][local][i % COLUMNS];
        store_float(p.low, TYPE, static_cast<long long>(row) * p.rank + column, total);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    quantize_per_token_down(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    __shared__ __align__(16) float shared[WARPS][16][SUM_STRIDE];
    __shared__ unsigned largest[WARPS][ROWS];
    __shared__ float factors[ROWS];
    const int batches = (p.k + WARPS * SLICES * 32 - 1) / (WARPS * SLICES * 32);

    Batch batch;
    unsigned absmax[ROW_TILES][2] = {};
    float sum[ROW_TILES][RANK_TILES][4] = {};
    for (int b = 0; b < batches; ++b) {
        load_batch(batch, p, b);
        reduce_batch(absmax, sum, batch, p, b);
    }

    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2 * ROW_TILES; ++r) {
        const unsigned bits = largest_of_lanes<4>(absmax[r / 2][r % 2]);
        if (threadIdx.x % 4 == 0) largest[threadIdx.x / 32][8 * r + g] = bits;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS; i += THREADS) {
        unsigned bits = largest[0][i];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) bits = larger(bits, largest[w][i]);
        factors[i] = token_factor(bits);
        if (blockIdx.x * ROWS + i < p.rows) p.scale[blockIdx.x * ROWS + i] = token_scale(bits);
    }
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
        for (int first = 0; first < 8 * RANK_TILES; first += COLUMNS) store_low(shared, sum[tile], p, tile, first);
    }

    float factor[ROW_TILES][2];  // the barriers of store_low lie between
#pragma unroll
    for (int r = 0; r < 2 * ROW_TILES; ++r) factor[r / 2][r % 2] = factors[8 * r + g];
    for (int b = batches - 1;; --b) {
        store_codes(batch, factor, p, b);
        if (b == 0) break;
        load_batch(batch, p, b - 1);
    }
}
