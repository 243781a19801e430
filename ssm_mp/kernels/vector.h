/* Sixteen floats at a time, in the vector extensions that gcc and clang share: one text for every CPU.
 *
 * Normal results do not depend on the width of the machine's registers, only on whether it fuses multiply and add.
 */
#ifndef SSM_MP_VECTOR_H
#define SSM_MP_VECTOR_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h> /* for conversions that compilers do one number after another */
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t v16i __attribute__((vector_size(64), aligned(4), may_alias));

INLINE v16 splat(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE v16 load(const float *p) { return *(const v16 *)p; }
INLINE void store(float *p, v16 x) { *(v16 *)p = x; }

/* The first `count` of sixteen; the others are zero. */
INLINE v16 load_part(const float *p, int count) {
    if (count == LANES) return load(p);
    float held[LANES] = {0};
    memcpy(held, p, count * sizeof(float));
    return load(held);
}

INLINE void store_part(float *p, v16 x, int count) {
    if (count == LANES) {
        store(p, x);
        return;
    }
    float held[LANES];
    store(held, x);
    memcpy(p, held, count * sizeof(float));
}

INLINE v16 select16(v16i where, v16 yes, v16 no) { return (v16)((where & (v16i)yes) | (~where & (v16i)no)); }
/* NaN stays NaN: it compares false, and the first operand is what is kept then. */
#if defined(__AVX512F__)
INLINE v16 at_least(v16 x, float bound) { return (v16)_mm512_max_ps((__m512)splat(bound), (__m512)x); }
INLINE v16 at_most(v16 x, float bound) { return (v16)_mm512_min_ps((__m512)splat(bound), (__m512)x); }
#else
INLINE v16 at_least(v16 x, float bound) { return select16(x < splat(bound), splat(bound), x); }
INLINE v16 at_most(v16 x, float bound) { return select16(x > splat(bound), splat(bound), x); }
#endif
INLINE v16 magnitude(v16 x) { return (v16)((v16i)x & 0x7fffffff); }

/* The first `count` of sixteen numbers that fit int8. */
INLINE void store_int8(int8_t *p, v16i x, int count) {
    int8_t held[LANES];
    int8_t *to = count == LANES ? p : held;
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)x));
#else
    for (int i = 0; i < LANES; i++) to[i] = (int8_t)x[i];
#endif
    if (count < LANES) memcpy(p, held, count);
}

/* Eight lanes of one word, then eight of another. */
INLINE v16i splat_words(uint32_t low, uint32_t high) {
    const int32_t a = (int32_t)low, b = (int32_t)high;
    return (v16i){a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
}

INLINE float sum16(v16 x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

INLINE float max16(v16 x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++)
        if (!(x[i] <= best)) best = x[i]; /* NaN wins */
    return best;
}

#define ROUNDING 12582912.0f /* 1.5 · 2^23: adding and taking it away rounds to the nearest integer, ties to even */

/* 2^x for x up to 127; below −126 it is 2^−126 or less. The polynomial is the best of degree 5 on [−½, ½]: error 1e−7. */
INLINE v16 exp2_16(v16 x) {
#if defined(__AVX512DQ__)
    const v16 f = (v16)_mm512_reduce_ps((__m512)x, 8); /* what rounding to the nearest integer leaves */
#else
    x = at_least(x, -126.0f);
    const v16 shifted = x + splat(ROUNDING);
    const v16 f = x - (shifted - splat(ROUNDING));
#endif
    v16 p = splat(1.32646524e-3f);
    p = p * f + splat(9.67151132e-3f);
    p = p * f + splat(5.55073396e-2f);
    p = p * f + splat(2.40222421e-1f);
    p = p * f + splat(6.93146978e-1f);
    p = p * f + splat(1.0f);
#if defined(__AVX512DQ__)
    return (v16)_mm512_scalef_ps((__m512)p, (__m512)(x - f));
#else
    return (v16)((v16i)p + ((v16i)shifted << 23));
#endif
}

#define LOG2_E 1.44269504088896341f

/* e^x, clamped to what float32 holds. */
INLINE v16 exp16(v16 x) {
    x = at_most(at_least(x, -87.3f), 88.0f);
    v16 n = (x * splat(LOG2_E) + splat(ROUNDING)) - splat(ROUNDING);
    /* ln 2 in two parts, so that x − n·ln 2 keeps all its digits (Cephes, expf) */
    v16 r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    v16 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    v16i exponent = __builtin_convertvector(n, v16i);
    return (v16)((v16i)p + (exponent << 23));
}

/* log x for positive normal x (Cephes, logf). */
INLINE v16 log16(v16 x) {
    v16i bits = (v16i)x;
    v16i exponent = ((bits >> 23) & 0xff) - 126;
    v16 m = (v16)((bits & 0x007fffff) | 0x3f000000); /* [½, 1) */
    v16i small = m < splat(0.707106781186547524f);
    v16 e = __builtin_convertvector(exponent, v16) + __builtin_convertvector(small, v16); /* a true lane is −1 */
    m = m + select16(small, m, splat(0.0f)) - splat(1.0f);
    v16 square = m * m;
    v16 p = splat(7.0376836292e-2f);
    p = p * m + splat(-1.1514610310e-1f);
    p = p * m + splat(1.1676998740e-1f);
    p = p * m + splat(-1.2420140846e-1f);
    p = p * m + splat(1.4249322787e-1f);
    p = p * m + splat(-1.6668057665e-1f);
    p = p * m + splat(2.0000714765e-1f);
    p = p * m + splat(-2.4999993993e-1f);
    p = p * m + splat(3.3333331174e-1f);
    v16 y = m * square * p + e * splat(-2.12194440e-4f) - square * splat(0.5f);
    return m + y + e * splat(0.693359375f);
}

/* log(1 + e^x), without overflow and without losing small results. */
INLINE v16 softplus16(v16 x) {
    v16 y = exp16(-magnitude(x)); /* (0, 1] */
    v16 u = y + splat(1.0f);
    v16 rest = u - splat(1.0f);
    /* what rounding took from 1 + y is put back by the quotient (Kahan) */
    v16 log1p = select16(rest == splat(0.0f), y, log16(u) * (y / select16(rest == splat(0.0f), splat(1.0f), rest)));
    return select16(x > splat(0.0f), x, x - x) + log1p;
}

INLINE v16 silu16(v16 x) { return x / (splat(1.0f) + exp16(-x)); }

#endif
