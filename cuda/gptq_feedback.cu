// GPTQ's rounding of up to 128 columns: q = round(target / step), e = weight - q * step, and every later column's
// target += within[column][later] * e.
//
//   target, weight, step, codes, errors  float32 [columns, rows]    within float32 [columns, columns], upper triangle
//
// Layouts and the distribution over threads: gptq_block.cuh. One launch does what costs the reference nine launches a
// column. Shared memory: 512 bytes a column. Any architecture.
//
// The arithmetic is torch's, rounding by rounding: its update by an outer product is one fused multiply-add.
#include "dependent.cuh"
#include "gptq_block.cuh"

struct Params {
    const float *target, *weight, *step, *within;
    float *codes, *errors;
    int columns, rows, stride;  // `stride`: between rows of `within`
    float low, high;
};

extern "C" __global__ void __launch_bounds__(256, 2) gptq_feedback(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    DYNAMIC_SHARED(memory);
    float* const within = reinterpret_cast<float*>(memory);
    copy_within(within, p.within, p.stride, p.columns);
    const Place place;
    float target[HELD], weight[HELD], step[HELD];  // codes and errors take the place of targets and weights
    load_held(target, p.target, place, p.columns, p.rows, 1.0f);
    load_held(weight, p.weight, place, p.columns, p.rows, 0.0f);
    load_held(step, p.step, place, p.columns, p.rows, 1.0f);
    wait_for_within();
#pragma unroll
    for (int r = 0; r < HELD; ++r) {
        // Not put into target[r] yet: all lanes go on dividing theirs, and to divide zeros, as many codes are, is slow.
        float code = 0.0f, error = 0.0f;
#pragma unroll 1
        for (int owner = 0; owner < LANES; ++owner) {
            const int column = r * LANES + owner;
            if (column >= p.columns) break;
            const float* const feedback = within + column * COLUMNS + place.lane;
            // Every lane computes its own column r; the owner's is the one that is due.
            const float nearest = rounded(__fdiv_rn(target[r], step[r]), p.low, p.high);
            const float remainder = __fsub_rn(weight[r], __fmul_rn(nearest, step[r]));
            const float passed_on = place.from(owner, remainder);
            if (place.lane > owner) target[r] = __fmaf_rn(feedback[r * LANES], passed_on, target[r]);
            if (place.lane == owner) {
                code = nearest;
                error = remainder;
            }
#pragma unroll
            for (int later = r + 1; later < HELD; ++later) {
                target[later] = __fmaf_rn(feedback[later * LANES], passed_on, target[later]);
            }
        }
        target[r] = code;
        weight[r] = error;
    }
    store_held(p.codes, target, place, p.columns, p.rows);
    store_held(p.errors, weight, place, p.columns, p.rows);
}
