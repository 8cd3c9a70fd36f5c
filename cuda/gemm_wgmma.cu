// Integer tiles on Hopper: a linear layer or a convolution of int8 activations with 4- or 8-bit weights.
//
// out[p, n] over output pixels p = (b, h, w) and features n, as an implicit product over (segment, tap, channel); a linear
// layer is the 1x1 convolution of one image, one pixel high and M wide. Weights are the A operand: packed words come to
// shared memory, are unpacked to int8 in registers, and never travel again. Activations are the B operand, in shared
// memory as the copy engine leaves them: channels of output pixels one after the other, across the ends of lines and images,
// at the tap's offset, zeros outside the image.
//
// A producer warpgroup (a thread drives the copy engine, the other warps lay out the multipliers) gives its registers to the
// consumer warpgroups, of 64 features each. Compiled for one tile:
//   WEIGHT     4: int4 with a multiplier a block of 32, 5: int4 with a codebook a row, 8: int8
//   WARPGROUPS consumer warpgroups: 2 or 3
//   TOKENS     output pixels a tile: 16 or a multiple of 32, to 256
//   RANK       of the low-rank branch in units of 32, rounded up; 0: there is none. LOW: its type, 1 half, 2 bfloat16
//   IMAGE      1: pixels of images, any kernel; 0: one row of them, 1x1
//   PIECE      channels that the copy engine brings at a time: 128, one piece a stage, the last of a tap with what is left of the
//              channels; or 64, two pieces a stage, of one tap or two, where that leaves no piece half empty
//   SEGMENTED  1: channel segments with scales of their own, summed in float32
//   OUT        results: 0 float32, or the integers themselves, 1 half, 2 bfloat16
//   ELEMENTS   1: results are stored one by one (always with OUT 0); 0: by the copy engine, from shared memory
//   EXTRAS     1: with a shift or a residual
//   SPLIT      blocks (a cluster) that share the K axis of one tile; each then adds up the integers of some of its tokens
//   STAGES     depth of the pipeline, 128 of K each
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dependent.cuh"
#include "dtype.cuh"
#include "ptx.cuh"
#include "sm90.cuh"
#include "unpack.cuh"
#include "wgmma.cuh"
#include "wgmma_producers.cuh"
#include "wgmma_tile.cuh"

// The scale of the token i % TOKENS of a tile, in the segment i / TOKENS.
__device__ __forceinline__ float input_scale(const Params& p, int first_token, int i) {
    int item = min(first_token + i % TOKENS, p.pixels - 1);
    if (p.pixels_per_scale > 1) item /= p.pixels_per_scale;
    return __ldg(p.input_scale + item * (kSeveral ? p.segments : 1) + i / TOKENS);
}

__device__ __forceinline__ float to_float(unsigned accumulator) { return static_cast<float>(static_cast<int>(accumulator)); }

__device__ __forceinline__ float4 add4(const float4& a, const float4& b) {
    return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w));
}

// Two results in 16 bits each, the first in the low ones.
__device__ __forceinline__ unsigned pack2(float low, float high) {
    return OUT == 1 ? pack_f16x2(low, high) : pack_bf16x2(low, high);
}

__device__ __forceinline__ void consume(const Params& p, unsigned char* shared, unsigned full, unsigned empty) {
    const unsigned stages = shared_address(shared);
    // The same in all lanes, which the compiler sees this way.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int group = warp / 4, row = 16 * (warp % 4) + lane / 4, pair = 2 * (lane % 4);
    const Share share(p);
    // Of a tile's tokens: the input's scales, one for each segment; and which image each is of.
    float* const scales = reinterpret_cast<float*>(shared + kTables) + group * kTable;
    int* const images = reinterpret_cast<int*>(scales + kScaled * TOKENS);
    // Where the piece of 16 bytes is that this lane names to ldmatrix. Its four matrices are the pieces of eight rows of 64
    // bytes, or two pieces of 16 rows of 128 bytes; the copy engine has swapped the pieces of a row.
    const int eight = group * 64 + 16 * (warp % 4) + lane % 8;
    const int my_weights = WEIGHT == 8 ? (eight + lane / 8 % 2 * 8) * 128 + (lane / 16 ^ lane % 8) * 16
                                       : eight * 64 + (lane / 8 ^ lane / 2 % 4) * 16;
    const int my_multipliers = kMultipliers + 4 * (group * 64 + row);
    // The descriptor of the first stage's inputs. Those of the others differ in its low word, which has the address.
    const unsigned long long inputs =
        PIECE == 128 ? tile_descriptor(stages + kWeightBytes) : narrow_tile_descriptor(stages + kWeightBytes);
    const unsigned first_inputs = opaque(static_cast<int>(inputs));  // or it is made anew in each stage
    // Results on their way to the copy engine: rows of 64 features, whose pieces of 16 bytes are swapped.
    const unsigned store = stages + STAGES * kStageBytes + group * kStoreBytes;
    const unsigned my_store = (lane / 16 * 8 + lane % 8) * 128 + ((2 * (warp % 4) + lane / 8 % 2) ^ lane % 8) * 16;
    float4* const shared_sums = reinterpret_cast<float4*>(shared + kSumsAt) + threadIdx.x;
    // Integers on their way to the cluster's other blocks: of four accumulators after the other, 16 bytes a thread.
    const unsigned exchanged = threadIdx.x * 16;
    constexpr unsigned kStep = kConsumers * 16;
    Ring ring{0, 0};
    auto release = [&](unsigned barrier) {
        __syncwarp();  // the arrival is of the other lanes' reads as well
        if (lane == 0) barrier_arrive(barrier);
    };
    // What the epilogue of a tile needs: the scales of its tokens and of this thread's features. With kAhead, the next tile's
    // are asked for at the beginning of an epilogue, and are there when it ends.
    int first_token = 0;
    float weight_scale[2], token_scale[kScales];
    unsigned bias_bits[2];
    auto look_up = [&](const Position& position) {
        if (!position.inside(p)) return;
        first_token = position.token();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int feature = min(position.feature() + group * 64 + row + 8 * i, p.features - 1);
            weight_scale[i] = __ldg(p.scale + feature);
            bias_bits[i] = 0;
            if (p.bias)
                bias_bits[i] = p.bias_dtype == 0 ? __ldg(static_cast<const unsigned*>(p.bias) + feature)
                                                 : __ldg(static_cast<const unsigned short*>(p.bias) + feature);
        }
#pragma unroll
        for (int i = 0; i < kScales; ++i)
            token_scale[i] = input_scale(p, first_token, min(threadIdx.x % 128 + 128 * i, TOKENS - 1));
    };
    Position position(p), after = position;
    if (kAhead) look_up(position);
    for (; position.inside(p); position = after) {
        after.next(p);
        const int first_feature = position.feature() + group * 64;
        unsigned acc[kAccumulators];
        float sum[kRegisterSums];  // of the segments that are complete

        if (first_feature >= p.features) {  // nothing of this warpgroup's is in the output: keep the pipeline going
            for (int segment = share.first_segment; segment < share.end_segment; ++segment) {
                int first, end;
                share.stages(p, segment, first, end);
                for (int i = first; i < end; ++i) {
                    barrier_wait(full + 8 * ring.stage, ring.phase);
                    release(empty + 8 * ring.stage);
                    ring.next();
                }
            }
            if (RANK && SPLIT == 1)
                for (int r = 0; r < RANK; ++r) {
                    barrier_wait(full + 8 * ring.stage, ring.phase);
                    release(empty + 8 * ring.stage);
                    ring.next();
                }
            if (SPLIT > 1) {
                named_barrier(1 + WARPGROUPS, kConsumers);
                cluster_sync();
                cluster_sync();
            }
            if (kAhead) look_up(after);
            continue;
        }
        if (!kAhead) look_up(position);

        unsigned codebook[2][4];
#pragma unroll
        for (int i = 0; WEIGHT == 5 && i < 2; ++i) {
            const int feature = min(first_feature + row + 8 * i, p.features - 1);
            const uint4 entries = __ldg(reinterpret_cast<const uint4*>(p.codebook) + feature);
            codebook[i][0] = entries.x, codebook[i][1] = entries.y, codebook[i][2] = entries.z, codebook[i][3] = entries.w;
        }
        auto share_tables = [&] {  // with the whole warpgroup, once its threads have read the last tile's
            if (ELEMENTS) named_barrier(1 + group, 128);  // stores of boxes come after one
#pragma unroll
            for (int i = 0; i < kScales; ++i) {
                const int token = threadIdx.x % 128 + 128 * i;
                if (token >= TOKENS) continue;
                scales[token] = token_scale[i];
                if (EXTRAS) images[token] = min(first_token + token, p.pixels - 1) / p.plane;
            }
            // All go around as often, or the compiler would not know afterwards what is the same in all lanes.
            const int end = TOKENS * min(kScaled, p.segments);
            for (int first = TOKENS; first < end; first += 128) {
                const int i = first + threadIdx.x % 128;
                if (i < end) scales[i] = input_scale(p, first_token, i);
            }
            if (!ELEMENTS && threadIdx.x % 128 == 0) stores_wait_read();  // the last tile's are out of the way
            named_barrier(1 + group, 128);
        };

        if (SPLIT > 1) share_tables();  // a cluster has one tile

        // The packed words of a stage, as soon as it is there; and the A fragments of a block of 32, unpacked from them.
        unsigned words[2][4], multipliers[2];
        auto fetch = [&] {
            barrier_wait(full + 8 * ring.stage, ring.phase);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (WEIGHT == 4)
                    multipliers[i] =
                        *reinterpret_cast<const unsigned*>(shared + my_multipliers + ring.stage * kMultiplierBytes + 32 * i);
                if (WEIGHT != 8) ldmatrix_x4(words[i], shared + ring.stage * kStageBytes + my_weights + 8 * i * kWeightRow);
            }
        };
        unsigned fragments[2][kGroup][4];
        auto unpack = [&](unsigned (&fragment)[4], int block, int blocks, int stage) {
            const bool live = WEIGHT == 4 || !kSeveral || block < blocks;  // or its activations are zeros
            if (WEIGHT == 8) ldmatrix_x4(fragment, shared + ((stage * kStageBytes + my_weights) ^ (32 * block)));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (WEIGHT == 4)
                    unpack_s4(words[i][block], __byte_perm(multipliers[i], 0, 0x4440 + block), fragment[i], fragment[2 + i]);
                if (WEIGHT == 5) unpack_codebook(words[i][block], codebook[i], fragment[i], fragment[2 + i]);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (!live) fragment[e] = 0;
                settled(fragment[e]);
            }
        };

        // Four integers, from the accumulator j on, times their tokens' scales.
        auto scaled = [&](const uint4& integers, int j, int segment) {
            const float* at = scales + segment * TOKENS + 8 * (j / 4) + pair;
            const float low = at[0], high = at[1];
            return make_float4(__fmul_rn(to_float(integers.x), low), __fmul_rn(to_float(integers.y), high),
                               __fmul_rn(to_float(integers.z), low), __fmul_rn(to_float(integers.w), high));
        };
        auto four = [&](int j) { return make_uint4(acc[j], acc[j + 1], acc[j + 2], acc[j + 3]); };
        auto sum_before = [&](int j) {
            if (j < kRegisterSums) return make_float4(sum[j], sum[j + 1], sum[j + 2], sum[j + 3]);
            return shared_sums[(j - kRegisterSums) / 4 * kConsumers];
        };

        bool add = false;
        for (int segment = share.first_segment; segment < share.end_segment; ++segment) {
            int first, end;
            share.stages(p, segment, first, end);
            if (kSums) add = false;  // the one before is in float32 by now
            Walk walk(p, segment, first);
            // Two groups of products are under way at a time: a group's fragments are unpacked while the one before is computed,
            // as soon as the one before that, which read the same registers, is done. Blocks past the end of a tap, or of the
            // segment, are zeros: a branch around them would make the compiler wait for every product.
            ring.stage = __shfl_sync(0xffffffffu, ring.stage, 0);  // the warp's, for the compiler: fewer instructions
            unsigned before = 0;
            for (int i = first; i < end; ++i) {
                fetch();
                const int blocks = walk.here();
                const unsigned long long desc = (inputs >> 32 << 32) | (first_inputs + ring.stage * (kStageBytes / 16));
#pragma unroll
                for (int block = 0; block < 4; block += kGroup) {
                    unsigned(&fragment)[kGroup][4] = fragments[block / kGroup % 2];
#pragma unroll
                    for (int b = 0; b < kGroup; ++b) unpack(fragment[b], block + b, blocks, ring.stage);
                    wgmma_fence();
#pragma unroll
                    for (int b = 0; b < kGroup; ++b) {
                        const int at = 32 * (block + b);  // of 128
                        wgmma_s8(acc, fragment[b], desc + (at / PIECE * kPieceBytes + at % PIECE) / 16, add || at > 0);
                    }
                    wgmma_commit();
                    wgmma_wait<1>();
                    if (block == 0 && i > first) release(before);
                }
                add = true;
                before = empty + 8 * ring.stage;
                ring.next();
                walk.next();
            }
            if (!kSums && SPLIT == 1) share_tables();  // while the last products are under way
            wgmma_wait<0>();
            if (first < end) release(before);
            if (kSums && segment + 1 < p.segments) {
                if (segment == 0) share_tables();
#pragma unroll
                for (int j = 0; j < kAccumulators; j += 4) {
                    float4 y = scaled(four(j), j, segment);
                    if (segment > 0) y = add4(sum_before(j), y);
                    if (j < kRegisterSums)
                        sum[j] = y.x, sum[j + 1] = y.y, sum[j + 2] = y.z, sum[j + 3] = y.w;
                    else
                        shared_sums[(j - kRegisterSums) / 4 * kConsumers] = y;
                }
            }
        }

        if (SPLIT > 1) {
            if (!add) {  // a share of no stages
#pragma unroll
                    for (int j = 0; j < kAccumulators; ++j) acc[j] = 0;
            }
            named_barrier(1 + WARPGROUPS, kConsumers);  // all have read what they need of the pipeline's buffers
            if (RANK && threadIdx.x == 0) {
                const unsigned at = stages + kExchanged, bar = stages + kLowBarrier;
                barrier_expect(bar, RANK * kLowBytes);
                for (int r = 0; r < RANK; ++r) {
                    tma_load_2d(at + r * kLowBytes, &p.up, bar, kLowRow * r, position.feature());
                    tma_load_2d(at + r * kLowBytes + kFeatures * kLowRow, &p.low, bar, kLowRow * r, first_token);
                }
            }
#pragma unroll
            for (int j = 0; j < kAccumulators; j += 4)
                *reinterpret_cast<uint4*>(shared + exchanged + j / 4 * kStep) = four(j);
            cluster_sync();
            if (RANK) barrier_wait(stages + kLowBarrier, 0);
        }

        // Epilogue: float32, each step rounded on its own, one cast at the end; kChunk tokens at a time.
        const int here = first_token;  // that of the next tile is looked up now
        const float factor[2] = {weight_scale[0], weight_scale[1]};
        float bias[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            bias[i] = p.bias_dtype == 0 ? __uint_as_float(bias_bits[i]) : float_of_bits(bias_bits[i], p.bias_dtype);
        if (kAhead) look_up(after);
        constexpr int kValues = kChunk / 2;
        // Four results without what is added to them, from their sums of all segments.
        auto result = [&](const float4& y) {
            return make_float4(__fadd_rn(__fmul_rn(y.x, factor[0]), bias[0]), __fadd_rn(__fmul_rn(y.y, factor[0]), bias[0]),
                               __fadd_rn(__fmul_rn(y.z, factor[1]), bias[1]), __fadd_rn(__fmul_rn(y.w, factor[1]), bias[1]));
        };
        // The low-rank branch of some tokens, added to their results: the tensor cores' sums begin with these.
        auto add_low = [&](auto& results, int at, int first) {
            const unsigned ups = stages + (SPLIT > 1 ? kExchanged + at * kLowBytes : at * kStageBytes);
            const unsigned rows = ups + (SPLIT > 1 ? kFeatures * kLowRow : kWeightBytes) + first * kLowRow;
            const unsigned long long a = narrow_tile_descriptor(ups + group * 64 * kLowRow), b = narrow_tile_descriptor(rows);
            wgmma_half<LOW>(results, a, b);
            wgmma_half<LOW>(results, a + 2, b + 2);
        };
        auto last_sum = [&](int j) {
            const float4 y = scaled(four(j), j, kSums ? p.segments - 1 : 0);
            return kSums ? add4(sum_before(j), y) : y;
        };
        if constexpr (RANK && SPLIT == 1) {  // of all tokens at once, where the integers were
#pragma unroll
            for (int j = 0; j < kAccumulators; j += 4) {
                const float4 y = result(last_sum(j));
                acc[j] = __float_as_uint(y.x), acc[j + 1] = __float_as_uint(y.y);
                acc[j + 2] = __float_as_uint(y.z), acc[j + 3] = __float_as_uint(y.w);
            }
            const Ring low = ring;
            wgmma_fence();
#pragma unroll
            for (int r = 0; r < RANK; ++r, ring.next()) {
                barrier_wait(full + 8 * ring.stage, ring.phase);
                add_low(acc, ring.stage, 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            ring = low;
            for (int r = 0; r < RANK; ++r, ring.next()) release(empty + 8 * ring.stage);
        }
        constexpr int kUnroll = SPLIT > 1 ? 1 : TOKENS / kChunk;
#pragma unroll kUnroll
        for (int chunk = SPLIT > 1 ? cluster_rank() : 0; chunk < TOKENS / kChunk; chunk += SPLIT) {
            float v[kValues];
            uint4 total[kValues / 4];  // integers, of the last segment
            const int first = chunk * kValues;
#pragma unroll
            for (int j = 0; j < kValues; j += 4) {
                float4 y;
                if constexpr (SPLIT > 1) {
                    uint4 parts[SPLIT], &t = total[j / 4];
#pragma unroll
                    for (int rank = 0; rank < SPLIT; ++rank)
                        parts[rank] = load_cluster(cluster_address(stages + exchanged + (first + j) / 4 * kStep, rank));
                    int segment = 0, left = p.parts[0];
#pragma unroll
                    for (int rank = 0; rank < SPLIT; ++rank, --left) {
                        const uint4& part = parts[rank];
                        if (left == 0 && !p.is_integer) {  // the segment before is complete
                            const float4 done = scaled(t, first + j, segment);
                            y = segment > 0 ? add4(y, done) : done;
                            left = p.parts[++segment];
                            t = part;
                        } else if (rank == 0) {
                            t = part;
                        } else {
                            t.x += part.x, t.y += part.y, t.z += part.z, t.w += part.w;
                        }
                    }
                    const float4 done = scaled(t, first + j, segment);
                    y = segment > 0 ? add4(y, done) : done;
                    y = result(y);
                } else {
                    const uint4& t = total[j / 4] = four(first + j);  // with RANK results by now
                    y = RANK ? make_float4(__uint_as_float(t.x), __uint_as_float(t.y), __uint_as_float(t.z), __uint_as_float(t.w))
                             : result(last_sum(first + j));
                }
                v[j] = y.x, v[j + 1] = y.y, v[j + 2] = y.z, v[j + 3] = y.w;
            }
            if (EXTRAS && p.shift) {  // neighbours mostly have one image
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int feature = min(first_feature + row + 8 * i, p.features - 1);
                    int current = -1;
                    float shift = 0.0f;
#pragma unroll
                    for (int j = 2 * i; j < kValues; j += 4) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int image = images[2 * (first + j - 2 * i) + pair + e];
                            if (image != current)
                                shift = load_float(p.shift, p.shift_dtype, static_cast<long long>(image) * p.features + feature);
                            current = image;
                            v[j + e] = __fadd_rn(v[j + e], shift);
                        }
                    }
                }
            }
            if constexpr (RANK && SPLIT > 1) {
                unsigned results[kValues];
#pragma unroll
                for (int j = 0; j < kValues; ++j) settled(results[j] = __float_as_uint(v[j]));
                wgmma_fence();
#pragma unroll
                for (int r = 0; r < RANK; ++r) add_low(results, r, chunk * kChunk);
                wgmma_commit();
                wgmma_wait<0>();
#pragma unroll
                for (int j = 0; j < kValues; ++j) v[j] = __uint_as_float(results[j]);
            }
            if (ELEMENTS) {
                auto integer = [&](int j) {
                    const uint4& t = total[j / 4];
                    return j % 4 == 0 ? t.x : j % 4 == 1 ? t.y : j % 4 == 2 ? t.z : t.w;
                };
#pragma unroll
                for (int j = 0; j < kValues; ++j) {
                    const int pixel = here + 8 * ((first + j) / 4) + pair + j % 2;
                    const int feature = first_feature + row + 8 * (j / 2 % 2);
                    if (pixel >= p.pixels || feature >= p.features) continue;
                    const long long at = static_cast<long long>(pixel) * p.features + feature;
                    if (OUT == 0) {
                        if (EXTRAS && p.residual) v[j] = __fadd_rn(v[j], __ldg(static_cast<const float*>(p.residual) + at));
                        static_cast<unsigned*>(p.elements)[at] = p.is_integer ? integer(j) : __float_as_uint(v[j]);
                    } else {
                        const unsigned short* const residual = static_cast<const unsigned short*>(p.residual) + at;
                        if (EXTRAS && p.residual) v[j] = __fadd_rn(v[j], float_of_bits(__ldg(residual), OUT));
                        static_cast<unsigned short*>(p.elements)[at] = static_cast<unsigned short>(pack2(v[j], 0.0f));
                    }
                }
            } else {
#pragma unroll
                for (int j = 0; EXTRAS && j < kValues; j += 2) {
                    if (!p.residual) break;
                    // Read as it lies in memory, two features of a token a thread; the block of 8x8 is then turned over.
                    const int pixel = here + 2 * (first + j / 4 * 4) + lane / 4;
                    const int feature = first_feature + 16 * (warp % 4) + 4 * (j % 4) + pair;
                    const long long at = static_cast<long long>(pixel) * p.features + feature;
                    unsigned two = 0;
                    if (pixel < p.pixels && feature < p.features)
                        two = __ldg(reinterpret_cast<const unsigned*>(static_cast<const unsigned short*>(p.residual) + at));
                    two = turn_over(two);
                    v[j] = __fadd_rn(v[j], float_of_bits(two & 0xffff, OUT));
                    v[j + 1] = __fadd_rn(v[j + 1], float_of_bits(two >> 16, OUT));
                }
                if (SPLIT > 1 && chunk >= SPLIT) {  // what was stored last is out of the way
                    if (threadIdx.x % 128 == 0) stores_wait_read();
                    named_barrier(1 + group, 128);
                }
#pragma unroll
                for (int j = 0; j < kValues; j += 8) {  // 16 tokens
                    const unsigned four[4] = {pack2(v[j], v[j + 1]), pack2(v[j + 2], v[j + 3]), pack2(v[j + 4], v[j + 5]),
                                              pack2(v[j + 6], v[j + 7])};
                    stmatrix_x4_turned(store + my_store + (chunk * kChunk % (kStores * kStored) + 2 * j) * 128, four);
                }
                if ((chunk + 1) * kChunk % kStored == 0) {
                    fence_copy_engine();
                    if (kStores > 1 && threadIdx.x % 128 == 0) stores_wait_read();  // the other buffer is free
                    named_barrier(1 + group, 128);
                    if (threadIdx.x % 128 == 0) {
                        const unsigned buffer = chunk * kChunk / kStored % kStores;
                        tma_store_2d(&p.out, store + buffer * kStored * 128, 2 * first_feature,
                                     here + (chunk + 1) * kChunk - kStored);
                    }
                }
            }
        }
        if (SPLIT > 1) cluster_sync();  // the others, too, have read what they need of this block
    }
    if (!ELEMENTS && threadIdx.x % 128 == 0) stores_wait_read();  // shared memory is theirs until then
}

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        gemm_wgmma(const __grid_constant__ Params p) {
    SWIZZLED_SHARED(shared);
    const unsigned stages = shared_address(shared);
    const unsigned full = stages + kBarriers, empty = full + 8 * STAGES;
    const int warp = threadIdx.x / 32;

    wait_for_kernel_before_unless(p.early);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, WEIGHT == 4 ? 1 + WARPGROUPS : 1);  // the arrivals of the producers
            barrier_init(empty + 8 * i, 4 * WARPGROUPS);
        }
        if (SPLIT > 1) barrier_init(stages + kLowBarrier, 1);
        barrier_init_visible();
    }
    __syncthreads();

    if (warp >= 4 * WARPGROUPS) {
        give_registers<kProducerRegisters>();
        const int producer = warp - 4 * WARPGROUPS;
        if (threadIdx.x == kConsumers) produce(p, stages, full, empty);
        if (WEIGHT == 4 && producer > 0 && producer <= WARPGROUPS)
            produce_multipliers(p, stages + kMultipliers, full, empty);
        if (SPLIT > 1) {
            __syncwarp();
            cluster_sync();
            cluster_sync();
        }
    } else {
        take_registers<kConsumerRegisters>();
        wait_for_kernel_before();
        let_next_kernel_in();
        consume(p, shared, full, empty);
    }
}
