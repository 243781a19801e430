/* Stored floats and int8 values as registers of float32. */
#ifndef SSM_MP_STORED_H
#define SSM_MP_STORED_H

#include "matrix.h"
#include "register.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* WIDTH float16 numbers as float32. */
INLINE Register from_half(const uint16_t *p) {
#if defined(__AVX512F__)
    return (Register)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (Register)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
    return (Register)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));
    const Integers bits = __builtin_convertvector(*(const Halves *)p, Integers), size = bits & 0x7fff;
    /* exponent and fraction in their new places, then the exponent's other bias by an exact product */
    const Register finite = (Register)(size << 13) * 0x1p112f;
    const Integers not_finite = (size >= 0x7c00) & 0x7f800000;
    return (Register)((Integers)finite | not_finite | (bits & 0x8000) << 16);
#endif
}

/* WIDTH int8 numbers as float32. */
INLINE Register from_int8(const int8_t *p) {
#if defined(__AVX512F__)
    return (Register)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (Register)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    typedef int8_t Bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
    return __builtin_convertvector(*(const Bytes *)p, Register);
#endif
}

/* WIDTH stored values from place `at` on, without their scale. */
INLINE Register stored(const int kind, const void *values, int64_t at) {
    if (kind == FLOAT16) return from_half((const uint16_t *)values + at);
    if (kind == INT8) return from_int8((const int8_t *)values + at);
    return get((const float *)values + at);
}

/* The first `count` of them, if any; the others are zero. */
INLINE Register stored_part(const int kind, const void *values, int64_t at, int64_t count) {
    static const int bytes[] = {4, 2, 1};
    if (count >= WIDTH) return stored(kind, values, at);
    float held[WIDTH] = {0};
    if (count <= 0) return get(held);
    memcpy(held, (const char *)values + at * bytes[kind], (size_t)(count * bytes[kind]));
    return stored(kind, held, 0);
}

#endif
