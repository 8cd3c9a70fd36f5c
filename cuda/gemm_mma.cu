// Integer product of quantized activations and packed weights, for every tensor core from Turing on.
//
//     out[p, n] = epilogue(sum over k of weight[n, k] * patch[p, k])
//
// over the features n and the output pixels p = (b, oh, ow) of a convolution of NHWC int8 activations. A linear layer
// is the convolution of one image of 1 x M pixels with a 1 x 1 kernel. K runs over (segment, tap, channel of the
// segment); segments are channel ranges, multiples of 32 wide, with an activation scale each. No patch matrix is made:
// a tap is the same rows of x, shifted, and its padding is zeros, which is what a quantized zero is.
//
// Compile-time choices:
//   WEIGHT     4: 4-bit codes times a 4-bit multiplier a block of 32; 5: 4-bit codes into a codebook; 8: int8
//   FEATURES   of a block's output tile: 64, 128        TOKENS  its pixels: 16, 32, 64, 128
//   STAGES     steps of 64 in k under way, 2 to 4       SEGMENTED  1: several segments, each with its scale
//
//                    TOKENS              One block is 8 warps. The weights are operand A of the mma, so that they go
//              +---------+---------+     from packed words to fragments within a thread's registers; the activations
//     FEATURES | warp 0  | warp 4  |     are operand B. A warp's tile is WARP_FEATURES x WARP_TOKENS; lane 4 g + t
//              +---------+---------+     holds features g, g + 8 and tokens 2 t, 2 t + 1 of every 16 x 8 product in
//              | warp 1  | warp 5  |     it. The picture is of 128 x 128, with tiles of 32 x 64.
//              +---------+---------+
//                  ...       ...
//
// Shared memory, a stage: TOKENS rows of 64 bytes of x, FEATURES rows of 32 (64 for int8) bytes of weights, FEATURES
// bytes of multiplier pairs. Pieces of 16 bytes are permuted within a row (see `piece_offset`), which makes the copies
// and every ldmatrix free of bank conflicts. The epilogue reuses it to turn the tile, so that all that has the output's
// layout (shift, residual, output) is read and written along the features.
//
// Where the channels of a segment are an odd multiple of 32, the last step of every tap is half empty: its second half
// is filled with zeros.
#include "dependent.cuh"
#include "dtype.cuh"
#include "ptx.cuh"
#include "unpack.cuh"

struct Params {
    const signed char* x;              // [B, H, W, C]
    const unsigned char* codes;        // [N, K / 2], or int8 [N, K]
    const unsigned char* multipliers;  // [N, ceil(K / 64)]
    const signed char* codebook;       // [N, 16]
    const float* scale;                // [N]
    const void* bias;                  // [N] or null
    const void* shift;                 // [B, N] or null
    const void* residual;              // [B, OH, OW, N] in the output's type, or null
    const float* x_scale;              // [B OH OW / x_scale_pixels, segments]
    const void* x_low;                 // [B OH OW, rank] or null
    const void* up;                    // [N, rank], of x_low's type
    void* out;                         // [B, OH, OW, N]
    int B, H, W, C, OH, OW, N, KH, KW, stride_h, stride_w, pad_h, pad_w;
    int segments, segment_width[4];
    int x_scale_pixels;  // consecutive pixels that share a row of x_scale
    int rank;            // of the low-rank branch; fastest as a multiple of 8
    int bias_dtype, shift_dtype, low_dtype, out_dtype;
};

constexpr int THREADS = 256;
constexpr int STEP = 64;
constexpr int PIECE = 16;  // bytes of one asynchronous copy
// Larger warp tiles read less shared memory a product; smaller ones give all 8 warps work in small tiles.
constexpr int WARP_FEATURES = FEATURES * TOKENS >= 8192 ? 32 : 16;
constexpr int WARP_ROWS = FEATURES / WARP_FEATURES;
constexpr int WARP_TOKENS = TOKENS * WARP_ROWS / 8;
constexpr int M_TILES = WARP_FEATURES / 16;
constexpr int N_TILES = WARP_TOKENS / 8;
// Pixel tiles of the rectangle of blocks that run at the same time.
constexpr int RASTER = 8;
// Two blocks on a multiprocessor hide each other's barriers, but leave a thread 128 registers.
constexpr int MIN_BLOCKS = FEATURES * TOKENS * (SEGMENTED ? 2 : 1) >= 16384 ? 1 : 2;
static_assert(WARP_ROWS <= 8 && N_TILES * 64 == TOKENS * WARP_ROWS, "8 warps must tile FEATURES x TOKENS");

constexpr int X_ROW = STEP;
constexpr int WEIGHT_ROW = WEIGHT == 8 ? STEP : STEP / 2;
constexpr int BLOCK_BYTES = WEIGHT_ROW / 2;  // of 32 weights
constexpr int X_BYTES = TOKENS * X_ROW;
constexpr int WEIGHT_BYTES = FEATURES * WEIGHT_ROW;
constexpr int SCALE_ROW_BYTES = 4 * TOKENS;  // before the stages: each token's row of x_scale
constexpr int STAGE_BYTES = X_BYTES + WEIGHT_BYTES + (WEIGHT == 4 ? FEATURES : 0);

// Where a piece of a row of 32 or 64 bytes lies, such that any 8 rows from a multiple of 8 on have the same piece in
// 8 different groups of 4 banks.
template <int ROW_BYTES>
__device__ __forceinline__ int piece_offset(int row, int piece) {
    const int turn = ROW_BYTES == 64 ? (row >> 1) & 3 : (row >> 2) & 1;
    return row * ROW_BYTES + (piece ^ turn) * PIECE;
}

// The position of a step in K, the same for all threads.
struct Walk {
    int segment = 0, width, tap_row = 0, tap_column = 0;
    int first = 0;    // channel of x at which the segment starts
    int channel = 0;  // of the segment
    unsigned block = 0;  // of 32 weights

    __device__ __forceinline__ explicit Walk(const Params& p) : width(p.segment_width[0]) {}

    __device__ __forceinline__ int left() const { return width - channel; }

    __device__ __forceinline__ void advance(const Params& p) {
        block += left() > 32 ? 2 : 1;
        channel += STEP;
        if (channel < width) return;
        channel = 0;
        if (++tap_column < p.KW) return;
        tap_column = 0;
        if (++tap_row < p.KH) return;
        tap_row = 0;
        if (SEGMENTED && ++segment < p.segments) {
            first += width;
            width = p.segment_width[segment];
        }
    }
};

__device__ __forceinline__ int steps_of_segment(const Params& p, int segment) {
    return p.KH * p.KW * ((p.segment_width[segment] + STEP - 1) / STEP);
}

// What one thread copies of every step.
struct Loader {
    static constexpr int X_PIECES = (X_BYTES / PIECE + THREADS - 1) / THREADS;
    static constexpr int WEIGHT_PIECES = (WEIGHT_BYTES / PIECE + THREADS - 1) / THREADS;
    static constexpr int X_ROW_PIECES = X_ROW / PIECE;
    static constexpr int WEIGHT_ROW_PIECES = WEIGHT_ROW / PIECE;
    static constexpr int NOWHERE = -(1 << 30);

    int position[X_PIECES];  // pixel of x under tap (0, 0): none of the image's where that tap is outside
    int row[X_PIECES], column[X_PIECES];
    int first_feature;
    unsigned pair = 0;  // of multipliers, on its way to shared memory

    __device__ __forceinline__ Loader(const Params& p, int first_feature, int first_pixel)
        : first_feature(first_feature) {
        const int thread = threadIdx.x;
#pragma unroll
        for (int i = 0; i < X_PIECES; ++i) {
            const int token = (thread + i * THREADS) / X_ROW_PIECES;
            const int pixel = first_pixel + token;
            const int image = pixel / (p.OH * p.OW);
            const int inside = pixel - image * (p.OH * p.OW);
            row[i] = inside / p.OW * p.stride_h - p.pad_h;
            column[i] = inside % p.OW * p.stride_w - p.pad_w;
            position[i] = (image * p.H + row[i]) * p.W + column[i];
            if (token >= TOKENS || image >= p.B) row[i] = NOWHERE;
        }
    }

    __device__ __forceinline__ void start(const Params& p, const Walk& at, unsigned char* stage) {
        const int thread = threadIdx.x;
        // Conditions are joined without branches, and addresses made anew: registers of pointers are better spent on
        // accumulators. Where nothing is read the address may be none.
        const int tap = at.tap_row * p.W + at.tap_column;
        const signed char* channels = p.x + at.first + at.channel + thread % X_ROW_PIECES * PIECE;
#pragma unroll
        for (int i = 0; i < X_PIECES; ++i) {
            const int token = (thread + i * THREADS) / X_ROW_PIECES, piece = thread % X_ROW_PIECES;
            const bool inside = (static_cast<unsigned>(row[i] + at.tap_row) < static_cast<unsigned>(p.H)) &
                                (static_cast<unsigned>(column[i] + at.tap_column) < static_cast<unsigned>(p.W)) &
                                (piece * PIECE < at.left());
            const unsigned long long pixel = static_cast<unsigned>(position[i] + tap);
            const signed char* from = channels + pixel * static_cast<unsigned>(p.C);
            if (X_BYTES / PIECE % THREADS == 0 || token < TOKENS) {
                cp_async_16(stage + piece_offset<X_ROW>(token, piece), from, inside);
            }
        }
        const unsigned blocks = p.KH * p.KW * (p.C / 32);
#pragma unroll
        for (int i = 0; i < WEIGHT_PIECES; ++i) {
            const int index = thread + i * THREADS, piece = index % WEIGHT_ROW_PIECES, row = index / WEIGHT_ROW_PIECES;
            const unsigned long long feature = static_cast<unsigned>(first_feature + row);
            const unsigned char* start = p.codes + feature * (blocks * BLOCK_BYTES);
            const unsigned char* from = start + at.block * BLOCK_BYTES + piece * PIECE;
            const bool exists = feature < static_cast<unsigned>(p.N);
            const bool inside = exists & (piece * (STEP / WEIGHT_ROW_PIECES) < at.left());
            if (WEIGHT_BYTES / PIECE % THREADS == 0 || index < WEIGHT_BYTES / PIECE) {
                cp_async_16(stage + X_BYTES + piece_offset<WEIGHT_ROW>(row, piece), from, inside);
            }
        }
        if (WEIGHT == 4 && thread < FEATURES && first_feature + thread < p.N) {
            // Two multipliers a byte: where a step starts with an odd block, its pair lies across two bytes.
            const unsigned long long feature = static_cast<unsigned>(first_feature + thread);
            const unsigned char* from = p.multipliers + feature * ((blocks + 1) / 2) + at.block / 2;
            const bool odd = at.block & 1;
            pair = __ldg(from) >> (odd ? 4 : 0);
            if (odd && at.left() > 32) pair |= static_cast<unsigned>(__ldg(from + 1)) << 4;
        }
    }

    // Last in an iteration: by then the load of `start` has arrived.
    __device__ __forceinline__ void finish(unsigned char* stage) const {
        if (WEIGHT == 4 && threadIdx.x < FEATURES) {
            stage[X_BYTES + WEIGHT_BYTES + threadIdx.x] = static_cast<unsigned char>(pair);
        }
    }
};

struct Warp {
    int lane, g, t;
    int feature, token;  // of the warp's tile in the block's

    __device__ __forceinline__ Warp() {
        const int warp = threadIdx.x / 32;
        lane = threadIdx.x % 32;
        g = lane / 4;
        t = lane % 4;
        feature = warp % WARP_ROWS * WARP_FEATURES;
        token = warp / WARP_ROWS * WARP_TOKENS;
    }
};

using Tables = unsigned[M_TILES][2][4];  // the codebooks of features g, g + 8 of every tile

// Fragments of both halves of a step, for 16 features at `tile`.
__device__ __forceinline__ void weight_fragments(unsigned (&a)[2][4], const unsigned char* weights,
                                                 const unsigned char* pairs, const unsigned (&table)[2][4], int tile,
                                                 const Warp& warp) {
    const int row = tile + warp.lane % 16, piece = warp.lane / 16;
    if constexpr (WEIGHT == 8) {
        ldmatrix_x4(a[0], weights + piece_offset<WEIGHT_ROW>(row, piece));
        ldmatrix_x4(a[1], weights + piece_offset<WEIGHT_ROW>(row, piece + 2));
    } else {
        unsigned words[4];  // features g, g + 8 of the first block of 32, then of the second
        ldmatrix_x4(words, weights + piece_offset<WEIGHT_ROW>(row, piece));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (WEIGHT == 5) {
                unpack_codebook(words[i], table[i], a[0][i], a[0][i + 2]);
                unpack_codebook(words[i + 2], table[i], a[1][i], a[1][i + 2]);
            } else {
                const unsigned pair = pairs[tile + warp.g + 8 * i];
                unpack_s4(words[i], pair & 15, a[0][i], a[0][i + 2]);
                unpack_s4(words[i + 2], pair >> 4, a[1][i], a[1][i + 2]);
            }
        }
    }
}

// acc += weights * x over one stage.
__device__ __forceinline__ void multiply(int (&acc)[M_TILES][N_TILES][4], const unsigned char* stage,
                                         const Tables& tables, const Warp& warp) {
    unsigned a[M_TILES][2][4];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
        weight_fragments(a[m], stage + X_BYTES, stage + X_BYTES + WEIGHT_BYTES, tables[m], warp.feature + 16 * m, warp);
    }
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        unsigned b[4];  // 8 tokens by 64 channels
        ldmatrix_x4(b, stage + piece_offset<X_ROW>(warp.token + 8 * n + warp.lane % 8, warp.lane / 8));
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            mma_s8(acc[m][n], a[m][0], b[0], b[1]);
            mma_s8(acc[m][n], a[m][1], b[2], b[3]);
        }
    }
}

using Tile = float[M_TILES][N_TILES][4];

// y = acc * x_scale, or y += acc * x_scale from the second segment on.
__device__ __forceinline__ void scale_segment(Tile& y, int (&acc)[M_TILES][N_TILES][4], const Params& p, int segment,
                                              const int* scale_row, const Warp& warp) {
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        float x_scale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const long long row = scale_row[warp.token + 8 * n + 2 * warp.t + i];
            x_scale[i] = __ldg(p.x_scale + row * p.segments + segment);
        }
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float product = __fmul_rn(__int2float_rn(acc[m][n][i]), x_scale[i & 1]);
                y[m][n][i] = segment == 0 ? product : __fadd_rn(y[m][n][i], product);
                acc[m][n][i] = 0;
            }
        }
    }
}

// Features and pixels past the end take the last one's values: what becomes of them is not stored.
__device__ __forceinline__ void scale_and_bias(Tile& y, const Params& p, int feature, const Warp& warp) {
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; ++i) {
        const int row = min(feature + 8 * i + warp.g, p.N - 1);
        const float scale = __ldg(p.scale + row);
#pragma unroll
        for (int j = 0; j < 2 * N_TILES; ++j) {
            float& value = y[i / 2][j / 2][i % 2 * 2 + j % 2];
            value = __fmul_rn(value, scale);
        }
        if (p.bias == nullptr) continue;
        const float bias = load_float(p.bias, p.bias_dtype, row);
#pragma unroll
        for (int j = 0; j < 2 * N_TILES; ++j) {
            float& value = y[i / 2][j / 2][i % 2 * 2 + j % 2];
            value = __fadd_rn(value, bias);
        }
    }
}

// Two consecutive half-precision values of a row.
__device__ __forceinline__ unsigned pair_at(const void* matrix, int row, int rows, int column, int columns) {
    const long long start = static_cast<long long>(min(row, rows - 1)) * columns + column;
    return __ldg(reinterpret_cast<const unsigned*>(static_cast<const unsigned short*>(matrix) + start));
}

// y += up * x_low^T on the tensor cores, by mma_f16 or mma_bf16.
template <void (*MMA)(float (&)[4], const unsigned (&)[4], unsigned, unsigned)>
__device__ __forceinline__ void add_low_rank(Tile& y, const Params& p, int feature, int pixel, const Warp& warp) {
    const int pixels = p.B * p.OH * p.OW;
#pragma unroll 1
    for (int step = 0; step < p.rank; step += 16) {
        // Addresses are made anew in every step: kept, they would spill.
        const int k = step + 2 * warp.t, rank = opaque(p.rank), first_row = opaque(pixel + warp.g);
        const bool both = step + 8 < p.rank;  // an odd multiple of 8 ends with half a step
        unsigned a[M_TILES][4] = {};
#pragma unroll
        for (int i = 0; i < 2 * M_TILES; ++i) {
            a[i / 2][i % 2] = pair_at(p.up, feature + 8 * i + warp.g, p.N, k, rank);
            if (both) a[i / 2][i % 2 + 2] = pair_at(p.up, feature + 8 * i + warp.g, p.N, k + 8, rank);
        }
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            const int row = first_row + 8 * n;
            const unsigned b0 = pair_at(p.x_low, row, pixels, k, rank);
            const unsigned b1 = both ? pair_at(p.x_low, row, pixels, k + 8, rank) : 0;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) MMA(y[m][n], a[m], b0, b1);
        }
    }
}

// The same without tensor cores: for float32, for bfloat16 on Turing, for ranks that are no multiple of 8. Summed apart
// and added once, like the reference's: a sum that starts with y would round every product to the last place of y.
__device__ __forceinline__ void add_low_rank_plain(Tile& y, const Params& p, int feature, int pixel,
                                                   const Warp& warp) {
    const int pixels = p.B * p.OH * p.OW;
    Tile sum = {};
#pragma unroll 1
    for (int k = 0; k < p.rank; ++k) {
        const int rank = opaque(p.rank), first_row = opaque(pixel + 2 * warp.t);
        float up[2 * M_TILES];
#pragma unroll
        for (int i = 0; i < 2 * M_TILES; ++i) {
            const long long row = min(feature + 8 * i + warp.g, p.N - 1);
            up[i] = load_float(p.up, p.low_dtype, row * rank + k);
        }
#pragma unroll
        for (int j = 0; j < 2 * N_TILES; ++j) {
            const long long row = min(first_row + j / 2 * 8 + j % 2, pixels - 1);
            const float low = load_float(p.x_low, p.low_dtype, row * rank + k);
#pragma unroll
            for (int i = 0; i < 2 * M_TILES; ++i) sum[i / 2][j / 2][i % 2 * 2 + j % 2] += up[i] * low;
        }
    }
#pragma unroll
    for (int i = 0; i < 4 * M_TILES * N_TILES; ++i) {
        const int m = i / (4 * N_TILES), n = i / 4 % N_TILES;
        y[m][n][i % 4] = __fadd_rn(y[m][n][i % 4], sum[m][n][i % 4]);
    }
}

// Eight features of a pixel: the terms that have the output's layout, the cast, the store.
__device__ __forceinline__ void finish_row(const Params& p, const float* from, int pixel, int feature) {
    const int count = min(8, p.N - feature);
    const long long index = static_cast<long long>(pixel) * p.N + feature;
    float value[8], term[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = from[i];
    if (p.shift != nullptr && p.out_dtype != DTYPE_I32) {
        const long long image = pixel / (p.OH * p.OW);
        load_floats(term, p.shift, p.shift_dtype, image * p.N + feature, count);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = __fadd_rn(value[i], term[i]);
    }
    if (p.residual != nullptr && p.out_dtype != DTYPE_I32) {
        load_floats(term, p.residual, p.out_dtype, index, count);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = __fadd_rn(value[i], term[i]);
    }
    store_floats(value, p.out, p.out_dtype, index, count);
}

// Write the tile, turned through shared memory a strip of every warp's tokens at a time.
__device__ __forceinline__ void store_tile(const Tile& y, const Params& p, float* turned, int first_feature,
                                           int first_pixel, const Warp& warp) {
    constexpr int STRIP_TILES = N_TILES < 2 ? 1 : 2;
    constexpr int STRIP = 8 * STRIP_TILES;  // tokens of a warp
    constexpr int PITCH = FEATURES + 4;     // of a token: puts the 32 values that a warp writes at once in 32 banks
    constexpr int EIGHTS = FEATURES / 8;
    constexpr int ITEMS = TOKENS / WARP_TOKENS * STRIP * EIGHTS;
#pragma unroll 1
    for (int strip = 0; strip < N_TILES / STRIP_TILES; ++strip) {
        __syncthreads();
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            if (n / STRIP_TILES != strip) continue;
#pragma unroll
            for (int i = 0; i < 4 * M_TILES; ++i) {
                const int token = warp.token / WARP_TOKENS * STRIP + n % STRIP_TILES * 8 + 2 * warp.t + i % 2;
                turned[token * PITCH + warp.feature + i / 2 * 8 + warp.g] = y[i / 4][n][i % 4];
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
            const int token = item / EIGHTS, feature = item % EIGHTS * 8;
            const int pixel = first_pixel + token / STRIP * WARP_TOKENS + strip * STRIP + token % STRIP;
            if (pixel >= p.B * p.OH * p.OW || first_feature + feature >= p.N) continue;
            finish_row(p, turned + token * PITCH + feature, pixel, first_feature + feature);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) gemm_mma(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    DYNAMIC_SHARED(shared);
    // Blocks that run at the same time form a rectangle of RASTER pixel tiles by some feature tiles: both operands are
    // then found in the L2 cache by most of them.
    const int feature_tiles = (p.N + FEATURES - 1) / FEATURES;
    const int pixel_tiles = (p.B * p.OH * p.OW + TOKENS - 1) / TOKENS;
    const int band = blockIdx.x / (RASTER * feature_tiles) * RASTER;
    const int band_height = min(RASTER, pixel_tiles - band);
    const int inside = blockIdx.x % (RASTER * feature_tiles);
    const int first_pixel = (band + inside % band_height) * TOKENS;
    const int first_feature = inside / band_height * FEATURES;

    const Warp warp;
    Tables tables;
    if constexpr (WEIGHT == 5) {
#pragma unroll
        for (int i = 0; i < 8 * M_TILES; ++i) {
            const int feature = min(first_feature + warp.feature + i / 4 * 8 + warp.g, p.N - 1);
            const unsigned* entries = reinterpret_cast<const unsigned*>(p.codebook + 16ll * feature);
            tables[i / 8][i / 4 % 2][i % 4] = __ldg(entries + i % 4);
        }
    }

    int* scale_row = reinterpret_cast<int*>(shared);  // read after the barriers of the main loop
    if (threadIdx.x < TOKENS) {
        const int pixel = first_pixel + static_cast<int>(threadIdx.x);
        scale_row[threadIdx.x] = min(pixel, p.B * p.OH * p.OW - 1) / p.x_scale_pixels;
    }

    int steps = 0;
    for (int s = 0; s < p.segments; ++s) steps += steps_of_segment(p, s);
    Walk ahead(p);  // the next step to load
    Loader loader(p, first_feature, first_pixel);
    auto stage = [&](int slot) { return shared + SCALE_ROW_BYTES + slot * STAGE_BYTES; };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) {
            loader.start(p, ahead, stage(s));
            loader.finish(stage(s));
            ahead.advance(p);
        }
        cp_async_commit();
    }

    Tile y;
    int acc[M_TILES][N_TILES][4] = {};
    int slot = 0, segment = 0, segment_end = steps - steps_of_segment(p, 0);
#pragma unroll 1
    for (int left = steps; left > 0;) {
        cp_async_wait<STAGES - 2>();
        // Also: every warp is done with the step before, whose stage is loaded next.
        __syncthreads();
        unsigned char* refilled = stage(slot > 0 ? slot - 1 : STAGES - 1);
        const bool more = left > STAGES - 1;
        if (more) loader.start(p, ahead, refilled);
        cp_async_commit();
        multiply(acc, stage(slot), tables, warp);
        if (more) {
            loader.finish(refilled);
            ahead.advance(p);
        }
        slot = slot + 1 < STAGES ? slot + 1 : 0;
        --left;
        if (SEGMENTED && left == segment_end && p.out_dtype != DTYPE_I32) {
            scale_segment(y, acc, p, segment, scale_row, warp);
            if (++segment < p.segments) segment_end -= steps_of_segment(p, segment);
        }
    }

    if (p.out_dtype == DTYPE_I32) {
#pragma unroll
        for (int i = 0; i < 4 * M_TILES * N_TILES; ++i) {
            const int m = i / (4 * N_TILES), n = i / 4 % N_TILES;
            y[m][n][i % 4] = __int_as_float(acc[m][n][i % 4]);
        }
    } else {
        if (!SEGMENTED) scale_segment(y, acc, p, 0, scale_row, warp);
        const int feature = first_feature + warp.feature, pixel = first_pixel + warp.token;
        scale_and_bias(y, p, feature, warp);
        // Fragments are read two values at a time, and in steps of 8.
        const unsigned long long address =
            reinterpret_cast<unsigned long long>(p.x_low) | reinterpret_cast<unsigned long long>(p.up);
        const bool paired = p.rank % 8 == 0 && address % 4 == 0;
        if (p.x_low != nullptr && paired && p.low_dtype == DTYPE_F16) {
            add_low_rank<mma_f16>(y, p, feature, pixel, warp);
#ifdef HAS_MMA_BF16
        } else if (p.x_low != nullptr && paired && p.low_dtype == DTYPE_BF16) {
            add_low_rank<mma_bf16>(y, p, feature, pixel, warp);
#endif
        } else if (p.x_low != nullptr) {
            add_low_rank_plain(y, p, feature, pixel, warp);
        }
    }
    store_tile(y, p, reinterpret_cast<float*>(shared), first_feature, first_pixel, warp);
}
