// y = ((x * smooth) @ W.T) * scale + bias + low @ up.T for at most 16 rows of x and integer weights W that are read
// once.
//
//   x [rows, k], y [rows, n] of TYPE    smooth float32 [k] or null    scale float32 [n]    bias [n], up [n, rank],
//   low [rows, rank] of any float type, or null    k a multiple of 32, any n
//   WEIGHT 4: codes uint8 [n, k/2], multipliers uint8 [n, ceil(k/64)]: W = m * (u - 8), a multiplier a block of 32
//   WEIGHT 5: codes uint8 [n, k/2], codebook int8 [n, 16]: W = codebook[n, u]
//   WEIGHT 8: codes int8 [n, k]: W = codes
//
// Few rows means that the time is that of reading W, so W goes from memory to registers to the tensor cores: integers
// up to 127 are exact in half precision, and one fused multiply-add makes two of them of two nibbles. W is never
// rounded; x * smooth is, once, to x's type (float32: split into three bfloat16, which hold all 24 bits between them).
// The reference rounds W * smooth to x's type instead: they agree to that rounding.
//
// A block computes tiles of 8 * TILES features, gridDim.x apart; its warps take turns at 128 values of k, a *step*.
// x is the A operand of mma m16n8k16 (16 rows), W the B operand. In a step lane 4 g + t owns block t of 32 values:
//
//            block t=0        t=1        t=2       t=3
//   W row g  word 0 1 2 3     0 1 2 3    ...               word c: k 4c..4c+3 and 16+4c..16+4c+3 of the block
//
// so one 16-byte load (two for WEIGHT 8) feeds eight products, two a word. k is renumbered to suit, for x as for W: x
// lies in shared memory as 16-byte pieces [row][part][step][c][t], in the order of the pairs that a word unpacks to.
// A row's stride is 64 bytes more than a multiple of 256: lanes that read together then meet in no bank.
//
// Shared memory: dynamic rows * PARTS * (256 * steps + 64); static for the sums of the warps. The tiles alternate
// between two such buffers, so one barrier a tile is enough. sm_75 and later for float16, sm_80 for the others.
//
// Macros: TYPE, WEIGHT, ROWS (8 or 16: what is computed), TILES, WARPS, UNROLL (steps whose loads are under way at
// once).
#include "chunk.cuh"
#include "dependent.cuh"
#include "unpack_half.cuh"

constexpr int HALF = TYPE == DTYPE_F16 ? DTYPE_F16 : DTYPE_BF16;
constexpr int PARTS = TYPE == DTYPE_F32 ? 3 : 1;
constexpr int THREADS = 32 * WARPS;
// Blocks of a multiprocessor, as far as registers go.
constexpr int RESIDENT = (PARTS == 1 && ROWS * TILES <= 16 ? 768 : 512) / THREADS;
constexpr int FEATURES = 8 * TILES;
static_assert(THREADS % FEATURES == 0, "a thread adds up sums of one feature");
constexpr int LOADS = WEIGHT == 8 ? 2 : 1;

struct Params {
    const void* x;
    const float* smooth;
    const unsigned char* codes;
    const unsigned char* multipliers;
    const signed char* codebook;
    const float* scale;
    const void* bias;
    const void* low;
    const void* up;
    void* y;
    int rows;
    int n;
    int k;
    int rank;
    int bias_type;
    int low_type;
    int up_type;
};

__device__ __forceinline__ int row_stride(int steps) { return 256 * steps + 64; }

__device__ __forceinline__ int piece_offset(int block, int c) { return 256 * (block / 4) + 64 * c + 16 * (block % 4); }

// Four consecutive values; `index` is a multiple of 4.
__device__ __forceinline__ void load_quad(float* value, const void* data, int index) {
    if constexpr (TYPE == DTYPE_F32) {
        const float4 v = __ldg(static_cast<const float4*>(data) + index / 4);
        value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
    } else {
        const uint2 v = __ldg(static_cast<const uint2*>(data) + index / 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            value[i] = float_of_bits(static_cast<unsigned short>((i < 2 ? v.x : v.y) >> (16 * (i % 2))), TYPE);
        }
    }
}

// value * smooth to shared memory, in half precision; zeros from k to the end of the last step.
__device__ __forceinline__ void stage_rows(unsigned char* shared, const Params& p, int steps) {
    const int pieces = 16 * steps;
    for (int i = threadIdx.x; i < p.rows * pieces; i += THREADS) {
        const int row = i / pieces, block = i % pieces / 4, c = i % 4;
        float value[8] = {};  // k 4c..4c+3 and 16+4c..16+4c+3 of the block
        if (32 * block < p.k) {
#pragma unroll
            for (int j = 0; j < 8; j += 4) {
                const int at = 32 * block + 4 * c + 4 * j;
                load_quad(value + j, p.x, row * p.k + at);
                if (p.smooth == nullptr) continue;
                const float4 factor = __ldg(reinterpret_cast<const float4*>(p.smooth + at));
                value[j] = __fmul_rn(value[j], factor.x), value[j + 1] = __fmul_rn(value[j + 1], factor.y);
                value[j + 2] = __fmul_rn(value[j + 2], factor.z), value[j + 3] = __fmul_rn(value[j + 3], factor.w);
            }
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            unsigned pair[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int first = 4 * (j / 2) + j % 2;
                pair[j] = pair_of<HALF>(value[first], value[first + 2]);
                // What rounding left over is the next part's; the difference is exact.
                value[first] -= float_of_bits(static_cast<unsigned short>(pair[j]), HALF);
                value[first + 2] -= float_of_bits(static_cast<unsigned short>(pair[j] >> 16), HALF);
            }
            unsigned char* to = shared + (row * PARTS + part) * row_stride(steps) + piece_offset(block, c);
            *reinterpret_cast<uint4*>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
        }
    }
}

// What a lane has of one W row and step.
struct Block {
    unsigned word[4 * LOADS];
    unsigned multiplier;
};

__device__ __forceinline__ Block load_block(const Params& p, int feature, int block) {
    const int blocks = p.k / 32;
    const bool valid = feature < p.n && block < blocks;
    const long long index = static_cast<long long>(feature) * blocks + block;
    Block b;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const uint4 v = valid ? load_once(p.codes + (index * LOADS + i) * 16) : make_uint4(0, 0, 0, 0);
        b.word[4 * i] = v.x, b.word[4 * i + 1] = v.y, b.word[4 * i + 2] = v.z, b.word[4 * i + 3] = v.w;
    }
    b.multiplier = 0;
    if (WEIGHT == 4 && valid) {
        const unsigned both = __ldg(p.multipliers + static_cast<long long>(feature) * ((blocks + 1) / 2) + block / 2);
        b.multiplier = block % 2 ? both >> 4 : both & 15;
    }
    return b;
}

// What a lane reads of W for its next products: UNROLL steps of its rows of a tile.
struct Fetched {
    Block block[UNROLL][TILES];
    unsigned table[TILES][4];  // WEIGHT 5
};

__device__ __forceinline__ void fetch(Fetched& w, const Params& p, int tile, int first) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const int feature = tile * FEATURES + 8 * i + g;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) w.block[u][i] = load_block(p, feature, 4 * (first + u * WARPS) + t);
        if (WEIGHT == 5 && feature < p.n) {
            const uint4 v = __ldg(reinterpret_cast<const uint4*>(p.codebook) + feature);
            w.table[i][0] = v.x, w.table[i][1] = v.y, w.table[i][2] = v.z, w.table[i][3] = v.w;
        }
    }
}

// W of word c, a pair of half-precision numbers for each half of two B fragments.
__device__ __forceinline__ void unpack_word(unsigned (&pair)[4], const Block& block, int c,
                                            const BlockMultiplier<HALF>& multiplier, const unsigned (&table)[4]) {
    if constexpr (WEIGHT == 4) {
        unpack_s4_half<HALF>(pair, block.word[c], multiplier);
    } else {
        unsigned first = block.word[c], second = block.word[4 * (LOADS - 1) + c];
        if constexpr (WEIGHT == 5) unpack_codebook(block.word[c], table, first, second);
        unpack_s8_half<HALF>(pair, first);
        unpack_s8_half<HALF>(pair + 2, second);
    }
}

// sum += x @ W.T over one step.
__device__ __forceinline__ void multiply_step(float (&sum)[TILES][4], const Block (&block)[TILES],
                                              const unsigned (&table)[TILES][4], const unsigned char* shared, int rows,
                                              int steps, int step) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    BlockMultiplier<HALF> multiplier[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) multiplier[i].set(block[i].multiplier);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        unsigned pair[TILES][4];
#pragma unroll
        for (int i = 0; i < TILES; ++i) unpack_word(pair[i], block[i], c, multiplier[i], table[i]);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            uint4 x[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
#pragma unroll
            for (int half = 0; half < ROWS / 8; ++half) {
                const int row = g + 8 * half;
                if (row >= rows) continue;
                const unsigned char* from = shared + (row * PARTS + part) * row_stride(steps);
                x[half] = *reinterpret_cast<const uint4*>(from + piece_offset(4 * step + t, c));
            }
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                mma_half<HALF>(sum[i], {x[0].x, x[1].x, x[0].y, x[1].y}, pair[i][0], pair[i][1]);
                mma_half<HALF>(sum[i], {x[0].z, x[1].z, x[0].w, x[1].w}, pair[i][2], pair[i][3]);
            }
        }
    }
}

__device__ __forceinline__ float low_rank(const Params& p, int row, int feature) {
    float sum = 0.0f;
    if (p.up == nullptr) return sum;
#pragma unroll 4
    for (int r = 0; r < p.rank; ++r) {
        sum += load_float(p.low, p.low_type, row * p.rank + r) *
               load_float(p.up, p.up_type, static_cast<long long>(feature) * p.rank + r);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) w4a16_linear(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    DYNAMIC_SHARED(shared);
    __shared__ __align__(16) float sums[2][WARPS][ROWS][FEATURES];
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32;
    const int steps = (p.k + 127) / 128;
    // W first: its first bytes are under way while x is made ready, and while the sums of the tile before are added up.
    Fetched w;
    fetch(w, p, blockIdx.x, warp);
    stage_rows(shared, p, steps);
    __syncthreads();

    for (int tile = blockIdx.x, buffer = 0; tile * FEATURES < p.n; tile += gridDim.x, buffer ^= 1) {
        const int out = tile * FEATURES + threadIdx.x % FEATURES;
        const float scale = out < p.n ? __ldg(p.scale + out) : 0.0f;
        const float bias = out < p.n && p.bias != nullptr ? load_float(p.bias, p.bias_type, out) : 0.0f;
        float sum[TILES][4] = {};
        for (int first = warp; first < steps; first += UNROLL * WARPS) {
            if (first != warp) fetch(w, p, tile, first);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int step = first + u * WARPS;
                if (step < steps) multiply_step(sum, w.block[u], w.table, shared, p.rows, steps, step);
            }
        }
        fetch(w, p, tile + gridDim.x, warp);
        float(&mine)[ROWS][FEATURES] = sums[buffer][warp];
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
            if (i % 2 && ROWS == 8) continue;
            float* to = &mine[8 * (i % 2) + g][8 * (i / 2) + 2 * t];
            *reinterpret_cast<float2*>(to) = make_float2(sum[i / 2][2 * (i % 2)], sum[i / 2][2 * (i % 2) + 1]);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * FEATURES; i += THREADS) {
            const int row = i / FEATURES;
            if (row >= p.rows || out >= p.n) continue;
            float total = 0.0f;
#pragma unroll
            for (int v = 0; v < WARPS; ++v) total += sums[buffer][v][row][i % FEATURES];
            const float y = total * scale + bias + low_rank(p, row, out);
            store_float(p.y, TYPE, static_cast<long long>(row) * p.n + out, y);
        }
    }
}
