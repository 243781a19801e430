/* As many floats at a time as one register holds.
 *
 * vector.h's sixteen are two or four registers where there is no AVX-512, and gcc then keeps every intermediate result
 * in memory, which makes a loop of products several times slower. What is here stays in registers.
 */
#ifndef SSM_MP_REGISTER_H
#define SSM_MP_REGISTER_H

#include "vector.h"
#if defined(__AVX__) && !defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
enum { PIECES = LANES / WIDTH };

typedef float Register __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));

/* Before a loop of a constant number of turns over arrays of registers, which are no arrays afterwards. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE Register get(const float *p) { return *(const Register *)p; }
INLINE void put(float *p, Register x) { *(Register *)p = x; }

/* Some of sixteen numbers, nearly always all of them. */
INLINE void copy_part(float *to, const float *from, int count) {
    if (count == LANES) memcpy(to, from, LANES * sizeof(float));
    else memcpy(to, from, count * sizeof(float));
}

/* The first `count`; the others are zero. */
INLINE Register get_part(const float *p, int64_t count) {
    if (count >= WIDTH) return get(p);
    float held[WIDTH] = {0};
    memcpy(held, p, count * sizeof(float));
    return get(held);
}

INLINE void put_part(float *p, Register x, int64_t count) {
    if (count >= WIDTH) {
        put(p, x);
        return;
    }
    float held[WIDTH];
    put(held, x);
    memcpy(p, held, count * sizeof(float));
}

INLINE Register choose(Integers where, Register yes, Register no) {
    return (Register)((where & (Integers)yes) | (~where & (Integers)no));
}

/* One instruction each where `choose` would be several. Of a NaN `x` the bound is left. */
#if defined(__AVX512F__)
INLINE Register larger(Register x, Register bound) { return (Register)_mm512_max_ps((__m512)x, (__m512)bound); }
INLINE Register smaller(Register x, Register bound) { return (Register)_mm512_min_ps((__m512)x, (__m512)bound); }
#elif defined(__AVX__)
INLINE Register larger(Register x, Register bound) { return (Register)_mm256_max_ps((__m256)x, (__m256)bound); }
INLINE Register smaller(Register x, Register bound) { return (Register)_mm256_min_ps((__m256)x, (__m256)bound); }
#else
INLINE Register larger(Register x, Register bound) { return choose(x > bound, x, bound); }
INLINE Register smaller(Register x, Register bound) { return choose(x < bound, x, bound); }
#endif

INLINE float total_of(Register x) {
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += x[i];
    return total;
}

/* The same in pairs: fewer steps, of which each waits for the one before. */
INLINE float sum_of(Register x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX__)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return (x[0] + x[1]) + (x[2] + x[3]);
#endif
}

/* 2^x, clamped to [2^−126, 2^127]; NaN stays NaN. The polynomial is that of `exp2_16`. */
INLINE Register exp2_of(Register x) {
    const Register zero = {0}, lowest = zero - 126.0f, highest = zero + 127.0f;
    x = choose(x < lowest, lowest, x);
    x = choose(x > highest, highest, x);
    const Register shifted = x + ROUNDING, f = x - (shifted - ROUNDING);
    Register p = f * 1.32646524e-3f + 9.67151132e-3f;
    p = p * f + 5.55073396e-2f;
    p = p * f + 2.40222421e-1f;
    p = p * f + 6.93146978e-1f;
    p = p * f + 1.0f;
    return (Register)((Integers)p + ((Integers)shifted << 23));
}

/* 2^x for x ≤ 0; below −126 it is 2^−126 or less. What `exp2_16` gives. */
INLINE Register decay_of(Register x) {
#if defined(__AVX512F__)
    return (Register)exp2_16((v16)x);
#else
    const Register zero = {0}, lowest = zero - 126.0f;
    x = choose(x < lowest, lowest, x);
    const Register shifted = x + ROUNDING, f = x - (shifted - ROUNDING);
    Register p = f * 1.32646524e-3f + 9.67151132e-3f;
    p = p * f + 5.55073396e-2f;
    p = p * f + 2.40222421e-1f;
    p = p * f + 6.93146978e-1f;
    p = p * f + 1.0f;
    return (Register)((Integers)p + ((Integers)shifted << 23));
#endif
}

/* 2^x for x ≤ 0, and nothing below 2^−64, which no sum of float32 numbers feels: products of smaller ones are denormal,
 * and CPUs take a hundred cycles for each multiplication of those. NaN stays NaN. */
INLINE Register vanishing_of(Register x) {
    const Register zero = {0};
    return choose(x < zero - 64.0f, zero, exp2_of(x));
}

/* e^x, clamped to what float32 holds, as in `exp16`. */
INLINE Register exp_of(Register x) {
    const Register zero = {0}, lowest = zero - 87.3f, highest = zero + 88.0f;
    x = choose(x < lowest, lowest, x);
    x = choose(x > highest, highest, x);
    const Register n = (x * LOG2_E + ROUNDING) - ROUNDING;
    Register r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Register p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (Register)((Integers)p + (__builtin_convertvector(n, Integers) << 23));
}

/* log x for positive normal x, as in `log16`. */
INLINE Register ln_of(Register x) {
    const Integers bits = (Integers)x, exponent = ((bits >> 23) & 0xff) - 126;
    const Register zero = {0};
    Register m = (Register)((bits & 0x007fffff) | 0x3f000000); /* [½, 1) */
    const Integers small = m < 0.707106781186547524f;
    const Register e = __builtin_convertvector(exponent, Register) + __builtin_convertvector(small, Register);
    m = m + choose(small, m, zero) - 1.0f;
    const Register square = m * m;
    Register p = m * 7.0376836292e-2f + -1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m + -1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m + -1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m + -2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    return m + (m * square * p + e * -2.12194440e-4f - square * 0.5f) + e * 0.693359375f;
}

/* log(1 + e^x), as in `softplus16`. */
INLINE Register softplus_of(Register x) {
    const Register zero = {0}, y = exp_of((Register)((Integers)x | INT32_MIN)); /* (0, 1] */
    const Register u = y + 1.0f, rest = u - 1.0f;
    const Integers lost = rest == zero;
    const Register log1p = choose(lost, y, ln_of(u) * (y / choose(lost, zero + 1.0f, rest)));
    return choose(x > zero, x, x - x) + log1p;
}

INLINE Register sigmoid_of(Register x) { return 1.0f / (exp_of(-x) + 1.0f); }
INLINE Register silu_of(Register x) { return x / (exp_of(-x) + 1.0f); }

#endif
