// What quantize_per_token computes, and the first half of the low-rank branch from the same read of x:
// low = round(x * smooth) @ down.T, summed in float32 on the tensor cores, rounded to x's type.
//
//   x [rows, k], down [rank, k], low [rows, rank] of TYPE; codes int8 [rows, k]; scale float32 [rows]; all contiguous;
//   k a multiple of 32
//
// SPLIT blocks, a cluster, own a tile of 16 * ROW_TILES rows at a time, and share its K axis. A warp of them owns
// SLICES slices of 32 values; in a slice lane 4 g + t has values 8t..8t+7 of rows g, g + 8, ... of x and of `down`:
//
//           t=0 t=1 t=2 t=3
//   row g                           each t: 8 values, 16 bytes
//
// Of x those are two A fragments of mma m16n8k16 if k is renumbered, which a sum does not notice: words 0 and 1 are a
// thread's share of the first product, words 2 and 3 of the second. Of `down` they are the B fragments.
//
// Both are copied to shared memory, which takes no registers. A thread reads there what it has copied itself: nobody
// waits for others, or shares a bank with them.
//
// KEPT = 1: a cluster has one tile after the other, every gridDim.x / SPLIT-th. `down` is read once and stays in shared
// memory. Values wait in registers for the scale of their row, so that the next tile of x is on its way meanwhile.
//
// KEPT = 0 is for a `down` that shared memory does not hold: a cluster has one tile, of more rows where it can. Up to
// SPLIT * WARPS * SLICES * 32 values a row there is one batch and x is read once; longer rows are read again for the
// codes, last batch first, since that is what the L2 cache still has.
//
// Every block pushes what it has to those that want it: the largest magnitudes to all of the cluster, the sums to the
// block that adds them up, one of SPLIT parts each. That takes no barrier of the cluster but one while x is on its way.
//
// sm_75 and later; bfloat16 from sm_80; SPLIT > 1 from sm_90, before which it is taken for 1.
//
// Macros: TYPE (float16 or bfloat16), ROW_TILES (1, 2; 1 where KEPT), RANK_TILES (ceil(rank / 8)), SPLIT (1, 2, 4, 8),
// WARPS, SLICES, KEPT (`down`, from one tile to the next), RESIDENT (blocks of a multiprocessor, as far as registers go).
#include "chunk.cuh"
#include "dependent.cuh"
#include "half_pairs.cuh"
#include "token_scale.cuh"
#include "sm90.cuh"

#if SPLIT > 1 && (defined(QDIFF_EMULATE) || __CUDA_ARCH__ >= 900)
constexpr int BLOCKS = SPLIT;  // of a cluster
#else
constexpr int BLOCKS = 1;
#endif
constexpr int ROWS = 16 * ROW_TILES;
constexpr int OCTETS = 2 * ROW_TILES;  // of rows
constexpr int THREADS = 32 * WARPS;
constexpr int TURNS = KEPT && BLOCKS > 1 ? 2 : 1;  // a block of a cluster may be one tile ahead of another
static_assert(OCTETS <= 4, "each has a lane of a quad");

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

constexpr int SUMS = ROW_TILES * RANK_TILES;  // of a thread, in fours
constexpr int PART = 32 * SUMS / BLOCKS;      // fours of a tile's sums that a block adds up

struct Shared {
    struct {
        uint4 x[SLICES][OCTETS][32];
#if KEPT
        struct {
#else
        union {  // a thread's sums take the place of what it had of `down`
#endif
            uint4 down[SLICES][RANK_TILES][32];
            float4 sums[SUMS][32];
        };
        float smooth[SLICES][32];
    } of_warp[WARPS];
    float4 parts[TURNS][BLOCKS][PART];  // of the sums that this block adds up: what each block of the cluster has
    unsigned of_warps[WARPS][ROWS];
    unsigned magnitudes[TURNS][BLOCKS][ROWS];  // the largest of each block
    unsigned long long magnitudes_came[TURNS], sums_came[TURNS];
};

// ---- The cluster, whose blocks are neighbours

__device__ __forceinline__ int rank_in_cluster() { return blockIdx.x % BLOCKS; }

// Write to the same place in the shared memory of another block of the cluster, whose barrier counts the bytes.
template <class T>
__device__ __forceinline__ void push(T* mine, const T& value, unsigned long long* barrier, int rank) {
#if defined(QDIFF_EMULATE) || __CUDA_ARCH__ >= 900
    push_cluster(cluster_address(shared_address(mine), rank), value, cluster_address(shared_address(barrier), rank));
#endif
}

// Say that this block has begun and has made its barriers; `cluster_wait` waits until all of the cluster have.
__device__ __forceinline__ void cluster_begin(Shared& shared) {
    if (threadIdx.x == 0) {
        for (int t = 0; t < TURNS; ++t) {
            barrier_init(shared_address(&shared.magnitudes_came[t]), 1);
            barrier_init(shared_address(&shared.sums_came[t]), 1);
        }
        barrier_init_visible();
        for (int t = 0; t < TURNS; ++t) {
            barrier_expect(shared_address(&shared.magnitudes_came[t]), sizeof(shared.magnitudes[t]));
            barrier_expect(shared_address(&shared.sums_came[t]), sizeof(shared.parts[t]));
        }
    }
    __syncwarp();
    cluster_arrive_relaxed();
}

// ---- Rows

struct Thread {
    int warp, lane;  // the warp is the same in all lanes, which the compiler sees
};

__device__ __forceinline__ Thread this_thread() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return {__shfl_sync(0xffffffffu, warp, 0), lane};
}

// Bytes before a row of `k` values of TYPE.
__device__ __forceinline__ long long row_bytes(int row, int k) { return static_cast<long long>(row) * (2 * k); }

// A row of x. Past the last one is the last one again, for which the same is stored more than once.
__device__ __forceinline__ int row_of(const Params& p, int tile, int octet, int lane) {
    return min(tile * ROWS + 8 * octet + lane / 4, p.rows - 1);
}

// The first value of a slice of a batch.
__device__ __forceinline__ int column_of(int batch, int warp, int slice) {
    return 32 * (((batch * BLOCKS + rank_in_cluster()) * WARPS + warp) * SLICES + slice);
}

enum Load { ALL, VALUES_AND_FACTORS, VALUES };

// Begin to copy a batch of a tile, one group a slice; zeros past the last tile.
template <Load LOAD>
__device__ __forceinline__ void load_batch(Shared& shared, const Params& p, int tile, int index, Thread me) {
    const int lane = KEPT ? me.lane : opaque(me.lane);  // no addresses wait in registers for the next batch
    const int first = column_of(index, me.warp, 0), at = first + 8 * (lane % 4);
    const char *x[OCTETS], *down[RANK_TILES];
#pragma unroll
    for (int r = 0; r < OCTETS; ++r) {
        x[r] = static_cast<const char*>(p.x) + 2 * at + row_bytes(row_of(p, tile, r, lane), p.k);
    }
#pragma unroll
    for (int n = 0; n < RANK_TILES; ++n) {
        // Past the last line is the last one again, of whose sums nothing is stored.
        down[n] = static_cast<const char*>(p.down) + 2 * at + row_bytes(min(8 * n + lane / 4, p.rank - 1), p.k);
    }
    const float* smooth = p.smooth + first + 4 * lane;
    __syncwarp();  // all lanes are done with the factors of the batch before
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
        const bool inside = tile * ROWS < p.rows && first + 32 * i < p.k;
#pragma unroll
        for (int r = 0; r < OCTETS; ++r) {
            cp_async_16(&shared.of_warp[me.warp].x[i][r][lane], x[r] + 64 * i, inside);
        }
        if (LOAD != VALUES && p.smooth != nullptr && lane < 8) {
            cp_async_16(&shared.of_warp[me.warp].smooth[i][4 * lane], smooth + 32 * i, inside);
        }
#pragma unroll
        for (int n = 0; n < RANK_TILES; ++n) {
            if (LOAD == ALL) cp_async_16(&shared.of_warp[me.warp].down[i][n][lane], down[n] + 64 * i, inside);
        }
        cp_async_commit();
    }
}

__device__ __forceinline__ void read_factors(float (&factor)[8], const Shared& shared, Thread me, int slice) {
    const float4* four = reinterpret_cast<const float4*>(&shared.of_warp[me.warp].smooth[slice][8 * (me.lane % 4)]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float4 f = four[i];
        factor[4 * i] = f.x, factor[4 * i + 1] = f.y, factor[4 * i + 2] = f.z, factor[4 * i + 3] = f.w;
    }
}

// A slice's values times their factors.
__device__ __forceinline__ void read_values(float (&value)[OCTETS][8], const Shared& shared, Thread me, int slice) {
    float factor[8];
    read_factors(factor, shared, me, slice);
#pragma unroll
    for (int r = 0; r < OCTETS; ++r) {
        const uint4 v = shared.of_warp[me.warp].x[slice][r][me.lane];
        floats_of(Chunk<TYPE>{{v.x, v.y, v.z, v.w}}, value[r]);
        scale_by(value[r], factor);
    }
}

// The bits of the larger one of a magnitude and |v|. NaN is the largest.
__device__ __forceinline__ unsigned fold(unsigned bits, float v) {
#if !defined(QDIFF_EMULATE) && __CUDA_ARCH__ >= 800
    float largest;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(__uint_as_float(bits)), "f"(fabsf(v)));
    return __float_as_uint(largest);
#else
    return larger(bits, magnitude(v));
#endif
}

// Slice `I` of a batch and those after it, as they arrive, into the rows' largest magnitudes and the products.
template <int I = 0>
__device__ __forceinline__ void reduce_batch(unsigned (&absmax)[OCTETS], float (&sum)[ROW_TILES][RANK_TILES][4],
                                             float (&value)[SLICES][OCTETS][8], const Shared& shared, const Params& p,
                                             int index, Thread me) {
    if constexpr (I < SLICES) {
        cp_async_wait<SLICES - 1 - I>();
        __syncwarp();  // the factors are copied by eight lanes for all
        if (column_of(index, me.warp, I) >= p.k) return;
        read_values(value[I], shared, me, I);
        unsigned a[OCTETS][4];
#pragma unroll
        for (int r = 0; r < OCTETS; ++r) {
#pragma unroll
            for (int j = 0; j < 8; ++j) absmax[r] = fold(absmax[r], value[I][r][j]);
#pragma unroll
            for (int j = 0; j < 4; ++j) a[r][j] = pair_of<TYPE>(value[I][r][2 * j], value[I][r][2 * j + 1]);
        }
#pragma unroll
        for (int n = 0; n < RANK_TILES; ++n) {
            const uint4 b = shared.of_warp[me.warp].down[I][n][me.lane];
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                mma_half<TYPE>(sum[r][n], {a[2 * r][0], a[2 * r + 1][0], a[2 * r][1], a[2 * r + 1][1]}, b.x, b.y);
                mma_half<TYPE>(sum[r][n], {a[2 * r][2], a[2 * r + 1][2], a[2 * r][3], a[2 * r + 1][3]}, b.z, b.w);
            }
        }
        reduce_batch<I + 1>(absmax, sum, value, shared, p, index, me);
    }
}

__device__ __forceinline__ void store_codes(float (&value)[SLICES][OCTETS][8], const Shared& shared,
                                            const float (&factor)[OCTETS], const Params& p, int tile, int index,
                                            Thread me) {
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
        const int first = column_of(index, me.warp, i), at = first + 8 * (me.lane % 4);
        if (first >= p.k) break;
        if constexpr (!KEPT) read_values(value[i], shared, me, i);  // it takes fewer registers than to keep them
#pragma unroll
        for (int r = 0; r < OCTETS; ++r) {
            signed char* to = p.codes + at + static_cast<long long>(row_of(p, tile, r, me.lane)) * p.k;
            *reinterpret_cast<uint2*>(to) = codes_of(value[i][r], factor[r]);
        }
    }
}

// ---- The sums of low, in fours as the tensor cores leave them

__device__ __forceinline__ void add(float4& sum, const float4& v) {
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

template <int COUNT>
__device__ __forceinline__ unsigned largest_of(const unsigned (&bits)[COUNT][ROWS], int row) {
    unsigned largest = bits[0][row];
#pragma unroll
    for (int i = 1; i < COUNT; ++i) largest = larger(largest, bits[i][row]);
    return largest;
}

__device__ __forceinline__ void store_low(const Params& p, int tile, int four, const float4& sum) {
    const int lane = four % 32, n = four / 32 % RANK_TILES, half = four / 32 / RANK_TILES;
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = tile * ROWS + 16 * half + 8 * (i / 2) + lane / 4;
        const int column = 8 * n + 2 * (lane % 4) + i % 2;
        if (row < p.rows && column < p.rank) {
            store_float(p.low, TYPE, static_cast<long long>(row) * p.rank + column, values[i]);
        }
    }
}

// ---- One tile

// The scale and `low` of a tile, from what the warps of the cluster have of it; its codes, from the values of this one.
__device__ __forceinline__ void finish_tile(const unsigned (&absmax)[OCTETS],
                                            const float (&sum)[ROW_TILES][RANK_TILES][4],
                                            float (&value)[SLICES][OCTETS][8], Shared& shared, const Params& p,
                                            int tile, int turn, Thread me, int batches) {
    const int lane = me.lane;
    [[maybe_unused]] const int t = turn % TURNS, phase = turn / TURNS % 2;
    if constexpr (KEPT) __syncthreads();  // all have read the sums of the tile before
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
        const float(&d)[4] = sum[i / RANK_TILES][i % RANK_TILES];
        shared.of_warp[me.warp].sums[i][lane] = make_float4(d[0], d[1], d[2], d[3]);
    }
    // Lane 4 g + t speaks for row g of octet t.
    const int octet = lane % 4 % OCTETS, mine = 8 * octet + lane / 4;
    unsigned bits = 0;
#pragma unroll
    for (int r = 0; r < OCTETS; ++r) {
        const unsigned largest = largest_of_lanes<4>(absmax[r]);
        if (r == octet) bits = largest;
    }
    if (lane % 4 < OCTETS) shared.of_warps[me.warp][mine] = bits;
    __syncthreads();
    if constexpr (BLOCKS > 1) {
        if (turn == 0) cluster_wait();
        if (threadIdx.x < ROWS) {
            const unsigned bits = largest_of(shared.of_warps, threadIdx.x);
#pragma unroll
            for (int c = 0; c < BLOCKS; ++c) {
                push(&shared.magnitudes[t][rank_in_cluster()][threadIdx.x], bits, &shared.magnitudes_came[t], c);
            }
        }
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < 32 * SUMS; i += THREADS) {
        float4 total = shared.of_warp[0].sums[i / 32][i % 32];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) add(total, shared.of_warp[w].sums[i / 32][i % 32]);
        if constexpr (BLOCKS > 1) {
            push(&shared.parts[t][rank_in_cluster()][i % PART], total, &shared.sums_came[t], i / PART);
        } else {
            store_low(p, tile, i, total);
        }
    }
    if constexpr (BLOCKS > 1) {
        const unsigned came = shared_address(&shared.magnitudes_came[t]);
        barrier_wait(came, phase);
        // Nobody pushes again before this block has pushed what it has of the tile after this one.
        if (threadIdx.x == 0) barrier_expect(came, sizeof(shared.magnitudes[t]));
        bits = largest_of(shared.magnitudes[t], mine);
    } else {
        bits = largest_of(shared.of_warps, mine);
    }

    if (rank_in_cluster() == 0 && me.warp == 0) p.scale[row_of(p, tile, octet, lane)] = token_scale(bits);
    const float of_mine = token_factor(bits);
    float factor[OCTETS];
#pragma unroll
    for (int r = 0; r < OCTETS; ++r) factor[r] = __shfl_sync(0xffffffffu, of_mine, lane / 4 * 4 + r);
    for (int b = batches - 1;; --b) {
        store_codes(value, shared, factor, p, tile, b, me);
        if (KEPT || b == 0) break;
        load_batch<VALUES_AND_FACTORS>(shared, p, tile, b - 1, me);
        cp_async_wait<0>();
        __syncwarp();
    }

    if (BLOCKS > 1 && 32 * me.warp < PART) {
        const unsigned came = shared_address(&shared.sums_came[t]);
        barrier_wait(came, phase);
        if (threadIdx.x == 0) barrier_expect(came, sizeof(shared.parts[t]));
#pragma unroll 1
        for (int i = threadIdx.x; i < PART; i += THREADS) {
            float4 total = shared.parts[t][0][i];
#pragma unroll
            for (int c = 1; c < BLOCKS; ++c) add(total, shared.parts[t][c][i]);
            store_low(p, tile, rank_in_cluster() * PART + i, total);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
#if SPLIT > 1 && __CUDA_ARCH__ >= 900
    __cluster_dims__(SPLIT, 1, 1)
#endif
    quantize_per_token_down(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    DYNAMIC_SHARED(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Thread me = this_thread();
    const int first = blockIdx.x / BLOCKS, step = gridDim.x / BLOCKS;  // tiles
    const int batches = KEPT ? 1 : (p.k + BLOCKS * WARPS * SLICES * 32 - 1) / (BLOCKS * WARPS * SLICES * 32);

    if constexpr (BLOCKS > 1) cluster_begin(shared);
    if (p.smooth == nullptr) {
#pragma unroll
        for (int i = 0; i < SLICES; ++i) shared.of_warp[me.warp].smooth[i][me.lane] = 1.0f;
    }
    if constexpr (KEPT) load_batch<ALL>(shared, p, first, 0, me);
    for (int turn = 0, tile = first; tile * ROWS < p.rows; ++turn, tile += step) {
        unsigned absmax[OCTETS] = {};
        float sum[ROW_TILES][RANK_TILES][4] = {}, value[SLICES][OCTETS][8];
        if constexpr (KEPT) {
            reduce_batch(absmax, sum, value, shared, p, 0, me);
            load_batch<VALUES>(shared, p, tile + step, 0, me);
        } else {
            for (int b = 0; b < batches; ++b) {
                load_batch<ALL>(shared, p, tile, b, me);
                reduce_batch(absmax, sum, value, shared, p, b, me);
            }
            cp_async_wait<0>();  // the zeros past the last slice, which would come where the sums go
        }
        finish_tile(absmax, sum, value, shared, p, tile, turn, me, batches);
        if (!KEPT) break;
    }
    cp_async_wait<0>();  // the zeros past the last tile
}
