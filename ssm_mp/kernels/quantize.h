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
#elif defined(__AVX2__)
    /* by halves, or compilers take one number after another */
    const __m256i low = _mm256_and_si256((__m256i)x, _mm256_set1_epi32(255));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    memcpy(p, &bytes, count < WIDTH ? count : WIDTH);
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
        const Register bounded = smaller(larger(quotient_of(value, scale, inverse), lowest), highest);
        put_int8(q + c, (Integers)(bounded + ROUNDING) - origin, k - c);
    }
    *poison += total_of(spoilt);
}

INLINE Register size_of(Register x) { return (Register)((Integers)x & INT32_MAX); }

/* The scale of a row by its largest magnitude, at least `smallest`. */
INLINE float scale_of_row(const float *x, int64_t k, float smallest) {
    enum { APART = 4 }; /* so that one need not wait for another */
    Register largest[APART] = {{0}};
    int64_t c = 0;
    for (; c + APART * WIDTH <= k; c += APART * WIDTH)
        UNROLL
        for (int i = 0; i < APART; i++) largest[i] = larger(size_of(get(x + c + i * WIDTH)), largest[i]);
    for (; c < k; c += WIDTH) largest[0] = larger(size_of(get_part(x + c, k - c)), largest[0]);
    largest[0] = larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
    float top = 0;
    for (int i = 0; i < WIDTH; i++) top = largest[0][i] > top ? largest[0][i] : top;
    const float scale = top / 127.0f;
    return scale < smallest ? smallest : scale;
}

#endif
