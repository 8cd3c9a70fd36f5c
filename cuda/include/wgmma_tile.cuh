// gemm_wgmma.cu's tile: what follows from its macros, the kernel's parameters, and the way along the K axis, from tile to tile
// and around the pipeline.
#pragma once
#include "sm90.cuh"

constexpr int kFeatures = 64 * WARPGROUPS;  // of a tile
constexpr int kConsumers = 128 * WARPGROUPS;  // threads
// A thread's, in eights: what all begin with, of 65,536; the producers'; and the rest for the consumers.
constexpr int kRegisters = 65536 / (kConsumers + 128) / 8 * 8;
constexpr int kProducerRegisters = SPLIT > 1 ? 56 : 40;
constexpr int kConsumerRegisters = (kRegisters * (WARPGROUPS + 1) - kProducerRegisters) / WARPGROUPS / 8 * 8;
// Tokens of a step of the epilogue.
constexpr int kChunk = TOKENS < 32 || EXTRAS || SPLIT > 1 ? 16 : 32;
// Where a block does several segments, the sums of those that are complete are in registers, as many as there are beside the
// accumulators, and in shared memory.
constexpr int kAccumulators = TOKENS / 2;
constexpr bool kSums = SEGMENTED && SPLIT == 1;
constexpr int kBoth = WARPGROUPS > 2 ? kAccumulators + 8 : WEIGHT == 5 || (EXTRAS && TOKENS == 160) ? 112 : 128;
constexpr int kRegisterSums = !kSums ? 4 : kBoth < 2 * kAccumulators ? kBoth - kAccumulators : kAccumulators;
constexpr int kSumBytes = kSums ? (kAccumulators - kRegisterSums) * 4 * kConsumers : 0;
static_assert(!kSums || TOKENS <= (WARPGROUPS > 2 ? 128 : 192), "no room for sums");
constexpr int kStored = SPLIT > 1 ? kChunk : TOKENS > (kSums ? 160 : 192) ? 64 : TOKENS;  // tokens, by the copy engine at once
constexpr int kStores = kStored < TOKENS && SPLIT == 1 ? 2 : 1;  // buffers for them
constexpr int kStoreBytes = ELEMENTS ? 0 : kStores * kStored * 128;  // of a warpgroup's
constexpr int kWeightRow = WEIGHT == 8 ? 128 : 64;  // bytes of a weight row in a stage of 128
constexpr int kWeightBytes = kFeatures * kWeightRow;
constexpr int kInputBytes = TOKENS * 128;
constexpr int kPieceBytes = TOKENS * PIECE;
constexpr int kStageBytes = kWeightBytes + kInputBytes;
constexpr int kMultiplierBytes = WEIGHT == 4 ? 4 * kFeatures : 0;  // of a stage: one for each row and block of 32
constexpr int kMaxSegments = 4;
constexpr bool kAhead = !kSums && SPLIT == 1;  // registers are there to look up what the next tile needs
constexpr int kGroup = 2;  // products that a warpgroup asks for together
constexpr int kLowRow = 64;  // bytes of a row of the low-rank branch in a stage, 32 of its rank
constexpr int kScaled = SEGMENTED || SPLIT > 1 ? kMaxSegments : 1;  // segments whose scales are looked at
constexpr int kTable = (kScaled + EXTRAS) * TOKENS;  // words of a warpgroup's tables
constexpr int kScales = (TOKENS + 127) / 128;
// With SPLIT, what the blocks exchange is where the stages were, and the low-rank branch comes after it.
constexpr int kExchanged = TOKENS * kFeatures * 4;
constexpr int kLowBytes = (kFeatures + TOKENS) * kLowRow;  // of 32 of the rank
static_assert(SPLIT == 1 || kExchanged + RANK * kLowBytes <= STAGES * kStageBytes, "no room to exchange");
// In shared memory, after the stages and what is stored: sums, the tables, the barriers (of each stage two, and with SPLIT
// one of the low-rank branch), the multipliers.
constexpr int kSumsAt = STAGES * kStageBytes + WARPGROUPS * kStoreBytes;
constexpr int kTables = kSumsAt + kSumBytes;
constexpr int kBarriers = kTables + WARPGROUPS * kTable * 4;
constexpr int kLowBarrier = kBarriers + 16 * STAGES;
constexpr int kMultipliers = kLowBarrier + (SPLIT > 1 ? 8 : 0);

constexpr bool kSeveral = IMAGE || SEGMENTED;  // there may be more than one segment

struct Params {
    TensorMap weight, input, up, low, out;
    const unsigned char* multipliers;
    const signed char* codebook;
    const float* scale;
    const float* input_scale;
    const void* bias;
    const void* shift;
    const void* residual;
    void* elements;  // the output, where it is stored one by one
    unsigned long long early;  // whether weights may be read while the kernel before still runs
    int features, pixels;  // of the output
    int plane, width;      // pixels of an image, and of a line
    int kernel_w, taps, stride_h, stride_w, padding_h, padding_w;
    int segments, channels[kMaxSegments];
    int parts[kMaxSegments];  // with SPLIT: blocks of each segment, SPLIT in all
    int feature_tiles, tiles;  // of a run of pixels, and in all
    int pixels_per_scale;
    int multiplier_stride;
    int is_integer, bias_dtype, shift_dtype;
};

// How many stages of 128 a segment has: of all taps together, or of each of them.
__device__ __forceinline__ int stages_of(const Params& p, int segment) {
    const int blocks = p.channels[segment] / 32, taps = IMAGE ? p.taps : 1;
    return PIECE < 128 ? (taps * blocks + 3) / 4 : taps * ((blocks + 3) / 4);
}

// The blocks of 32, of weights, along the K axis: stages of four, the last of a tap with what is left of the segment's; or the
// last of the segment, where stages do not end with a tap.
struct Walk {
    int chunk, chunks, blocks, block;

    __device__ Walk(const Params& p, int segment, int stage) {
        const int taps = IMAGE ? p.taps : 1;
        blocks = p.channels[segment] / 32 * (PIECE < 128 ? taps : 1);
        chunks = (blocks + 3) / 4;
        const int tap = PIECE == 128 && IMAGE && SPLIT > 1 ? stage / chunks : 0;  // a block that is alone begins with the first
        chunk = stage - tap * chunks;
        block = tap * blocks + 4 * chunk;
        for (int s = 0; kSeveral && s < segment; ++s) block += p.channels[s] / 32 * taps;
    }
    // The blocks of 32 in this stage.
    __device__ int here() const { return min(4, blocks - 4 * chunk); }
    __device__ void next() {
        block += here();
        if (++chunk == chunks && IMAGE && PIECE == 128) chunk = 0;
    }
};

// The pieces, of pixels, along the K axis.
struct Pieces {
    int channel, first, left, pieces, tap_h, tap_w;  // left: of this tap

    __device__ Pieces(const Params& p, int segment, int stage) {
        first = tap_h = tap_w = 0;
        for (int s = 0; kSeveral && s < segment; ++s) first += p.channels[s];
        pieces = (p.channels[segment] + PIECE - 1) / PIECE;
        const int piece = stage * (128 / PIECE), tap = IMAGE && SPLIT > 1 ? piece / pieces : 0, part = piece - tap * pieces;
        left = pieces - part, channel = first + PIECE * part;
        if (IMAGE && SPLIT > 1) tap_h = tap / p.kernel_w, tap_w = tap % p.kernel_w;
    }
    __device__ void next(const Params& p) {
        channel += PIECE;
        if (--left > 0 || !IMAGE) return;
        left = pieces, channel = first;
        if (++tap_w == p.kernel_w) tap_w = 0, ++tap_h;
    }
};

// What part of the K axis this block works on: whole segments, or with SPLIT a share of the stages of one.
struct Share {
    int first_segment, end_segment, part, parts;

    __device__ explicit Share(const Params& p) {
        first_segment = 0, end_segment = kSeveral ? p.segments : 1, part = 0, parts = SPLIT;
        if (SPLIT > 1) part = cluster_rank();
        if (SPLIT > 1 && kSeveral) {
            while (part >= p.parts[first_segment]) part -= p.parts[first_segment++];
            parts = p.parts[first_segment];
            end_segment = first_segment + 1;
        }
    }
    __device__ void stages(const Params& p, int segment, int& first, int& end) const {
        const int total = stages_of(p, segment);
        first = part * total / parts;
        end = (part + 1) * total / parts;
    }
};

// This block's tiles, one after the other: runs of pixels, and the features of each. One division, and no more of them.
struct Position {
    int index, run, features;  // of features: tiles of them
    int runs, more_features;   // from one tile to the next

    __device__ explicit Position(const Params& p) {
        index = blockIdx.x / SPLIT;
        run = index / p.feature_tiles, features = index % p.feature_tiles;
        runs = gridDim.x / p.feature_tiles, more_features = gridDim.x % p.feature_tiles;
    }
    __device__ bool inside(const Params& p) const { return index < p.tiles; }
    __device__ int token() const { return run * TOKENS; }
    __device__ int feature() const { return features * kFeatures; }
    __device__ void next(const Params& p) {
        if (SPLIT > 1) {  // a cluster has one
            index = p.tiles;
            return;
        }
        index += gridDim.x;
        run += runs, features += more_features;
        if (more_features == 0)  // or the same blocks would have all the tiles of last features, which are less work
            features = features + 1 == p.feature_tiles ? 0 : features + 1;
        else if (features >= p.feature_tiles)
            features -= p.feature_tiles, ++run;
    }
};

// A position in the ring of stages.
struct Ring {
    int stage;
    unsigned phase;

    __device__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};
