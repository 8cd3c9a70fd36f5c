// gemm_wgmma.cu's producers: what fills the stages of the pipeline.
#pragma once
#include "dependent.cuh"
#include "sm90.cuh"
#include "wgmma_tile.cuh"

// Loads the weights and the pixels, then what of the low-rank branch belongs to them: one thread.
__device__ __forceinline__ void produce(const Params& p, unsigned stages, unsigned full, unsigned empty) {
    const Share share(p);
    Ring ring{0, 1};  // the buffers start out empty
    // Where weights do not come from the kernel before, those of the first stages are on their way while it ends.
    auto load_weights = [&](const Ring& to, const Walk& walk, int feature) {
        barrier_expect(full + 8 * to.stage, kStageBytes);
        tma_load_2d(stages + to.stage * kStageBytes, &p.weight, full + 8 * to.stage, walk.block * (WEIGHT == 8 ? 32 : 16),
                    feature);
    };
    Position position(p);
    int early = 0;
    {
        int first, end;
        share.stages(p, share.first_segment, first, end);
        Walk walk(p, share.first_segment, first);
        Ring to{0, 0};
        for (; early < min(STAGES, end - first); ++early, to.next(), walk.next())
            load_weights(to, walk, position.feature());
    }
    prefetch_map(&p.input);
    wait_for_kernel_before();
    for (; position.inside(p); position.next(p)) {
        const int token = position.token(), feature = position.feature();
        const int image = token / p.plane, line = token % p.plane / p.width;
        const int h0 = line * p.stride_h - p.padding_h, w0 = token % p.plane % p.width * p.stride_w - p.padding_w;
        for (int segment = share.first_segment; segment < share.end_segment; ++segment) {
            int first, end;
            share.stages(p, segment, first, end);
            Walk walk(p, segment, first);
            Pieces piece(p, segment, first);
            for (int i = first; i < end; ++i) {
                const unsigned at = stages + ring.stage * kStageBytes + kWeightBytes, bar = full + 8 * ring.stage;
                if (early-- <= 0) {
                    barrier_wait(empty + 8 * ring.stage, ring.phase);
                    load_weights(ring, walk, feature);
                }
#pragma unroll
                for (unsigned to = at; to < at + kInputBytes; to += kPieceBytes, piece.next(p)) {
                    if (IMAGE)
                        tma_load_pixels(to, &p.input, bar, piece.channel, w0, h0, image, piece.tap_w, piece.tap_h);
                    else
                        tma_load_2d(to, &p.input, bar, piece.channel, token);
                }
                walk.next();
                ring.next();
            }
        }
        if (RANK && SPLIT == 1) {
            for (int r = 0; r < RANK; ++r) {
                const unsigned at = stages + ring.stage * kStageBytes, bar = full + 8 * ring.stage;
                barrier_wait(empty + 8 * ring.stage, ring.phase);
                barrier_expect(bar, kLowBytes);
                tma_load_2d(at, &p.up, bar, kLowRow * r, feature);
                tma_load_2d(at + kWeightBytes, &p.low, bar, kLowRow * r, token);
                ring.next();
            }
        }
    }
}

// Lays out the multipliers: for each stage and row a word with those of its four blocks of 32, zero where the K axis has
// no such block. A warp for each 64 features, two rows a lane; of each row a lane keeps the 16 blocks around, so that it reads
// a word of global memory every 256 of K, one ahead. A row starts at any byte: words are read where they are aligned.
__device__ __forceinline__ void produce_multipliers(const Params& p, unsigned words, unsigned full, unsigned empty) {
    const Share share(p);
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 4 * 64 - 64 + lane, stride = p.multiplier_stride;
    const unsigned long long begin = reinterpret_cast<unsigned long long>(p.multipliers);
    const unsigned long long last_byte = begin + static_cast<long long>(stride) * p.features - 1;
    Ring ring{0, 1};
    for (Position position(p); position.inside(p); position.next(p)) {
        unsigned long long row[2];
        unsigned turn[2], here[2], next[2], raw[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row[i] = begin + static_cast<long long>(min(position.feature() + first_row + 32 * i, p.features - 1)) * stride;
            turn[i] = 8 * (row[i] & 3);
            row[i] &= ~3ull;
        }
        auto read = [&](int i, int word) {
            const unsigned long long at = row[i] + 4 * word;
            return at <= last_byte ? __ldg(reinterpret_cast<const unsigned*>(at)) : 0u;
        };
        for (int segment = share.first_segment; segment < share.end_segment; ++segment) {
            int first, end;
            share.stages(p, segment, first, end);
            Walk walk(p, segment, first);
            int word = walk.block >> 3;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const unsigned a = read(i, word), b = read(i, word + 1);
                raw[i] = read(i, word + 2);
                here[i] = __funnelshift_r(a, b, turn[i]);
                next[i] = __funnelshift_r(b, raw[i], turn[i]);
            }
            for (int s = first; s < end; ++s) {
                if (walk.block >> 3 != word) {
                    ++word;
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const unsigned b = raw[i];
                        here[i] = next[i];
                        raw[i] = read(i, word + 2);
                        next[i] = __funnelshift_r(b, raw[i], turn[i]);
                    }
                }
                const unsigned mask = 0xffffu >> (16 - 4 * walk.here());
                const int shift = 4 * (walk.block & 7);
                walk.next();
                barrier_wait(empty + 8 * ring.stage, ring.phase);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    unsigned four = __funnelshift_r(here[i], next[i], shift) & mask;
                    four = (four | four << 8) & 0x00ff00ff;
                    store_shared(words + ring.stage * kMultiplierBytes + 4 * (first_row + 32 * i),
                                 (four | four << 4) & 0x0f0f0f0f);
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(full + 8 * ring.stage);
                ring.next();
            }
        }
        if (RANK && SPLIT == 1)
            for (int r = 0; r < RANK; ++r) {
                barrier_wait(empty + 8 * ring.stage, ring.phase);
                if (lane == 0) barrier_arrive(full + 8 * ring.stage);
                ring.next();
            }
    }
}
