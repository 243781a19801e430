/* Rounding of inputs to int8, by the row. */
#ifndef SSM_MP_QUANTIZE_H
#define SSM_MP_QUANTIZE_H

#include "register.h"

/* x / scale. `inverse`: 1 / scale; a product with it is a few roundings off, which shows only where the quotient lies
 * near the middle between two integers: there it is divided, so that what is rounded afterwards is always the same. */
INLINE Register quotient_of(Register x, float scale, float inverse) {
#if defined(__AVX512F__)
    const Register ratio = x * inverse;
    const v16 size = magnitude((v16)ratio), off = magnitude((v16)(ratio - ((ratio + ROUNDING) - ROUNDING)));
    if (__builtin_expect(_mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask((__m512)size, (__m512)splat(128.0f), _CMP_LT_OQ),
                                                 (__m512)off, (__m512)splat(0.4999f), _CMP_GT_OQ) == 0, 1))
        return ratio;
#endif
    (void)inverse;
    return x / scale;
}

/* The first `count` of a register's numbers, which fit int8. */
INLINE void put_int8(int8_t *p, Integers x, int64_t count) {
#if defined(__AVX512F__)
    store_int8(p, (v16i)x, count < LANES ? (int)count : LANES);
#else
    typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
    const Bytes bytes = __builtin_convertvector(x, Bytes);
    memcpy(p, &bytes, count < WIDTH ? count : WIDTH);
#endif
}

/* x [k] → the nearest integers to x / scale in [−127, 127], plus `offset`, modulo 256. A value that is not finite makes
 * `poison` NaN. */
INLINE void quantize_row(const float *x, int64_t k, float scale, int offset, int8_t *q, float *poison) {
    const Register zero = {0}, lowest = zero - 127.0f, highest = zero + 127.0f;
    const Integers origin = (Integers)(zero + ROUNDING) - offset;
    const float inverse = 1.0f / scale;
    Register spoilt = {0};
    for (int64_t c = 0; c < k; c += WIDTH) {
        const Register value = get_part(x + c, k - c);
        spoilt += value * 0.0f;
        Register bounded = quotient_of(value, scale, inverse);
        bounded = choose(bounded < lowest, lowest, bounded);
        bounded = choose(bounded > highest, highest, bounded);
        put_int8(q + c, (Integers)(bounded + ROUNDING) - origin, k - c);
    }
    *poison += total_of(spoilt);
}

/* The scale of a row by its largest magnitude, at least `smallest`. */
INLINE float scale_of_row(const float *x, int64_t k, float smallest) {
    Register largest = {0};
    for (int64_t c = 0; c < k; c += WIDTH) {
        const Register value = (Register)((Integers)get_part(x + c, k - c) & INT32_MAX);
        largest = choose(value > largest, value, largest);
    }
    float top = 0;
    for (int i = 0; i < WIDTH; i++) top = largest[i] > top ? largest[i] : top;
    const float scale = top / 127.0f;
    return scale < smallest ? smallest : scale;
}

#endif
