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
//   STAGES     steps of 64 in k under way, from 2 on    SEGMENTED  1: several segments, each with its scale
//
//                    TOKENS              A block is 4 warps, or 8 for large tiles with segments. The weights are
//              +-------------------+     operand A of the mma, so that they go from packed words to fragments within a
//     FEATURES |       warp 0      |     thread's registers; the activations are operand B. A warp's tile is
//              +-------------------+     WARP_FEATURES x WARP_TOKENS; lane 4 g + t holds features g, g + 8 and tokens
//              |       warp 1      |     2 t, 2 t + 1 of every 16 x 8 product in it. The picture is of 128 x 128, with
//              +-------------------+     tiles of 32 x 128: the fewer warps share features, the fewer unpack the same
//                       ...              weights.
//
// Shared memory, a stage: TOKENS rows of 64 bytes of x, FEATURES rows of 32 (64 for int8) bytes of weights, FEATURES
// pairs of multipliers. Pieces of 16 bytes are permuted within a row (see `piece_offset`), which makes the copies
// and every ldmatrix free of bank conflicts. The epilogue reuses it to turn the tile, so that all that has the output's
// layout (shift, residual, output) is read and written along the features.
//
// A step begins with what its first products need in registers: its weights were unpacked, and its first activations
// read, during the products of the step before. So a step's copies must have arrived when the one before begins.
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

constexpr int STEP = 64;
constexpr int PIECE = 16;  // bytes of one asynchronous copy
// Two blocks of four warps on a multiprocessor hide each other's barriers. Sums of segments take as many registers as
// those of products, so large tiles with both have more threads.
constexpr int SUMS = FEATURES * TOKENS * (SEGMENTED ? 2 : 1);
constexpr int WARPS = SEGMENTED && FEATURES * TOKENS > 4096 ? 8 : 4;
constexpr int THREADS = 32 * WARPS;
constexpr int WARP_FEATURES = FEATURES * TOKENS / WARPS >= 1024 ? 32 : FEATURES / 4;
constexpr int WARP_ROWS = FEATURES / WARP_FEATURES;
constexpr int WARP_TOKENS = TOKENS * WARP_ROWS / WARPS;
constexpr int M_TILES = WARP_FEATURES / 16;
constexpr int N_TILES = WARP_TOKENS / 8;
// Pixel tiles of the rectangle of blocks that run at the same time.
constexpr int RASTER = 8;
constexpr int MIN_BLOCKS = WARPS == 8 ? 1 : SUMS > 8192 ? 2 : SUMS > 4096 ? 3 : 4;
static_assert(WARP_ROWS <= WARPS && N_TILES * 8 * WARPS == TOKENS * WARP_ROWS, "the warps must tile FEATURES x TOKENS");

constexpr int X_ROW = STEP;
constexpr int WEIGHT_ROW = WEIGHT == 8 ? STEP : STEP / 2;
constexpr int BLOCK_BYTES = WEIGHT_ROW / 2;  // of 32 weights
constexpr int X_BYTES = TOKENS * X_ROW;
constexpr int WEIGHT_BYTES = FEATURES * WEIGHT_ROW;
constexpr int SCALE_ROW_BYTES = 4 * TOKENS;  // before the stages: each token's row of x_scale
constexpr int STAGE_BYTES = X_BYTES + WEIGHT_BYTES + (WEIGHT == 4 ? 2 * FEATURES : 0);

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

    // Go on; returns whether the taps are others.
    __device__ __forceinline__ bool advance(const Params& p) {
        block += left() > 32 ? 2 : 1;
        channel += STEP;
        if (channel < width) return false;
        channel = 0;
        if (++tap_column < p.KW) return true;
        tap_column = 0;
        if (++tap_row < p.KH) return true;
        tap_row = 0;
        if (SEGMENTED && ++segment < p.segments) {
            first += width;
            width = p.segment_width[segment];
        }
        return true;
    }
};

__device__ __forceinline__ int steps_of_segment(const Params& p, int segment) {
    return p.KH * p.KW * ((p.segment_width[segment] + STEP - 1) / STEP);
}

// What one thread copies of every step: pieces of rows that are some rows apart. Pixels and features past the end take
// the last one's place: what becomes of them is not stored.
struct Loader {
    static constexpr int X_PIECES = (X_BYTES / PIECE + THREADS - 1) / THREADS;
    static constexpr int WEIGHT_PIECES = (WEIGHT_BYTES / PIECE + THREADS - 1) / THREADS;
    static constexpr int X_APART = THREADS / (X_ROW / PIECE), WEIGHTS_APART = THREADS / (WEIGHT_ROW / PIECE);
    static_assert(X_APART % 8 == 0 && WEIGHTS_APART % 8 == 0, "pieces of a thread must be permuted alike");

    unsigned x[X_PIECES];    // bytes from the first pixel to that of tap (0, 0), were it padded
    int corner[X_PIECES];    // of the image, in front of its padding: row and column of tap (0, 0), 16 bits each
    int inside[X_PIECES];    // bytes of the running tap: none where it is outside
    unsigned weights[WEIGHT_PIECES], multipliers;  // bytes from the first feature
    int x_to, weights_to;    // in a stage
    // What all threads have in common is added to the addresses alone: the first pixel's channels and the first
    // feature's codes of the running step.
    const signed char* channels;
    const unsigned char* codes;
    // Bytes of multipliers on their way to shared memory, of the steps that have begun to be loaded but for the first
    // of them: they come in registers, and nothing waits for them before. Where a step starts with an odd block, its
    // pair lies across two bytes.
    static constexpr int QUEUE = STAGES - 2;
    unsigned queue[QUEUE + 1] = {}, second[QUEUE + 1] = {};
    unsigned odd = 0;  // a bit for each in the queue, from its end

    __device__ __forceinline__ Loader(const Params& p, const Walk& at, int first_feature, int first_pixel) {
        const int thread = threadIdx.x, token = thread / (X_ROW / PIECE), piece = thread % (X_ROW / PIECE);
        x_to = piece_offset<X_ROW>(token, piece);
#pragma unroll
        for (int i = 0; i < X_PIECES; ++i) {
            const int pixel = min(first_pixel + token + i * X_APART, p.B * p.OH * p.OW - 1);
            const int image = pixel / (p.OH * p.OW), within = pixel - image * (p.OH * p.OW);
            const int row = within / p.OW * p.stride_h, column = within % p.OW * p.stride_w;
            const unsigned first = (image * p.H + row) * p.W + column;
            x[i] = first * static_cast<unsigned>(p.C) + piece * PIECE;
            corner[i] = (row - p.pad_h) * 65536 + ((column - p.pad_w) & 65535);
        }
        const int feature = thread / (WEIGHT_ROW / PIECE), of_row = thread % (WEIGHT_ROW / PIECE);
        const unsigned blocks = p.KH * p.KW * (p.C / 32);
        weights_to = X_BYTES + piece_offset<WEIGHT_ROW>(feature, of_row);
#pragma unroll
        for (int i = 0; i < WEIGHT_PIECES; ++i) {
            const unsigned n = min(first_feature + feature + i * WEIGHTS_APART, p.N - 1);
            weights[i] = n * (blocks * BLOCK_BYTES) + of_row * PIECE;
        }
        multipliers = min(first_feature + thread, p.N - 1) * ((blocks + 1) / 2);
        codes = p.codes;
        tap(p, at);
    }

    // To the tap of this step.
    __device__ __forceinline__ void tap(const Params& p, const Walk& at) {
        const bool pads = p.KH * p.KW > 1 || p.pad_h > 0 || p.pad_w > 0;  // a row of pixels may be a long one
#pragma unroll
        for (int i = 0; i < X_PIECES; ++i) {
            const int row = (corner[i] >> 16) + at.tap_row, column = static_cast<short>(corner[i]) + at.tap_column;
            const bool there = (static_cast<unsigned>(row) < static_cast<unsigned>(p.H)) &
                               (static_cast<unsigned>(column) < static_cast<unsigned>(p.W));
            inside[i] = there | !pads ? PIECE : 0;
        }
        const int pixel = (at.tap_row - p.pad_h) * p.W + at.tap_column - p.pad_w;
        channels = p.x + static_cast<long long>(pixel) * p.C + at.first;
    }

    // Begin to load a step.
    __device__ __forceinline__ void start(const Params& p, const Walk& at, unsigned char* stage) {
        const int thread = threadIdx.x;
        const int of_x = thread % (X_ROW / PIECE) * PIECE < at.left() ? PIECE : 0;
#pragma unroll
        for (int i = 0; i < X_PIECES; ++i) {
            if (X_BYTES / PIECE % THREADS != 0 && thread >= X_BYTES / PIECE) continue;
            cp_async_16_or_0(stage + x_to + i * X_APART * X_ROW, channels + x[i], inside[i] & of_x);
        }
        const int of_weights = thread % (WEIGHT_ROW / PIECE) * (STEP * PIECE / WEIGHT_ROW) < at.left() ? PIECE : 0;
#pragma unroll
        for (int i = 0; i < WEIGHT_PIECES; ++i) {
            if (WEIGHT_BYTES / PIECE % THREADS != 0 && thread >= WEIGHT_BYTES / PIECE) continue;
            cp_async_16_or_0(stage + weights_to + i * WEIGHTS_APART * WEIGHT_ROW, codes + weights[i], of_weights);
        }
        if (WEIGHT == 4 && (THREADS == FEATURES || thread < FEATURES)) {
            const unsigned char* from = p.multipliers + at.block / 2 + multipliers;
            queue[QUEUE] = __ldg(from);
            odd = (odd & ~1u) | (at.block & 1);
            if (odd & 1 && at.left() > 32) second[QUEUE] = __ldg(from + 1);
        }
        channels += STEP;
        codes += at.left() > 32 ? 2 * BLOCK_BYTES : BLOCK_BYTES;
    }

    // Write a pair to its step's stage: the oldest, unless told otherwise.
    __device__ __forceinline__ void finish(unsigned char* stage, int place_in_queue = 0) const {
        const int feature = threadIdx.x;
        if (WEIGHT == 4 && (THREADS == FEATURES || feature < FEATURES)) {
            // A byte each. The pairs of a lane's features, 8 apart, lie side by side.
            const int place = feature % 8 * (2 * M_TILES) + feature % WARP_FEATURES / 8;
            const int turn = odd >> (QUEUE - place_in_queue) & 1 ? 4 : 0;
            const unsigned pair = queue[place_in_queue] >> turn | second[place_in_queue] << (8 - turn);
            unsigned char* pairs = stage + X_BYTES + WEIGHT_BYTES + feature / WARP_FEATURES * WARP_FEATURES * 2;
            *reinterpret_cast<unsigned short*>(pairs + 2 * place) =
                static_cast<unsigned short>((pair & 15) | (pair >> 4 & 15) << 8);
        }
    }

    // Move the queue on.
    __device__ __forceinline__ void next() {
#pragma unroll
        for (int i = 0; i < QUEUE; ++i) {
            queue[i] = queue[i + 1];
            second[i] = second[i + 1];
        }
        if (QUEUE > 0) odd <<= 1;
    }
};

struct Warp {
    int lane, g, t;
    int feature, token;  // of the warp's tile in the block's
    // Of its first fragments in a stage. The next ones are 16 features, or 8 tokens, further: permuted alike.
    int weights, x, pairs;

    __device__ __forceinline__ Warp() {
        const int warp = threadIdx.x / 32;
        lane = threadIdx.x % 32;
        g = lane / 4;
        t = lane % 4;
        feature = warp % WARP_ROWS * WARP_FEATURES;
        token = warp / WARP_ROWS * WARP_TOKENS;
        x = piece_offset<X_ROW>(token + lane % 8, lane / 8);
        weights = X_BYTES + piece_offset<WEIGHT_ROW>(feature + lane % 16, lane / 16);
        pairs = X_BYTES + WEIGHT_BYTES + 2 * (feature + g * (2 * M_TILES));
    }
};

using Tables = unsigned[M_TILES][2][4];  // the codebooks of features g, g + 8 of every tile

// Two 8-token tiles of a step's activations: 64 channels each.
constexpr int CHUNKS = N_TILES / 2;
using Chunk = unsigned[2][4];

// What the products of a step read first: its weights, fragments of both halves for every 16 features, and activations.
struct Fragments {
    unsigned a[M_TILES][2][4];
    Chunk b;
};

// Of 16 features: packed (g, g + 8 of the first block of 32, then of the second), or as they are.
struct Words {
    unsigned word[2][4];  // the second one of int8 alone
    unsigned multipliers;  // of g, then of g + 8: of the first block, of the second
};

__device__ __forceinline__ void read_words(Words& words, const unsigned char* stage, int tile, const Warp& warp) {
    ldmatrix_x4(words.word[0], stage + warp.weights + tile * 16 * WEIGHT_ROW);
    if constexpr (WEIGHT == 8) ldmatrix_x4(words.word[1], stage + (warp.weights ^ 2 * PIECE) + tile * 16 * WEIGHT_ROW);
    if constexpr (WEIGHT == 4) {
        words.multipliers = *reinterpret_cast<const unsigned*>(stage + warp.pairs + 4 * tile);
    }
}

__device__ __forceinline__ void read_activations(Chunk& b, const unsigned char* stage, int chunk, const Warp& warp) {
#pragma unroll
    for (int i = 0; i < 2; ++i) ldmatrix_x4(b[i], stage + warp.x + (2 * chunk + i) * 8 * X_ROW);
}

__device__ __forceinline__ void unpack(unsigned (&a)[2][4], const Words& words, const unsigned (&table)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (WEIGHT == 8) {
            a[0][i] = words.word[0][i];
            a[1][i] = words.word[1][i];
        } else if constexpr (WEIGHT == 5) {
            unpack_codebook(words.word[0][i], table[i % 2], a[i / 2][i % 2], a[i / 2][i % 2 + 2]);
        } else {
            const unsigned multiplier = __byte_perm(words.multipliers, 0, 0x4440 | (i % 2 * 2 + i / 2));
            unpack_s4(words.word[0][i], multiplier, a[i / 2][i % 2], a[i / 2][i % 2 + 2]);
        }
    }
}

// Begin with the step of this stage.
__device__ __forceinline__ void read_first(Fragments& first, const unsigned char* stage, const Tables& tables,
                                           const Warp& warp) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
        Words words;
        read_words(words, stage, m, warp);
        unpack(first.a[m], words, tables[m]);
    }
    read_activations(first.b, stage, 0, warp);
}

// acc += weights * x over one stage; `next` goes from its fragments to those of the following one.
__device__ __forceinline__ void multiply(int (&acc)[M_TILES][N_TILES][4], Fragments& next, const unsigned char* stage,
                                         const unsigned char* following, const Tables& tables, const Warp& warp) {
    const Fragments first = next;
    Chunk b[2];
#pragma unroll
    for (int i = 0; i < 8; ++i) b[0][i / 4][i % 4] = first.b[i / 4][i % 4];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        Chunk& ahead = c + 1 < CHUNKS ? b[(c + 1) % 2] : next.b;
        read_activations(ahead, c + 1 < CHUNKS ? stage : following, (c + 1) % CHUNKS, warp);
        Words words[M_TILES];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            if (m * CHUNKS / M_TILES == c) read_words(words[m], following, m, warp);
        }
        // One half after the other: a product does not wait for the one before it in the same sum.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2 * M_TILES; ++i) {
                const unsigned(&x)[4] = b[c % 2][i % 2];
                mma_s8(acc[i / 2][2 * c + i % 2], first.a[i / 2][half], x[2 * half], x[2 * half + 1]);
            }
        }
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            if (m * CHUNKS / M_TILES == c) unpack(next.a[m], words[m], tables[m]);
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
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {  // more sums at a time would spill
        float sum[N_TILES][4] = {};
#pragma unroll 1
        for (int k = 0; k < p.rank; ++k) {
            const int rank = opaque(p.rank), first_row = opaque(pixel + 2 * warp.t);
            float up[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const long long row = min(feature + 16 * m + 8 * i + warp.g, p.N - 1);
                up[i] = load_float(p.up, p.low_dtype, row * rank + k);
            }
#pragma unroll
            for (int j = 0; j < 2 * N_TILES; ++j) {
                const long long row = min(first_row + j / 2 * 8 + j % 2, pixels - 1);
                const float low = load_float(p.x_low, p.low_dtype, row * rank + k);
#pragma unroll
                for (int i = 0; i < 2; ++i) sum[j / 2][i * 2 + j % 2] += up[i] * low;
            }
        }
#pragma unroll
        for (int i = 0; i < 4 * N_TILES; ++i) y[m][i / 4][i % 4] = __fadd_rn(y[m][i / 4][i % 4], sum[i / 4][i % 4]);
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
    Loader loader(p, ahead, first_feature, first_pixel);
    auto load = [&](unsigned char* stage) {
        loader.start(p, ahead, stage);
        if (ahead.advance(p)) loader.tap(p, ahead);
    };
    auto stage = [&](int slot) { return shared + SCALE_ROW_BYTES + slot * STAGE_BYTES; };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) load(stage(s));
        cp_async_commit();
        if (s == 0) {
            loader.finish(stage(s), Loader::QUEUE);
        } else {
            loader.next();
        }
    }

    Tile y;
    int acc[M_TILES][N_TILES][4] = {};
    int slot = 0, segment = 0, segment_end = steps - steps_of_segment(p, 0);
    Fragments next;
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    read_first(next, stage(0), tables, warp);
#pragma unroll 1
    for (int left = steps; left > 0;) {
        unsigned char* following = stage(slot + 1 < STAGES ? slot + 1 : 0);
        unsigned char* refilled = stage(slot > 0 ? slot - 1 : STAGES - 1);
        if (STAGES > 2) {
            loader.finish(following);
            cp_async_wait<STAGES - 3>();
        }
        // Also: every warp has read the step before, whose stage is loaded next.
        __syncthreads();
        if (left > STAGES - 1) load(refilled);
        cp_async_commit();
        loader.next();
        if (STAGES == 2) {
            loader.finish(following);
            cp_async_wait<0>();
            __syncthreads();
        }
        multiply(acc, next, stage(slot), following, tables, warp);
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
