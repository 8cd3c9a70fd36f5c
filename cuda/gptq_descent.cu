// Coordinate descent over up to 128 columns: better = round(code + gradient / (step * within[column][column])),
// change = (better - code) * step, error -= change, every later column's gradient -= within[column][later] * change.
//
//   codes, errors, gradient, step  float32 [columns, rows]    within float32 [columns, columns], upper triangle
//   new_codes, new_errors          float32 [columns, rows]
//
// Layouts and the distribution over threads: gptq_block.cuh. Shared memory: 512 bytes a column. Any architecture. The
// arithmetic is torch's, rounding by rounding.
#include "dependent.cuh"
#include "gptq_block.cuh"

struct Params {
    const float *codes, *errors, *gradient, *step, *within;
    float *new_codes, *new_errors;
    int columns, rows, stride;  // `stride`: between rows of `within`
    float low, high;
};

extern "C" __global__ void __launch_bounds__(256, 2) gptq_descent(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_in();
    DYNAMIC_SHARED(memory);
    float* const within = reinterpret_cast<float*>(memory);
    copy_within(within, p.within, p.stride, p.columns);
    const Place place;
    float code[HELD], gradient[HELD], step[HELD];  // changes take the place of gradients
    load_held(code, p.codes, place, p.columns, p.rows, 0.0f);
    load_held(gradient, p.gradient, place, p.columns, p.rows, 1.0f);
    load_held(step, p.step, place, p.columns, p.rows, 1.0f);
    wait_for_within();
#pragma unroll
    for (int r = 0; r < HELD; ++r) {
        // Not put into gradient[r] yet: all lanes go on dividing theirs, and to divide zeros, as most changes are, is
        // slow.
        float change = 0.0f;
#pragma unroll 1
        for (int owner = 0; owner < LANES; ++owner) {
            const int column = r * LANES + owner;
            if (column >= p.columns) break;
            const float* const curvature = within + column * COLUMNS + place.lane;
            // Every lane computes its own column r; the owner's is the one that is due.
            const float towards = __fdiv_rn(gradient[r], __fmul_rn(step[r], within[column * COLUMNS + column]));
            const float better = rounded(__fadd_rn(code[r], towards), p.low, p.high);
            const float own = __fmul_rn(__fsub_rn(better, code[r]), step[r]);
            const float passed_on = place.from(owner, own);
            if (place.lane > owner) gradient[r] = __fmaf_rn(-curvature[r * LANES], passed_on, gradient[r]);
            if (place.lane == owner) {
                code[r] = better;
                change = own;
            }
#pragma unroll
            for (int later = r + 1; later < HELD; ++later) {
                gradient[later] = __fmaf_rn(-curvature[later * LANES], passed_on, gradient[later]);
            }
        }
        gradient[r] = change;
    }
    store_held(p.new_codes, code, place, p.columns, p.rows);
    float error[HELD];
    load_held(error, p.errors, place, p.columns, p.rows, 0.0f);
#pragma unroll
    for (int r = 0; r < HELD; ++r) error[r] = __fsub_rn(error[r], gradient[r]);
    store_held(p.new_errors, error, place, p.columns, p.rows);
}
