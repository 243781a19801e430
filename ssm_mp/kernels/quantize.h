/* Rounding of inputs to int8, by the row. */
#ifndef SSM_MP_QUANTIZE_H
#define SSM_MP_QUANTIZE_H

#include "vector.h"

/* x / scale. `inverse`: 1 / scale; a product with it is a few roundings off, which shows only where the quotient lies
 * near the middle between two integers: there it is divided, so that what is rounded afterwards is always the same. */
INLINE v16 quotient16(v16 x, float scale, float inverse) {
#if defined(__AVX512F__)
    const v16 ratio = x * splat(inverse);
    const v16 off = magnitude(ratio - ((ratio + splat(ROUNDING)) - splat(ROUNDING)));
    const v16 size = magnitude(ratio);
    if (__builtin_expect(_mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask((__m512)size, (__m512)splat(128.0f), _CMP_LT_OQ),
                                                 (__m512)off, (__m512)splat(0.4999f), _CMP_GT_OQ) == 0, 1))
        return ratio;
#endif
    (void)inverse;
    return x / splat(scale);
}

/* x [k] → the nearest integers to x / scale in [−127, 127], plus `offset`, modulo 256. A value that is not finite makes
 * `poison` NaN. */
INLINE void quantize_row(const float *x, int64_t k, float scale, int offset, int8_t *q, v16 *poison) {
    const float inverse = 1.0f / scale;
    for (int64_t c = 0; c < k; c += LANES) {
        const int count = k - c < LANES ? (int)(k - c) : LANES;
        const v16 value = load_part(x + c, count);
        *poison = *poison + value * splat(0.0f);
        const v16 bounded = at_most(at_least(quotient16(value, scale, inverse), -127.0f), 127.0f);
        store_int8(q + c, (v16i)(bounded + splat(ROUNDING)) - ((v16i)splat(ROUNDING) - offset), count);
    }
}

/* The scale of a row by its largest magnitude, at least `smallest`. */
INLINE float scale_of_row(const float *x, int64_t k, float smallest) {
    v16 largest = splat(0.0f);
    for (int64_t c = 0; c < k; c += LANES) {
        const int count = k - c < LANES ? (int)(k - c) : LANES;
        v16 value = magnitude(load_part(x + c, count));
        largest = select16(value > largest, value, largest);
    }
    const float scale = max16(largest) / 127.0f;
    return scale < smallest ? smallest : scale;
}

#endif
