// What quantize_per_token computes, and the first half of the low-rank branch from the same read of x:
// low = round(x * smooth) @ down.T, summed in float32 on the tensor cores, rounded to x's type.
//
//   x [rows, k], down [rank, k], low [rows, rank] of TYPE; codes int8 [rows, k]; scale float32 [rows]; all contiguous;
//   k a multiple of 32
//
// SPLIT blocks, a cluster, own 16 * ROW_TILES rows: `down` is read once for them. A warp of them owns SLICES slices of
// 32 values at a time; in a slice lane 4 g + t has values 8t..8t+7 of rows g, g + 8, ... of x and of `down`:
//
//           t=0 t=1 t=2 t=3
//   row g                           each t: 8 values, 16 bytes
//
// Of x those are two A fragments of mma m16n8k16 if k is renumbered, which a sum does not notice: words 0 and 1 are a
// thread's share of the first product, words 2 and 3 of the second. Of `down` they are the B fragments.
//
// Both are copied to shared memory, all that the block wants at once, so that memory's latency is paid once and takes
// no registers. A thread reads there what it has copied itself: nobody waits for others, or shares a bank with them.
//
// Up to SPLIT * WARPS * SLICES * 32 values a row there is one batch and x is read once; longer rows are read again for
// the codes, last batch first, since that is what the L2 cache still has.
//
// Every block pushes what it has to those that want it: the largest magnitudes to all of the cluster, the sums to the
// block that adds them up, one of SPLIT parts each. That takes no barrier of the cluster but one while x is on its way.
//
// sm_75 and later; bfloat16 from sm_80; SPLIT > 1 from sm_90, before which it is taken for 1.
//
// Macros: TYPE (float16 or bfloat16), ROW_TILES (1, 2), RANK_TILES (ceil(rank / 8)), SPLIT (1, 2, 4, 8), WARPS, SLICES.
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
// Blocks of a multiprocessor, as far as registers go: 96 are enough for a thread with few sums.
constexpr int WANTED = (RANK_TILES <= 4 ? 640 : RANK_TILES <= 8 ? 384 : 256) / THREADS;
constexpr int RESIDENT = WANTED > 0 ? WANTED : 1;
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
    uint4 x[WARPS][SLICES][OCTETS][32];
    float smooth[WARPS][SLICES][32];
    union {  // a thread's sums take the place of what it had of `down`
        uint4 down[SLICES][RANK_TILES][32];
        float4 sums[SUMS][32];
    } of_warp[WARPS];
    float4 parts[BLOCKS][PART];  // of the tile's sums that this block adds up: what each block of the cluster has
    unsigned of_warps[WARPS][ROWS];
    unsigned magnitudes[BLOCKS][ROWS];  // the largest of each block
    unsigned long long magnitudes_came, sums_came;
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
        const unsigned magnitudes = shared_address(&shared.magnitudes_came), sums = shared_address(&shared.sums_came);
        barrier_init(magnitudes, 1);
        barrier_init(sums, 1);
        barrier_init_visible();
        barrier_expect(magnitudes, sizeof(shared.magnitudes));
        barrier_expect(sums, sizeof(shared.parts));
    }
    __syncwarp();
    cluster_arrive_relaxed();
}

// ---- Rows

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }

// The same in all lanes, which the compiler sees this way.
__device__ __forceinline__ int warp_of() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// A row of x. Past the last one is the last one again, for which the same is stored more than once.
__device__ __forceinline__ int row_of(const Params& p, int octet, int lane) {
    return min(static_cast<int>(blockIdx.x / BLOCKS) * ROWS + 8 * octet + lane / 4, p.rows - 1);
}

// The first value of a slice of a batch.
__device__ __forceinline__ int column_of(int batch, int warp, int slice) {
    return 32 * (((batch * BLOCKS + rank_in_cluster()) * WARPS + warp) * SLICES + slice);
}

// Begin to copy a batch, one group a slice: with `down`, or for the codes alone.
__device__ __forceinline__ void load_batch(Shared& shared, const Params& p, int index, int warp, bool with_down) {
    const int lane = opaque(lane_of());  // no addresses wait in registers for the next batch
    const int first = column_of(index, warp, 0), at = first + 8 * (lane % 4);
    const unsigned short *x[OCTETS], *down[RANK_TILES];
#pragma unroll
    for (int r = 0; r < OCTETS; ++r) {
        x[r] = static_cast<const unsigned short*>(p.x) + static_cast<long long>(row_of(p, r, lane)) * p.k + at;
    }
#pragma unroll
    for (int n = 0; n < RANK_TILES; ++n) {
        // Past the last line is the last one again, of whose sums nothing is stored.
        down[n] = static_cast<const unsigned short*>(p.down) + min(8 * n + lane / 4, p.rank - 1) * p.k + at;
    }
    const float* smooth = p.smooth + first + 4 * lane;
    __syncwarp();  // all lanes are done with the factors of the batch before
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
        const bool inside = first + 32 * i < p.k;
#pragma unroll
        for (int r = 0; r < OCTETS; ++r) cp_async_16(&shared.x[warp][i][r][lane], x[r] + 32 * i, inside);
        if (p.smooth != nullptr && lane < 8) cp_async_16(&shared.smooth[warp][i][4 * lane], smooth + 32 * i, inside);
#pragma unroll
        for (int n = 0; n < RANK_TILES; ++n) {
            if (with_down) cp_async_16(&shared.of_warp[warp].down[i][n][lane], down[n] + 32 * i, inside);
        }
        cp_async_commit();
    }
}

__device__ __forceinline__ void read_factors(float (&factor)[8], const Shared& shared, const Params& p, int warp,
                                             int slice) {
    const float4* four = reinterpret_cast<const float4*>(&shared.smooth[warp][slice][8 * (lane_of() % 4)]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float4 f = p.smooth == nullptr ? make_float4(1.0f, 1.0f, 1.0f, 1.0f) : four[i];
        factor[4 * i] = f.x, factor[4 * i + 1] = f.y, factor[4 * i + 2] = f.z, factor[4 * i + 3] = f.w;
    }
}

__device__ __forceinline__ void read_values(float (&value)[8], const Shared& shared, int warp, int slice, int octet,
                                            const float (&factor)[8]) {
    const uint4 v = shared.x[warp][slice][octet][lane_of()];
    floats_of(Chunk<TYPE>{{v.x, v.y, v.z, v.w}}, value);
    scale_by(value, factor);
}

// The largest magnitude: bits of floats, compared as signed numbers, find the largest positive one, and as unsigned
// ones the largest negative one. That takes no instruction to drop the sign.
struct Magnitude {
    int positive = 0;
    unsigned negative = 0;

    __device__ __forceinline__ void fold(float v) {
        positive = max(positive, __float_as_int(v));
        negative = max(negative, __float_as_uint(v));
    }
    __device__ __forceinline__ unsigned bits() const {
        return larger(static_cast<unsigned>(positive), negative & 0x7fffffffu);
    }
};

// Slice `I` of a batch and those after it, as they arrive, into the rows' largest magnitudes and the products.
template <int I = 0>
__device__ __forceinline__ void reduce_batch(Magnitude (&absmax)[OCTETS], float (&sum)[ROW_TILES][RANK_TILES][4],
                                             const Shared& shared, const Params& p, int index, int warp) {
    if constexpr (I < SLICES) {
        cp_async_wait<SLICES - 1 - I>();
        __syncwarp();  // the factors are copied by eight lanes for all
        if (column_of(index, warp, I) >= p.k) return;
        float smooth[8];
        read_factors(smooth, shared, p, warp, I);
        unsigned a[OCTETS][4];
#pragma unroll
        for (int r = 0; r < OCTETS; ++r) {
            float value[8];
            read_values(value, shared, warp, I, r, smooth);
#pragma unroll
            for (int j = 0; j < 8; ++j) absmax[r].fold(value[j]);
#pragma unroll
            for (int j = 0; j < 4; ++j) a[r][j] = pair_of<TYPE>(value[2 * j], value[2 * j + 1]);
        }
#pragma unroll
        for (int n = 0; n < RANK_TILES; ++n) {
            const uint4 b = shared.of_warp[warp].down[I][n][lane_of()];
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                mma_half<TYPE>(sum[r][n], {a[2 * r][0], a[2 * r + 1][0], a[2 * r][1], a[2 * r + 1][1]}, b.x, b.y);
                mma_half<TYPE>(sum[r][n], {a[2 * r][2], a[2 * r + 1][2], a[2 * r][3], a[2 * r + 1][3]}, b.z, b.w);
            }
        }
        reduce_batch<I + 1>(absmax, sum, shared, p, index, warp);
    }
}

__device__ __forceinline__ void store_codes(const Shared& shared, const float (&factor)[OCTETS], const Params& p,
                                            int index, int warp) {
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
        const int first = column_of(index, warp, i), at = first + 8 * (lane_of() % 4);
        if (first >= p.k) break;
        float smooth[8];
        read_factors(smooth, shared, p, warp, i);
#pragma unroll
        for (int r = 0; r < OCTETS; ++r) {
            float value[8];
            read_values(value, shared, warp, i, r, smooth);
            signed char* to = p.codes + static_cast<long long>(row_of(p, r, lane_of())) * p.k + at;
            *reinterpret_cast<uint2*>(to) = codes_of(value, factor[r]);
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

__device__ __forceinline__ void store_low(const Params& p, int four, const float4& sum) {
    const int lane = four % 32, n = four / 32 % RANK_TILES, tile = four / 32 / RANK_TILES;
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = blockIdx.x / BLOCKS * ROWS + 16 * tile + 8 * (i / 2) + lane / 4;
        const int column = 8 * n + 2 * (lane % 4) + i % 2;
        if (row < p.rows && column < p.rank) {
            store_float(p.low, TYPE, static_cast<long long>(row) * p.rank + column, values[i]);
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
    const int warp = warp_of(), lane = lane_of();
    const int batches = (p.k + BLOCKS * WARPS * SLICES * 32 - 1) / (BLOCKS * WARPS * SLICES * 32);

    if constexpr (BLOCKS > 1) cluster_begin(shared);
    Magnitude absmax[OCTETS];
    float sum[ROW_TILES][RANK_TILES][4] = {};
    for (int b = 0;;) {
        load_batch(shared, p, b, warp, true);
        reduce_batch(absmax, sum, shared, p, b, warp);
        if (++b == batches) break;
    }

    cp_async_wait<0>();  // the zeros past the last slice, which would come where the sums go
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
        const float(&d)[4] = sum[i / RANK_TILES][i % RANK_TILES];
        shared.of_warp[warp].sums[i][lane] = make_float4(d[0], d[1], d[2], d[3]);
    }
    // Lane 4 g + t speaks for row g of octet t.
    const int octet = lane % 4 % OCTETS, mine = 8 * octet + lane / 4;
#pragma unroll
    for (int r = 0; r < OCTETS; ++r) {
        const unsigned bits = largest_of_lanes<4>(absmax[r].bits());
        if (r == lane % 4) shared.of_warps[warp][mine] = bits;
    }
    __syncthreads();
    if constexpr (BLOCKS > 1) {
        cluster_wait();
        if (threadIdx.x < ROWS) {
            const unsigned bits = largest_of(shared.of_warps, threadIdx.x);
#pragma unroll
            for (int c = 0; c < BLOCKS; ++c) {
                push(&shared.magnitudes[rank_in_cluster()][threadIdx.x], bits, &shared.magnitudes_came, c);
            }
        }
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < 32 * SUMS; i += THREADS) {
        float4 total = shared.of_warp[0].sums[i / 32][i % 32];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) add(total, shared.of_warp[w].sums[i / 32][i % 32]);
        if constexpr (BLOCKS > 1) {
            push(&shared.parts[rank_in_cluster()][i % PART], total, &shared.sums_came, i / PART);
        } else {
            store_low(p, i, total);
        }
    }
    unsigned bits;
    if constexpr (BLOCKS > 1) {
        barrier_wait(shared_address(&shared.magnitudes_came), 0);
        bits = largest_of(shared.magnitudes, mine);
    } else {
        bits = largest_of(shared.of_warps, mine);
    }

    if (rank_in_cluster() == 0 && warp == 0) p.scale[row_of(p, octet, lane)] = token_scale(bits);
    const float of_mine = token_factor(bits);
    float factor[OCTETS];
#pragma unroll
    for (int r = 0; r < OCTETS; ++r) factor[r] = __shfl_sync(0xffffffffu, of_mine, lane / 4 * 4 + r);
    for (int b = batches - 1;; --b) {
        store_codes(shared, factor, p, b, warp);
        if (b == 0) break;
        load_batch(shared, p, b - 1, warp, false);
        cp_async_wait<0>();
        __syncwarp();
    }

    if constexpr (BLOCKS > 1) {
        barrier_wait(shared_address(&shared.sums_came), 0);
#pragma unroll 1
        for (int i = threadIdx.x; i < PART; i += THREADS) {
            float4 total = shared.parts[0][i];
#pragma unroll
            for (int c = 1; c < BLOCKS; ++c) add(total, shared.parts[c][i]);
            store_low(p, rank_in_cluster() * PART + i, total);
        }
    }
}
