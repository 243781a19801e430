/* The product of a block of inputs with a panel of 64 outputs, in the way that is the fastest on this CPU. */
#ifndef SSM_MP_TILES_H
#define SSM_MP_TILES_H

#include "panel_amx.h"

static Plan plan_of(const Matrix *w) {
    const int integers = w->kind == INT8 && w->inputs != INPUTS_AS_THEY_ARE;
#ifdef HAS_AMX
    if (amx_allowed()) {
        const int64_t per_word = integers ? 4 : 2, words = (w->k + per_word - 1) / per_word;
        const int64_t padded = (words + AMX_WORDS - 1) / AMX_WORDS * AMX_WORDS;
        return (Plan){w, BY_AMX, integers, padded, integers ? 1 : 3, integers ? 1 : pieces_of(w->kind), AMX_TALL};
    }
#endif
    if (integers && PER_WORD > 1) {
        const int64_t fours = (w->k + 3) / 4;
        return (Plan){w, BY_INTEGERS, 1, fours * (4 / PER_WORD), 1, 1, TALL};
    }
    return (Plan){w, BY_FLOATS, integers, w->k, 1, 1, TALL};
}

/* One panel of weights as the products read it. */
static void lay_panel(const Plan *plan, int64_t panel, int8_t *to) {
#ifdef HAS_AMX
    if (plan->way == BY_AMX && !plan->integers) {
        lay_pieces_panel(plan, panel, to);
        return;
    }
#endif
    if (plan->way == BY_FLOATS) lay_float_panel(plan, panel, to);
    else lay_int8_panel(plan, panel, to);
}

/* `rows` inputs as the products read them, where those are not the inputs themselves, each piece [room][k] one after
 * another; `scales` of each row: NaN where an input that is quantised is not finite. */
static Inputs lay_inputs(const Plan *plan, const float *x, int64_t ld, int64_t rows, int64_t room, int8_t *to, float *scales) {
    const Matrix *w = plan->of;
    const int64_t row = input_bytes(plan);
    (void)room;
    for (int64_t i = 0; i < rows; i++) scales[i] = 1.0f;
    if (!is_laid(plan)) return (Inputs){(const int8_t *)x, ld * (int64_t)sizeof(float)};
    for (int64_t i = 0; i < rows; i++) {
#ifdef HAS_AMX
        if (!plan->integers) {
            split_input(plan, x + i * ld, to + i * row, room * row);
            continue;
        }
#endif
        float poison = 0;
        const float scale = w->inputs == DYNAMIC_INPUTS ? scale_of_row(x + i * ld, w->k, w->input_scale) : w->input_scale;
        lay_integers(plan, x + i * ld, scale, to + i * row, &poison);
        scales[i] = scale + poison;
    }
    return (Inputs){to, row};
}

/* The sums of a block of inputs with a panel of weights, int32 or float32: [rows, up to a whole tile][64]. `room`: rows
 * of a piece. */
static void multiply_panel(const Plan *plan, int64_t panel, const int8_t *b, const Inputs *a, int64_t rows, int64_t room,
                           int32_t *sums) {
#ifdef HAS_AMX
    if (plan->way == BY_AMX) {
        amx_panel(plan, b, a->at, rows, room, sums);
        return;
    }
#endif
    (void)room;
    const int64_t left = plan->of->n - panel * PANEL;
    const Strips strips = strips_of(plan);
    for (int64_t first = 0; first < PANEL && first < left; first += strips.outputs)
        for (int64_t from = 0; from < plan->words; from += NEAR_WORDS) {
            const int64_t until = plan->words - from < NEAR_WORDS ? plan->words : from + NEAR_WORDS;
            const int8_t *strip = b + first / strips.outputs * strips.bytes;
            for (int64_t i = 0; i < rows; i += TALL) {
                const int8_t *x[TALL]; /* the last input again where there are fewer */
                for (int j = 0; j < TALL; j++) x[j] = input_at(a, i + j < rows ? i + j : rows - 1);
                int32_t *to = sums + i * PANEL + first;
                if (plan->way == BY_INTEGERS) int8_tile(plan->of, panel * PANEL + first, strip, x, from, until, to);
                else float_tile((const float *)strip, (const float *const *)x, from, until, (float *)to, plan->integers);
            }
        }
}

#endif
