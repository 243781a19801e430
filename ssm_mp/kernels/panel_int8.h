/* Products of int8 inputs with a panel of int8 weights, exact in int32: the same numbers on every CPU.
 *
 * Words hold four values where the CPU has an instruction that sums four products; it multiplies unsigned with signed
 * numbers on x86, where inputs are therefore 128 higher, and 128 · the sum of each row of weights is taken away again.
 * Elsewhere they hold two values of 16 bits, for an instruction that sums two products; or there is none, and integers
 * are multiplied as floats.
 */
#ifndef SSM_MP_PANEL_INT8_H
#define SSM_MP_PANEL_INT8_H

#include "panel_float.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* Values of a word; what is added to inputs; and sums + the products in each word. */
#if defined(HAS_VNNI)
enum { PER_WORD = 4, HIGHER = 128 };
INLINE Integers add_products(Integers sums, Integers inputs, Integers weights) {
    return (Integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)inputs, (__m512i)weights);
}
#elif defined(__AVX512BW__)
enum { PER_WORD = 2, HIGHER = 0 };
INLINE Integers add_products(Integers sums, Integers inputs, Integers weights) {
    return sums + (Integers)_mm512_madd_epi16((__m512i)inputs, (__m512i)weights);
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
enum { PER_WORD = 4, HIGHER = 128 };
INLINE Integers add_products(Integers sums, Integers inputs, Integers weights) {
    return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)inputs, (__m256i)weights);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
enum { PER_WORD = 2, HIGHER = 0 };
INLINE Integers add_products(Integers sums, Integers inputs, Integers weights) {
    return sums + (Integers)_mm256_madd_epi16((__m256i)inputs, (__m256i)weights);
}
#elif defined(__SSE2__) && !defined(__AVX__)
enum { PER_WORD = 2, HIGHER = 0 };
INLINE Integers add_products(Integers sums, Integers inputs, Integers weights) {
    return sums + (Integers)_mm_madd_epi16((__m128i)inputs, (__m128i)weights);
}
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
enum { PER_WORD = 4, HIGHER = 0 };
INLINE Integers add_products(Integers sums, Integers inputs, Integers weights) {
    return (Integers)vdotq_s32((int32x4_t)sums, (int8x16_t)inputs, (int8x16_t)weights);
}
#else
enum { PER_WORD = 1, HIGHER = 0 };
INLINE Integers add_products(Integers sums, Integers inputs, Integers weights) { return sums + inputs * weights; }
#endif

/* The word of each of a register's rows from `row` on that holds four values from column `c` on, and those of the words
 * after it, as many as rows; zeros beyond the matrix. */
INLINE void lay_words(const Matrix *w, int64_t row, int64_t c, Register words[WIDTH]) {
    UNROLL
    for (int i = 0; i < WIDTH; i++) {
        const int64_t left = row + i < w->n ? w->k - c : 0;
        const int8_t *at = (const int8_t *)w->values + (row + i) * w->k + c;
        int8_t held[4 * WIDTH] = {0};
        if (left < 4 * WIDTH) {
            if (left > 0) memcpy(held, at, left);
            at = held;
        }
        memcpy(&words[i], at, 4 * WIDTH);
    }
    transpose(words);
}

/* Words of four values as two words of two: the first ones, and the last ones. */
INLINE Integers first_two(Integers four) { return (((four << 24) >> 24) & 0xffff) | (((four << 16) >> 8) & ~0xffff); }
INLINE Integers last_two(Integers four) { return (((four << 8) >> 24) & 0xffff) | ((four >> 8) & ~0xffff); }

/* A panel; words are of four values each for AMX, which takes signed ones. */
static void lay_int8_panel(const Plan *plan, int64_t panel, int8_t *to) {
    const int per_word = plan->way == BY_AMX ? 4 : PER_WORD;
    const Strips strips = strips_of(plan);
    for (int64_t c = 0; c < plan->words * per_word; c += 4 * WIDTH)
        for (int64_t first = 0; first < PANEL; first += WIDTH) {
            Register words[WIDTH];
            const int64_t word = c / per_word;
            lay_words(plan->of, panel * PANEL + first, c, words);
            for (int i = 0; i < WIDTH; i++) {
                if (per_word == 4 && word + i < plan->words) put(place_in(&strips, to, word + i, first), words[i]);
                if (per_word == 4 || word + 2 * i >= plan->words) continue;
                put(place_in(&strips, to, word + 2 * i, first), (Register)first_two((Integers)words[i]));
                put(place_in(&strips, to, word + 2 * i + 1, first), (Register)last_two((Integers)words[i]));
            }
        }
}

/* What sums begin with: what higher inputs add is taken away. */
INLINE Integers offset_of(const Matrix *w, int64_t column) {
    const int64_t left = w->n - column;
    const Integers none = {0};
    if (HIGHER == 0 || left <= 0) return none;
    return (Integers)get_part((const float *)w->sums + column, left) * -HIGHER;
}

/* `float_tile` of integers; `column`: the first output. */
static __attribute__((noinline)) void int8_tile(const Matrix *w, int64_t column, const int8_t *weights,
                                                const int8_t *const x[TALL], int64_t from, int64_t until, int32_t *to) {
    Integers sums[TALL][WIDE];
    UNROLL
    for (int v = 0; v < WIDE; v++) {
        const Integers offset = offset_of(w, column + v * WIDTH);
        UNROLL
        for (int i = 0; i < TALL; i++)
            sums[i][v] = from ? (Integers)get((const float *)to + i * PANEL + v * WIDTH) : offset;
    }
    for (int64_t word = from; word < until; word++) {
        Integers held[WIDE];
        UNROLL
        for (int v = 0; v < WIDE; v++) held[v] = (Integers)get((const float *)weights + word * WIDE * WIDTH + v * WIDTH);
        UNROLL
        for (int i = 0; i < TALL; i++) {
            int32_t values;
            memcpy(&values, x[i] + 4 * word, 4);
            UNROLL
            for (int v = 0; v < WIDE; v++) sums[i][v] = add_products(sums[i][v], (Integers){0} + values, held[v]);
        }
    }
    UNROLL
    for (int i = 0; i < TALL; i++)
        UNROLL
        for (int v = 0; v < WIDE; v++) put((float *)to + i * PANEL + v * WIDTH, (Register)sums[i][v]);
}

/* x [k] in integers of one scale as a row of inputs; a value that is not finite makes `poison` NaN. */
static void lay_integers(const Plan *plan, const float *x, float scale, int8_t *to, float *poison) {
    enum { SOME = 256 };
    const int64_t k = plan->of->k;
    if (plan->way == BY_AMX || PER_WORD == 4) {
        quantize_row(x, k, scale, plan->way == BY_AMX ? 0 : HIGHER, to, poison);
        memset(to + k, 0, input_bytes(plan) - k);
        return;
    }
    int8_t held[SOME];
    for (int64_t c = 0; c < k; c += SOME) {
        const int64_t count = k - c < SOME ? k - c : SOME;
        quantize_row(x + c, count, scale, 0, held, poison);
        for (int64_t i = 0; i < count; i++) {
            if (PER_WORD == 2) ((int16_t *)to)[c + i] = held[i];
            else ((float *)to)[c + i] = held[i];
        }
    }
    memset(to + k * (4 / PER_WORD), 0, input_bytes(plan) - k * (4 / PER_WORD));
}

#endif
