/* Stored values as float32, columns of them: each value of 64 outputs side by side, as products of many inputs read a
 * panel of a weight.
 *
 * Codes and float16 values are laid out as the numbers that they stand for; int8 values without their scale.
 */
#ifndef SSM_MP_LAY_VALUES_H
#define SSM_MP_LAY_VALUES_H

#include "codes.h"
#include "stored.h"
#include "transpose.h"

enum { PANEL = 64 };

/* A panel in strips, one after another: of each column `outputs` values side by side. */
typedef struct {
    int64_t outputs, bytes;
} Strips;

/* Where a column's values of a panel's outputs from `first` on go. */
INLINE float *place_in(const Strips *strips, int8_t *panel, int64_t column, int64_t first) {
    return (float *)(panel + first / strips->outputs * strips->bytes) + column * strips->outputs + first % strips->outputs;
}

typedef struct {
    Register piece[PIECES];
} Sixteen;

INLINE int bits_of_codes(const int64_t kind) { return kind == CODES4 ? 4 : kind == CODES3 ? 3 : 2; }

/* Sixteen codes in their group's scale, all of them there. */
INLINE Sixteen lay_codes(const Matrix *w, const int bits, const Levels *levels, int64_t at) {
    Sixteen found;
    const uint8_t *packed = (const uint8_t *)w->values + at * bits / 8;
    const float scale = w->scales[at >> w->group_bits];
    UNROLL
    for (int p = 0; p < PIECES; p++) found.piece[p] = levels_at(levels, codes_in_order(packed, bits, p), bits) * scale;
    return found;
}

/* Columns `c` … `c` + 15 of a row; zeros beyond the matrix. */
INLINE Sixteen lay_row(const Matrix *w, const int64_t kind, const Levels *levels, int64_t row, int64_t c) {
    const int64_t at = row * w->k + c, count = row < w->n ? w->k - c : 0;
    Sixteen found;
    if (kind < CODES4) {
        UNROLL
        for (int p = 0; p < PIECES; p++) found.piece[p] = stored_part((int)kind, w->values, at + p * WIDTH, count - p * WIDTH);
        return found;
    }
    const int bits = bits_of_codes(kind);
    if (count >= LANES && at % LANES == 0) return lay_codes(w, bits, levels, at);
    float held[LANES] = {0};
    for (int64_t i = at; i < at + count && i < at + LANES; i++)
        held[i - at] = w->levels[code_at(w->values, i, bits)] * w->scales[i >> w->group_bits];
    UNROLL
    for (int p = 0; p < PIECES; p++) found.piece[p] = get(held + p * WIDTH);
    return found;
}

/* Columns `c` … `c` + 15 of a panel → columns `at` … `at` + 15 there. */
INLINE void lay_columns_of(const Matrix *w, const int64_t kind, int64_t panel, int64_t c, const Strips *strips, int8_t *to,
                           int64_t at) {
    const Levels levels = kind >= CODES4 ? repeated_levels(w->levels, bits_of_codes(kind)) : (Levels){0};
    for (int64_t first = 0; first < PANEL; first += WIDTH) {
        Register held[PIECES][WIDTH];
        UNROLL
        for (int i = 0; i < WIDTH; i++) {
            const Sixteen values = lay_row(w, kind, &levels, panel * PANEL + first + i, c);
            UNROLL
            for (int p = 0; p < PIECES; p++) held[p][i] = values.piece[p];
        }
        UNROLL
        for (int p = 0; p < PIECES; p++) {
            transpose(held[p]);
            UNROLL
            for (int i = 0; i < WIDTH; i++) put(place_in(strips, to, at + p * WIDTH + i, first), held[p][i]);
        }
    }
}

static __attribute__((noinline)) void lay_columns(const Matrix *w, int64_t panel, int64_t c, const Strips *strips, int8_t *to,
                                                  int64_t at) {
    switch (w->kind) {
    case FLOAT32: lay_columns_of(w, FLOAT32, panel, c, strips, to, at); return;
    case FLOAT16: lay_columns_of(w, FLOAT16, panel, c, strips, to, at); return;
    case INT8: lay_columns_of(w, INT8, panel, c, strips, to, at); return;
    case CODES4: lay_columns_of(w, CODES4, panel, c, strips, to, at); return;
    case CODES3: lay_columns_of(w, CODES3, panel, c, strips, to, at); return;
    default: lay_columns_of(w, CODES2, panel, c, strips, to, at);
    }
}

#endif
