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
// A block has `block_rows` rows of W, in tiles of 16; tiles by 128 values of k, *steps*, are the units of its work, and
// a warp has a run of units: whatever n and k, all multiprocessors read as much and all warps do as much. W is the A
// operand of mma m16n8k16 (16 rows), x the B operand (8 rows of x). In a step lane 4 g + t owns block t of rows g and
// g + 8:
//
//            block t=0        t=1        t=2       t=3
//   W row g  word 0 1 2 3     0 1 2 3    ...               word c: k 4c..4c+3 and 16+4c..16+4c+3 of the block
//
// so 16 bytes of each feed eight products. (WEIGHT 8: 16 bytes are k 16t..16t+15 of the step, 16 more are 64 later.)
// k is renumbered to suit, for x as for W: x lies in shared memory as 16-byte pieces [row][part][step][c][t], in the
// order of the pairs that a word unpacks to. A row's stride is 64 bytes more than a multiple of 256: lanes that read
// together then meet in no bank.
//
// Codes come through shared memory, STAGES units ahead: memory is kept busy by some 40 KiB under way on each
// multiprocessor, more than registers would hold. A lane reads what it copied itself, so no warp waits for another
// before the sums are added up, all at the end: warp w leaves its sum of tile j in slot w + j, which is no other's.
//
// Dynamic shared memory: x, rows * PARTS * (256 * steps + 64); codes, WARPS * STAGES * STAGE_BYTES; sums, 64 * rows *
// (WARPS + tiles); multipliers or codebooks of 16 * tiles rows, and 32 bytes. sm_75 and later for float16, sm_80 for
// the others.
//
// Macros: TYPE, WEIGHT, ROWS (8 or 16: what is computed), WARPS, STAGES.
#include "chunk.cuh"
#include "dependent.cuh"
#include "unpack_half.cuh"

constexpr int HALF = TYPE == DTYPE_F16 ? DTYPE_F16 : DTYPE_BF16;
constexpr int PARTS = TYPE == DTYPE_F32 ? 3 : 1;
constexpr int THREADS = 32 * WARPS;
constexpr int LOADS = WEIGHT == 8 ? 2 : 1;
// On Hopper the next kernel's blocks come in beside these, where 64 registers are enough.
#if __CUDA_ARCH__ == 900
constexpr int RESIDENT = (WEIGHT == 4 && PARTS * ROWS == 8 ? 1024 : 512) / THREADS;
#else
constexpr int RESIDENT = 512 / THREADS;
#endif
constexpr int TILE = 16;
constexpr int PIECE_BYTES = 32 * 16;  // of a warp
constexpr int STAGE_BYTES = 2 * LOADS * PIECE_BYTES;
// k from one lane t to the next, and from a word's first four values to its others.
constexpr int LANE_K = WEIGHT == 8 ? 16 : 32;
constexpr int HALF_K = WEIGHT == 8 ? 64 : 16;

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
    unsigned long long early;  // whether weights may be read while the kernel before still runs
    int rows;
    int n;
    int k;
    int rank;
    int block_rows;
    int bias_type;
    int low_type;
    int up_type;
};

__device__ __forceinline__ int row_stride(int steps) { return 256 * steps + 64; }

// Bytes of a row of what lies beside the codes: multipliers or codebooks.
__device__ __forceinline__ int side_bytes(const Params& p) {
    return WEIGHT == 4 ? (p.k + 63) / 64 : WEIGHT == 5 ? 16 : 0;
}

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

// x * smooth to shared memory, in half precision; zeros from k to the end of the last step.
__device__ __forceinline__ void stage_rows(unsigned char* shared, const Params& p, int steps) {
    for (int i = threadIdx.x; i < 16 * steps; i += THREADS) {
        const int step = i / 16, t = i / 4 % 4, c = i % 4;
        const int at[2] = {128 * step + LANE_K * t + 4 * c, 128 * step + LANE_K * t + 4 * c + HALF_K};
        float factor[8];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float4 f = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
            if (p.smooth != nullptr && at[j] < p.k) f = __ldg(reinterpret_cast<const float4*>(p.smooth + at[j]));
            factor[4 * j] = f.x, factor[4 * j + 1] = f.y, factor[4 * j + 2] = f.z, factor[4 * j + 3] = f.w;
        }
#pragma unroll 2
        for (int row = 0; row < p.rows; ++row) {
            float value[8] = {};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (at[j] < p.k) load_quad(value + 4 * j, p.x, row * p.k + at[j]);
            }
            scale_by(value, factor);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                unsigned pair[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int first = 4 * (j / 2) + j % 2;
                    pair[j] = pair_of<HALF>(value[first], value[first + 2]);
                    if (PARTS == 1) continue;
                    // What rounding left over is the next part's; the difference is exact.
                    value[first] -= float_of_bits(static_cast<unsigned short>(pair[j]), HALF);
                    value[first + 2] -= float_of_bits(static_cast<unsigned short>(pair[j] >> 16), HALF);
                }
                unsigned char* to = shared + (row * PARTS + part) * row_stride(steps) + 256 * step + 64 * c + 16 * t;
                *reinterpret_cast<uint4*>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
            }
        }
    }
}

// Begins to copy multipliers or codebooks of rows first..end - 1; returns where the first row's will lie.
__device__ __forceinline__ const unsigned char* copy_side(unsigned char* shared, const Params& p, int first, int end) {
    if constexpr (WEIGHT != 8) {
        const unsigned char* from = WEIGHT == 4 ? p.multipliers : reinterpret_cast<const unsigned char*>(p.codebook);
        const long long bytes = side_bytes(p), begin = first * bytes, aligned = begin / 16 * 16;
        const int count = static_cast<int>(end * bytes - aligned);
        const long long room = p.n * bytes - aligned;
        for (int i = 16 * threadIdx.x; i < count; i += 16 * THREADS) {
            // Rows are not multiples of 16 bytes: the last piece goes on into the next block's, or ends where the array
            // does.
            if (i + 16 <= room) {
                cp_async_16(shared + i, from + aligned + i, true);
            } else {
#pragma unroll 1
                for (int j = i; j < count; ++j) shared[j] = __ldg(from + aligned + j);
            }
        }
        return shared + (begin - aligned);
    }
    return shared;
}

// What a warp copies next, and to where.
struct Source {
    const unsigned char* block;  // the first row of the block
    unsigned offset;             // from `block` to this lane's 16 bytes of row g of the tile
    unsigned eight_rows, next_tile;
    int rows;  // from row g on
    int step;
    int lane_steps[LOADS];  // in which this lane has something to copy
};

__device__ __forceinline__ void copy_unit(unsigned char* slot, Source& s, int steps, bool any) {
#pragma unroll
    for (int i = 0; i < 2 * LOADS; ++i) {
        const int half = i / LOADS, load = i % LOADS;
        const bool valid = any && s.step < s.lane_steps[load] && s.rows > 8 * half;
        const unsigned char* from = s.block + (s.offset + half * s.eight_rows);
        cp_async_16(slot + PIECE_BYTES * i, from + 64 * load, valid);
    }
    cp_async_commit();
    s.offset += 64 * LOADS;
    if (++s.step == steps) {
        s.offset += s.next_tile;
        s.rows -= TILE;
        s.step = 0;
    }
}

// W of word c of a row, a pair of half-precision numbers for each product and half of its k.
__device__ __forceinline__ void unpack_word(unsigned (&pair)[4], const unsigned (&word)[4 * LOADS], int c,
                                            const BlockMultiplier<HALF>& multiplier, const unsigned (&table)[4]) {
    if constexpr (WEIGHT == 4) {
        unpack_s4_half<HALF>(pair, word[c], multiplier);
    } else {
        unsigned first = word[c], second = word[4 * (LOADS - 1) + c];
        if constexpr (WEIGHT == 5) unpack_codebook(word[c], table, first, second);
        unpack_s8_half<HALF>(pair, first);
        unpack_s8_half<HALF>(pair + 2, second);
    }
}

// Sums of 16 rows of W and 8 or 16 of x; in two parts, for a product has to wait for the one before on the same sums.
using Sums = float[ROWS / 8][2][4];

// sum += W @ x.T over one step. `codes` and `side` are this lane's, of row g; `x` is of row g.
__device__ __forceinline__ void multiply_step(Sums& sum, const unsigned char* codes, const unsigned char* side,
                                              int side_row, int side_shift,
                                              const unsigned char* const (&x)[ROWS / 8], int stride) {
    unsigned word[2][4 * LOADS], table[2][4];
    BlockMultiplier<HALF> multiplier[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const uint4 v = *reinterpret_cast<const uint4*>(codes + PIECE_BYTES * (LOADS * half + i));
            word[half][4 * i] = v.x, word[half][4 * i + 1] = v.y, word[half][4 * i + 2] = v.z;
            word[half][4 * i + 3] = v.w;
        }
        const unsigned char* beside = side + 8 * half * side_row;
        if (WEIGHT == 4) multiplier[half].set(*beside >> side_shift & 15u);
        if (WEIGHT == 5) {
            const uint4 v = *reinterpret_cast<const uint4*>(beside);
            table[half][0] = v.x, table[half][1] = v.y, table[half][2] = v.z, table[half][3] = v.w;
        }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        unsigned a[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) unpack_word(a[half], word[half], c, multiplier[half], table[half]);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int i = 0; i < ROWS / 8; ++i) {
                const uint4 b = *reinterpret_cast<const uint4*>(x[i] + part * stride + 64 * c);
                mma_half<HALF>(sum[i][0], {a[0][0], a[1][0], a[0][1], a[1][1]}, b.x, b.y);
                mma_half<HALF>(sum[i][1], {a[0][2], a[1][2], a[0][3], a[1][3]}, b.z, b.w);
            }
        }
    }
}

// Leaves sums in a slot, [row of x][row of W].
__device__ __forceinline__ void put_sums(float* slot, const Sums& sum, int rows) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < ROWS / 8 * 4; ++i) {
        const int row = 8 * (i / 4) + 2 * t + i % 2;
        if (row < rows) slot[row * TILE + 8 * (i % 4 / 2) + g] = sum[i / 4][0][i % 4] + sum[i / 4][1][i % 4];
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
    wait_for_kernel_before_unless(p.early);
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const int steps = (p.k + 127) / 128, stride = row_stride(steps), side_row = side_bytes(p);
    const int first_row = blockIdx.x * p.block_rows, end = min(p.n, first_row + p.block_rows);
    const int tiles = (end - first_row + TILE - 1) / TILE, units = tiles * steps, run = (units + WARPS - 1) / WARPS;
    unsigned char* const rings = shared + p.rows * PARTS * stride;
    float* const sums = reinterpret_cast<float*>(rings + WARPS * STAGES * STAGE_BYTES);
    unsigned char* const side_shared = reinterpret_cast<unsigned char*>(sums + (WARPS + tiles) * p.rows * TILE);
    const int first = warp * run, row_bytes = p.k / 32 * LOADS * 16;
    int tile = first / steps, step = first % steps, left = min(units - first, run);
    unsigned char* const ring = rings + warp * STAGES * STAGE_BYTES + 16 * lane;
    Source source;
    source.block = p.codes + static_cast<long long>(first_row) * row_bytes;
    source.offset = (TILE * tile + g) * row_bytes + 64 * LOADS * step + 16 * t;
    source.eight_rows = 8 * row_bytes;
    source.next_tile = TILE * row_bytes - 64 * LOADS * steps;
    source.rows = end - first_row - TILE * tile - g;
    source.step = step;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) source.lane_steps[i] = (p.k - LANE_K * t - HALF_K * i + 127) / 128;

    // W first: it is under way while x is made ready, and the kernel before ends.
    const unsigned char* side = copy_side(side_shared, p, first_row, end);
    cp_async_commit();
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) copy_unit(ring + i * STAGE_BYTES, source, steps, i < left);
    // Scales and biases are looked at last; in registers they would be too many until then.
    const int feature = first_row + static_cast<int>(threadIdx.x);
    if (feature < end) {
        prefetch_l2(p.scale + feature);
        if (p.bias != nullptr) prefetch_l2(static_cast<const char*>(p.bias) + dtype_bytes(p.bias_type) * feature);
    }
    wait_for_kernel_before();
    let_next_kernel_in();
    stage_rows(shared, p, steps);
    cp_async_wait<STAGES>();
    __syncthreads();

    unsigned stage = 0;
    while (left > 0) {
        Sums sum = {};
        const unsigned char* beside = side + (TILE * tile + g) * side_row + (WEIGHT == 4 ? 2 * step + t / 2 : 0);
        const unsigned char* x[ROWS / 8];
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            const int row = g + 8 * i < p.rows ? g + 8 * i : 0;  // nothing comes of one that x has not
            x[i] = shared + row * PARTS * stride + 256 * step + 16 * t;
        }
        const int stop = max(left - (steps - step), 0);
#pragma unroll 1
        do {
            cp_async_wait<STAGES - 1>();
            multiply_step(sum, ring + stage * STAGE_BYTES, beside, side_row, 4 * (t % 2), x, stride);
            copy_unit(ring + stage * STAGE_BYTES, source, steps, left > STAGES);
            stage = (stage + 1) % STAGES;
            if (WEIGHT == 4) beside += 2;
#pragma unroll
            for (int i = 0; i < ROWS / 8; ++i) x[i] += 256;
        } while (--left > stop);
        put_sums(sums + (warp + tile) * p.rows * TILE, sum, p.rows);
        ++tile;
        step = 0;
    }

    const int block_rows = end - first_row, outputs = p.rows * block_rows;
    int i = threadIdx.x;
    float scale = 0.0f, added = 0.0f;
    auto load = [&]() {
        if (i >= outputs) return;
        const int feature = first_row + i % block_rows;
        scale = __ldg(p.scale + feature);
        added = (p.bias == nullptr ? 0.0f : load_float(p.bias, p.bias_type, feature)) +
                low_rank(p, i / block_rows, feature);
    };
    load();
    __syncthreads();
    while (i < outputs) {
        const int row = i / block_rows, local = i % block_rows, j = local / TILE;
        float total = 0.0f;
#pragma unroll 4
        for (int w = j * steps / run; w <= ((j + 1) * steps - 1) / run; ++w) {
            total += sums[((w + j) * p.rows + row) * TILE + local % TILE];
        }
        store_float(p.y, TYPE, static_cast<long long>(row) * p.n + first_row + local, total * scale + added);
        i += THREADS;
        load();
    }
}
