/* AVX-512, VNNI and AMX in plain C: those instructions that the kernels use, as Intel's manual defines them, for CPUs
 * that lack them. It stands in for the compiler's own header of this name.
 *
 * Lanes are computed in loops, so that a compiler may use whatever vectors the CPU has.
 */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define EMULATED static inline __attribute__((always_inline, unused))
#define EACH(lanes) for (int i = 0; i < (lanes); i++)

#if !defined(__AVX512F__)
#include_next <immintrin.h>

#include "avx_vnni.h"
#else

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef double __m512d __attribute__((vector_size(64), may_alias));
typedef int32_t __m512i __attribute__((vector_size(64), may_alias));
typedef float __m256 __attribute__((vector_size(32), may_alias));
typedef int32_t __m256i __attribute__((vector_size(32), may_alias));
typedef int32_t __m128i __attribute__((vector_size(16), may_alias));
typedef uint16_t __mmask16;
typedef uint64_t __mmask64;

/* Loads and stores of any alignment. */
EMULATED __m512i _mm512_loadu_si512(const void *from) {
    __m512i x;
    memcpy(&x, from, 64);
    return x;
}
EMULATED __m256i _mm256_loadu_si256(const void *from) {
    __m256i x;
    memcpy(&x, from, 32);
    return x;
}
EMULATED __m128i _mm_loadu_si128(const void *from) {
    __m128i x;
    memcpy(&x, from, 16);
    return x;
}
EMULATED void _mm512_storeu_si512(void *to, __m512i x) { memcpy(to, &x, 64); }
EMULATED void _mm256_storeu_si256(void *to, __m256i x) { memcpy(to, &x, 32); }
EMULATED void _mm_storeu_si128(void *to, __m128i x) { memcpy(to, &x, 16); }

/* What a mask leaves out is not read. */
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void *from) {
    __m512 x = {0};
    EACH(16) if (mask >> i & 1) memcpy((char *)&x + i * 4, (const char *)from + i * 4, 4);
    return x;
}
EMULATED __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void *from) {
    return (__m512i)_mm512_maskz_loadu_ps(mask, from);
}
EMULATED __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void *from) {
    int8_t held[64] = {0};
    EACH(64) if (mask >> i & 1) held[i] = ((const int8_t *)from)[i];
    return _mm512_loadu_si512(held);
}
EMULATED __m512i emulated_gather(__m512i at, const char *from, int scale) {
    __m512i x;
    EACH(16) memcpy((char *)&x + i * 4, from + (int64_t)at[i] * scale, 4);
    return x;
}
#define _mm512_i32gather_epi32(at, from, scale) emulated_gather(at, (const char *)(from), scale)

EMULATED __m512i _mm512_set1_epi32(int x) { return (__m512i){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
EMULATED __m512i _mm512_set1_epi8(char x) { return _mm512_set1_epi32((int)((uint8_t)x * 0x01010101u)); }
EMULATED __m512i _mm512_setzero_si512(void) { return _mm512_set1_epi32(0); }
EMULATED __m512d _mm512_set1_pd(double x) { return (__m512d){x, x, x, x, x, x, x, x}; }
#define _mm512_setr_epi32(...) ((__m512i){__VA_ARGS__})

EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
EMULATED __m512i _mm512_srli_epi32(__m512i a, int by) {
    EACH(16) a[i] = by < 32 ? (int32_t)((uint32_t)a[i] >> by) : 0;
    return a;
}
EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    EACH(16) a[i] = (int32_t)((uint32_t)a[i] + (uint32_t)b[i]);
    return a;
}
EMULATED __m512i _mm512_mullo_epi32(__m512i a, __m512i b) {
    EACH(16) a[i] = (int32_t)((uint32_t)a[i] * (uint32_t)b[i]);
    return a;
}
EMULATED int _mm512_reduce_add_epi32(__m512i a) {
    uint32_t sum = 0;
    EACH(16) sum += (uint32_t)a[i];
    return (int)sum;
}
/* Two products of words of 16 bits are added to each other. */
EMULATED __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
    int16_t x[32], y[32];
    __m512i sums;
    memcpy(x, &a, 64);
    memcpy(y, &b, 64);
    EACH(16) sums[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return sums;
}
/* Four products of unsigned with signed bytes are added to each sum, without saturation. */
EMULATED __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    uint8_t x[64];
    int8_t y[64];
    memcpy(x, &a, 64);
    memcpy(y, &b, 64);
    EACH(16) {
        int32_t four = 0;
        for (int j = 0; j < 4; j++) four += x[4 * i + j] * y[4 * i + j];
        sum[i] = (int32_t)((uint32_t)sum[i] + (uint32_t)four);
    }
    return sum;
}

EMULATED __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
/* Its rounding is its own: it is not fused with a sum. */
enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8 };
EMULATED __m512 _mm512_mul_round_ps(__m512 a, __m512 b, int how) {
    if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
    a = a * b;
    __asm__("" : "+m"(a));
    return a;
}
EMULATED __m512d _mm512_add_pd(__m512d a, __m512d b) { return a + b; }
EMULATED __m512d _mm512_mul_pd(__m512d a, __m512d b) { return a * b; }
/* The second operand where one is NaN, or both are zero. */
EMULATED float emulated_max(float a, float b) { return a > b ? a : b; }
EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) {
    EACH(16) a[i] = emulated_max(a[i], b[i]);
    return a;
}
EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) {
    EACH(16) a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
}
/* Upper half with lower half, and so on: the order of gcc and clang. */
EMULATED float _mm512_reduce_add_ps(__m512 a) {
    for (int half = 8; half > 0; half /= 2) EACH(half) a[i] = a[i + half] + a[i];
    return a[0];
}
EMULATED float _mm512_reduce_max_ps(__m512 a) {
    for (int half = 8; half > 0; half /= 2) EACH(half) a[i] = emulated_max(a[i + half], a[i]);
    return a[0];
}
EMULATED double _mm512_reduce_add_pd(__m512d a) {
    for (int half = 4; half > 0; half /= 2) EACH(half) a[i] = a[i + half] + a[i];
    return a[0];
}

enum { _CMP_LT_OQ = 0x11, _CMP_GT_OQ = 0x1e };
EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
    __mmask16 mask = 0;
    if (how != _CMP_LT_OQ && how != _CMP_GT_OQ) __builtin_trap();
    EACH(16) mask |= (__mmask16)((how == _CMP_LT_OQ ? a[i] < b[i] : a[i] > b[i]) << i);
    return mask;
}
EMULATED __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 of, __m512 a, __m512 b, int how) {
    return of & _mm512_cmp_ps_mask(a, b, how);
}

EMULATED __m512 _mm512_permutexvar_ps(__m512i at, __m512 from) {
    __m512 x;
    EACH(16) x[i] = from[at[i] & 15];
    return x;
}
EMULATED __m512i _mm512_broadcast_i64x4(__m256i a) {
    __m512i x;
    memcpy(&x, &a, 32);
    memcpy((char *)&x + 32, &a, 32);
    return x;
}
EMULATED __m256i _mm256_castsi128_si256(__m128i a) {
    __m256i x = {0}; /* the upper half may be anything */
    memcpy(&x, &a, 16);
    return x;
}
EMULATED __m256i _mm256_inserti128_si256(__m256i a, __m128i b, int half) {
    memcpy((char *)&a + half * 16, &b, 16);
    return a;
}
#define _mm256_setr_epi8(...) _mm256_loadu_si256((const int8_t[32]){__VA_ARGS__})
/* Each half's bytes by the index in that half; zero where its highest bit is set. */
EMULATED __m256i _mm256_shuffle_epi8(__m256i a, __m256i by) {
    int8_t from[32], at[32], found[32];
    memcpy(from, &a, 32);
    memcpy(at, &by, 32);
    EACH(32) found[i] = at[i] < 0 ? 0 : from[i / 16 * 16 + (at[i] & 15)];
    return _mm256_loadu_si256(found);
}
EMULATED __m256i _mm256_cvtepu16_epi32(__m128i a) {
    typedef uint16_t words __attribute__((vector_size(16)));
    return __builtin_convertvector((words)a, __m256i);
}
EMULATED __m256 _mm512_castps512_ps256(__m512 a) {
    __m256 x;
    memcpy(&x, &a, 32);
    return x;
}
EMULATED __m256 _mm512_extractf32x8_ps(__m512 a, int half) {
    __m256 x;
    memcpy(&x, (char *)&a + half * 32, 32);
    return x;
}

EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) { return __builtin_convertvector(a, __m512); }
EMULATED __m512d _mm512_cvtps_pd(__m256 a) { return __builtin_convertvector(a, __m512d); }
EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) {
    typedef int8_t bytes __attribute__((vector_size(16)));
    return __builtin_convertvector((bytes)a, __m512i);
}
EMULATED __m128i _mm512_cvtepi32_epi8(__m512i a) {
    int8_t held[16];
    EACH(16) held[i] = (int8_t)a[i];
    return _mm_loadu_si128(held);
}
EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
    int16_t held[16];
    EACH(16) held[i] = (int16_t)a[i];
    return _mm256_loadu_si256(held);
}
EMULATED float _cvtsh_ss(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    const float small = (float)fraction * 0x1p-24f; /* exponent 0 */
    uint32_t bits = (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    if (exponent == 31 && fraction) bits |= 1u << 22; /* NaN becomes quiet */
    if (exponent == 0) memcpy(&bits, &small, 4);
    bits |= sign;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
    uint16_t held[16];
    __m512 x;
    memcpy(held, &a, 32);
    EACH(16) x[i] = _cvtsh_ss(held[i]);
    return x;
}

/* What rounding to the nearest integer leaves; nothing of an infinite number. */
EMULATED __m512 _mm512_reduce_ps(__m512 a, int how) {
    if (how != 8) __builtin_trap();
    EACH(16) a[i] = __builtin_isinf(a[i]) ? 0.0f : a[i] - __builtin_rintf(a[i]);
    return a;
}
/* a · 2^⌊b⌋. */
EMULATED float emulated_scalef(float a, float b) {
    if (a != a || b != b) return a + b;
    if (__builtin_isinf(b)) {
        if (b > 0) return a == 0.0f ? NAN : copysignf(INFINITY, a);
        return __builtin_isinf(a) ? NAN : copysignf(0.0f, a);
    }
    const float whole = floorf(b), bounded = whole < -500.0f ? -500.0f : whole > 500.0f ? 500.0f : whole;
    const uint64_t bits = (uint64_t)((int64_t)bounded + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return (float)((double)a * power); /* rounded once: the product is exact */
}
EMULATED __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
    EACH(16) a[i] = emulated_scalef(a[i], b[i]);
    return a;
}

#if defined(__AMX_TILE__)
#include "amx.h"
#endif

#endif

#undef EACH
#endif
