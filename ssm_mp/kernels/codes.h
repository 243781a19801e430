/* Packed codes of 4, 3 and 2 bits, and the levels that they stand for.
 *
 * Eight codes fill as many bytes as one has bits: a word, the first code in its lowest bits.
 */
#ifndef SSM_MP_CODES_H
#define SSM_MP_CODES_H

#include "register.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* A unit is 64 codes. Its eight words lie in the lanes of `WORDS` registers, and each turn shifts them by one code;
 * sixteen lanes hold the words twice, the second time without their first four codes. */
enum { UNIT = 64, WORDS = WIDTH >= 8 ? 1 : 2, TURNS = UNIT / WIDTH / WORDS };

/* The codes of a unit that its turns yield one after another. */
INLINE int64_t code_in_turn(int64_t place) {
    const int64_t lane = place % (WORDS * WIDTH), turn = place / (WORDS * WIDTH);
    return lane % 8 * 8 + lane / 8 * 4 + turn;
}

/* One of the two words of sixteen codes, with anything above it; nothing beyond them is read. */
INLINE uint32_t word_of_two(const uint8_t *p, const int bits, const int which) {
    uint32_t word = 0;
    memcpy(&word, p + which * (bits == 3 ? 2 : bits), bits == 2 ? 2 : 4);
    return bits == 3 ? word >> (which * 8) : word;
}

/* The words of a unit, with anything above their codes. */
INLINE void words_of(const uint8_t *p, const int bits, Integers words[WORDS]) {
#if defined(__AVX2__) || defined(__AVX512F__)
    __m256i eight;
    if (bits == 4) eight = _mm256_loadu_si256((const __m256i *)p);
    else if (bits == 2) eight = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    else {
        /* four words of three bytes from either half; the second is loaded so that nothing beyond the unit is read */
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)),
                                                     _mm_loadu_si128((const __m128i *)(p + 8)), 1);
        eight = _mm256_shuffle_epi8(both, _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
                                                           4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1));
    }
#if defined(__AVX512F__)
    const int further = 4 * bits;
    const Integers shift = {0, 0, 0, 0, 0, 0, 0, 0, further, further, further, further, further, further, further, further};
    words[0] = (Integers)_mm512_broadcast_i64x4(eight) >> shift;
#else
    words[0] = (Integers)eight;
#endif
#else
    uint32_t held[8];
    for (int i = 0; i < 8; i++) held[i] = word_of_two(p + i / 2 * 2 * bits, bits, i % 2);
    for (int i = 0; i < WORDS; i++) words[i] = *(const Integers *)(held + i * WIDTH);
#endif
}

/* The scales of a unit, from the first on, by lane of register `nth`: one, or one for each half. */
INLINE Register scales_of_unit(const float *scales, const int halves, const int nth) {
    const Register zero = {0}, first = scales[0] - zero;
    if (!halves) return first;
    const Register second = scales[1] - zero;
    if (WIDTH == 4) return nth ? second : first;
    Integers in_second;
    for (int i = 0; i < WIDTH; i++) in_second[i] = i % 8 < 4 ? 0 : -1;
    return choose(in_second, second, first);
}

/* WIDTH codes of sixteen, one a lane, with anything above them. */
INLINE Integers codes_in_order(const uint8_t *p, const int bits, const int piece) {
    Integers shift;
    for (int i = 0; i < WIDTH; i++) shift[i] = bits * ((piece * WIDTH + i) % 8);
#if defined(__AVX512F__)
    return (Integers)splat_words(word_of_two(p, bits, 0), word_of_two(p, bits, 1)) >> shift;
#else
    return ((Integers){0} + (int32_t)word_of_two(p, bits, piece * WIDTH / 8)) >> shift;
#endif
}

/* A single code; it may reach into the next byte. */
INLINE uint32_t code_at(const uint8_t *packed, int64_t at, const int bits) {
    const int64_t bit = at * bits;
    const uint32_t low = packed[bit / 8], high = bit % 8 + bits > 8 ? packed[bit / 8 + 1] : 0;
    return ((low | high << 8) >> (bit % 8)) & ((1u << bits) - 1);
}

/* Sixteen levels, ready to be looked up. Those of fewer bits are repeated, so that bits above a code do not matter. */
typedef struct {
#if defined(__AVX512F__)
    __m512i all;
#elif defined(__AVX2__)
    __m256 low, high;
#elif defined(__aarch64__)
    uint8x16x4_t bytes;
#else
    float all[16];
#endif
} Levels;

INLINE Levels repeated_levels(const float *levels, const int bits) {
    float held[16];
    for (int i = 0; i < 16; i++) held[i] = levels[i & ((1 << bits) - 1)];
    Levels found;
    memcpy(&found, held, sizeof held);
    return found;
}

/* The level of the code in the lowest bits of each lane. */
INLINE Register levels_at(const Levels *levels, Integers codes, const int bits) {
#if defined(__AVX512F__)
    (void)bits;
    return (Register)_mm512_permutexvar_ps((__m512i)codes, (__m512)levels->all);
#elif defined(__AVX2__)
    if (bits == 2) return (Register)_mm256_permutevar_ps(levels->low, (__m256i)codes);
    const __m256 low = _mm256_permutevar8x32_ps(levels->low, (__m256i)codes);
    if (bits == 3) return (Register)low;
    const __m256 high = _mm256_permutevar8x32_ps(levels->high, (__m256i)codes);
    return (Register)_mm256_blendv_ps(low, high, (__m256)(codes << 28)); /* by the sign: the code's highest bit */
#elif defined(__aarch64__)
    (void)bits;
    return (Register)vqtbl4q_u8(levels->bytes, (uint8x16_t)((codes & 15) * 0x04040404 + 0x03020100));
#else
    (void)bits;
    Register found;
    for (int i = 0; i < WIDTH; i++) found[i] = levels->all[codes[i] & 15];
    return found;
#endif
}

#endif
