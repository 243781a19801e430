/* Products of one row of stored floats or integers with a few inputs, the row read once for all of them.
 *
 * Dimensions: `count` inputs, 4 at most, `ld` apart, and k values of a row.
 */
#ifndef SSM_MP_DOTS_H
#define SSM_MP_DOTS_H

#include "stored.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* A row's values from place `at` on, times inputs; with constant kind and count the compiler leaves one loop. */
INLINE void dot_stored(const int kind, const void *values, int64_t at, const float *x, int64_t ld, int64_t k,
                       const int count, float *found) {
    const int parts = 4 / count; /* sums of an input, so that none waits for the one before */
    Register sum[4] = {{0}};
    int64_t c = 0;
    for (; c + parts * WIDTH <= k; c += parts * WIDTH)
        UNROLL
        for (int j = 0; j < parts; j++) {
            const Register value = stored(kind, values, at + c + j * WIDTH);
            UNROLL
            for (int i = 0; i < count; i++) sum[i * parts + j] += value * get(x + i * ld + c + j * WIDTH);
        }
    for (; c < k; c += WIDTH) {
        const Register value = stored_part(kind, values, at + c, k - c);
        UNROLL
        for (int i = 0; i < count; i++) sum[i * parts] += value * get_part(x + i * ld + c, k - c);
    }
    UNROLL
    for (int i = 0; i < count; i++) {
        Register total = sum[i * parts];
        UNROLL
        for (int j = 1; j < parts; j++) total += sum[i * parts + j];
        found[i] = sum_of(total);
    }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
/* Integer products of a row w [k] and inputs x [count, k] in [−127, 127]; `row_sum` is the sum of the row's values. */
INLINE void dot_int8(const int8_t *w, const int8_t *x, int64_t k, int32_t row_sum, const int count, int32_t *found) {
    /* the instruction multiplies unsigned with signed: 128 is added to the inputs, and taken away again at the end */
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512i sum[8];
    UNROLL
    for (int i = 0; i < 2 * count; i++) sum[i] = _mm512_setzero_si512();
    int64_t c = 0;
    for (; c + 128 <= k; c += 128) {
        UNROLL
        for (int j = 0; j < 2; j++) {
            const __m512i value = _mm512_loadu_si512(w + c + j * 64);
            UNROLL
            for (int i = 0; i < count; i++) {
                const __m512i input = _mm512_xor_si512(_mm512_loadu_si512(x + i * k + c + j * 64), flip);
                sum[2 * i + j] = _mm512_dpbusd_epi32(sum[2 * i + j], input, value);
            }
        }
    }
    for (; c < k; c += 64) {
        const __mmask64 held = k - c < 64 ? ((__mmask64)1 << (k - c)) - 1 : ~(__mmask64)0;
        const __m512i value = _mm512_maskz_loadu_epi8(held, w + c);
        UNROLL
        for (int i = 0; i < count; i++) {
            const __m512i input = _mm512_xor_si512(_mm512_maskz_loadu_epi8(held, x + i * k + c), flip);
            sum[2 * i] = _mm512_dpbusd_epi32(sum[2 * i], input, value);
        }
    }
    UNROLL
    for (int i = 0; i < count; i++)
        found[i] = _mm512_reduce_add_epi32(_mm512_add_epi32(sum[2 * i], sum[2 * i + 1])) - 128 * row_sum;
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
/* Four products each of magnitudes with signed bytes, added to a sum. */
INLINE __m256i add_products(__m256i sum, __m256i magnitudes, __m256i signs_moved) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, magnitudes, signs_moved);
#else
    /* two products of at most 128 · 127 fit 16 bits */
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, signs_moved), _mm256_set1_epi16(1)));
#endif
}

/* The first `count` of 32 bytes, at most sixteen where not all; the others are zero. */
INLINE __m256i bytes_part(const int8_t *p, int64_t count) {
    if (count >= 32) return _mm256_loadu_si256((const __m256i *)p);
    int8_t held[16] = {0};
    if (count < 16) memcpy(held, p, (size_t)count);
    return _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128((const __m128i *)(count < 16 ? held : p)), 0);
}

INLINE void dot_int8(const int8_t *w, const int8_t *x, int64_t k, int32_t row_sum, const int count, int32_t *found) {
    (void)row_sum;
    __m256i sum[8];
    UNROLL
    for (int i = 0; i < 2 * count; i++) sum[i] = _mm256_setzero_si256();
    int64_t c = 0;
    for (; c + 64 <= k; c += 64) {
        UNROLL
        for (int j = 0; j < 2; j++) {
            const __m256i value = _mm256_loadu_si256((const __m256i *)(w + c + j * 32)), size = _mm256_abs_epi8(value);
            UNROLL
            for (int i = 0; i < count; i++) {
                const __m256i input = _mm256_loadu_si256((const __m256i *)(x + i * k + c + j * 32));
                sum[2 * i + j] = add_products(sum[2 * i + j], size, _mm256_sign_epi8(input, value));
            }
        }
    }
    while (c < k) {
        const __m256i value = bytes_part(w + c, k - c), size = _mm256_abs_epi8(value);
        UNROLL
        for (int i = 0; i < count; i++)
            sum[2 * i] = add_products(sum[2 * i], size, _mm256_sign_epi8(bytes_part(x + i * k + c, k - c), value));
        c += k - c >= 32 ? 32 : 16;
    }
    UNROLL
    for (int i = 0; i < count; i++) {
        const __m256i total = _mm256_add_epi32(sum[2 * i], sum[2 * i + 1]);
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
        const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
        found[i] = _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
    }
}
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
INLINE void dot_int8(const int8_t *w, const int8_t *x, int64_t k, int32_t row_sum, const int count, int32_t *found) {
    (void)row_sum;
    int32x4_t sum[4];
    UNROLL
    for (int i = 0; i < count; i++) sum[i] = vdupq_n_s32(0);
    int64_t c = 0;
    for (; c + 16 <= k; c += 16) {
        const int8x16_t value = vld1q_s8(w + c);
        UNROLL
        for (int i = 0; i < count; i++) sum[i] = vdotq_s32(sum[i], value, vld1q_s8(x + i * k + c));
    }
    UNROLL
    for (int i = 0; i < count; i++) {
        found[i] = vaddvq_s32(sum[i]);
        for (int64_t rest = c; rest < k; rest++) found[i] += (int32_t)w[rest] * x[i * k + rest];
    }
}
#else
INLINE void dot_int8(const int8_t *w, const int8_t *x, int64_t k, int32_t row_sum, const int count, int32_t *found) {
    (void)row_sum;
    for (int i = 0; i < count; i++) {
        int32_t sum = 0;
        for (int64_t c = 0; c < k; c++) sum += (int32_t)w[c] * x[i * k + c];
        found[i] = sum;
    }
}
#endif

#endif
