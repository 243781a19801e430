/* Products of float32 inputs with a panel of float32 weights, [k] words of an output.
 *
 * Integers are multiplied in this way too where there is no instruction for them: their sums are exact. */
#ifndef SSM_MP_PANEL_FLOAT_H
#define SSM_MP_PANEL_FLOAT_H

#include "plan.h"

static void lay_float_panel(const Plan *plan, int64_t panel, int8_t *to) {
    const Strips strips = strips_of(plan), few = {strip_of(plan), LANES * strip_of(plan) * 4};
    int8_t held[LANES * PANEL * 4] __attribute__((aligned(64)));
    for (int64_t c = 0; c < plan->words; c += LANES) {
        const int64_t left = plan->words - c;
        if (left >= LANES) {
            lay_columns(plan->of, panel, c, &strips, to, c);
            continue;
        }
        lay_columns(plan->of, panel, c, &few, held, 0);
        for (int64_t first = 0; first < PANEL; first += strips.outputs)
            memcpy(place_in(&strips, to, c, first), place_in(&few, held, 0, first), left * strips.outputs * 4);
    }
}

/* Up to six inputs by a strip of outputs, words `from` … `until`, added to the sums so far (none before word 0). */
static __attribute__((noinline)) void float_tile(const float *weights, const float *const x[TALL], int64_t from,
                                                 int64_t until, float *to, const int integers) {
    Register sums[TALL][WIDE];
    UNROLL
    for (int i = 0; i < TALL; i++)
        UNROLL
        for (int v = 0; v < WIDE; v++) sums[i][v] = (Register){0};
    for (int64_t c = from; c < until; c++) {
        Register held[WIDE];
        UNROLL
        for (int v = 0; v < WIDE; v++) held[v] = get(weights + c * WIDE * WIDTH + v * WIDTH);
        UNROLL
        for (int i = 0; i < TALL; i++)
            UNROLL
            for (int v = 0; v < WIDE; v++) sums[i][v] += held[v] * x[i][c];
    }
    UNROLL
    for (int i = 0; i < TALL; i++)
        UNROLL
        for (int v = 0; v < WIDE; v++) {
            float *at = to + i * PANEL + v * WIDTH;
            Register before = {0};
            if (from) before = get(at);
            if (integers) before = (Register)((Integers)before + __builtin_convertvector(sums[i][v], Integers));
            else before += sums[i][v];
            put(at, before);
        }
}

#endif
