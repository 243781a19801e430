/* Sums of products of integers back to float32, by the row. */
#ifndef SSM_MP_RESCALE_H
#define SSM_MP_RESCALE_H

#include "register.h"

/* One row of int32 sums → float32 in their place: sum · column scale [n] · scale + bias [n] (or none). */
INLINE void rescale_row(int64_t n, int32_t *sums, const float *column, float scale, const float *bias) {
    for (int64_t c = 0; c < n; c += WIDTH) {
        float *at = (float *)(sums + c);
        const Integers sum = (Integers)get_part(at, n - c);
        Register value = __builtin_convertvector(sum, Register) * get_part(column + c, n - c) * scale;
        if (bias) value = value + get_part(bias + c, n - c);
        put_part(at, value, n - c);
    }
}

#endif
