/* Products of 4-bit codes with inputs in 16-bit fixed point, where a register has too few lanes for sixteen float levels.
 *
 * A level is looked up as two bytes. Inputs are rounded once for all rows, in blocks of eight, each with its own step:
 * those eight whose products meet in one 32-bit sum of a unit.
 */
#ifndef SSM_MP_FIXED_H
#define SSM_MP_FIXED_H

#include "codes.h"

#if (defined(__AVX2__) && !defined(__AVX512F__)) || defined(__aarch64__)
#define HAS_FIXED 1

enum { MOST_FIXED = 16383 }; /* eight products of two such numbers fit 32 bits */
enum { BLOCKS = 8 };         /* of inputs, in a unit */

typedef float Floats8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Integers8 __attribute__((vector_size(32), aligned(4), may_alias));

/* A level is (low + 256 · high) · step. */
typedef struct {
    uint8_t low[16], high[16];
    float step;
} FixedLevels;

/* Levels that are small integers stay what they are; others are rounded. */
INLINE FixedLevels fixed_levels(const float *levels) {
    FixedLevels found;
    float largest = 0;
    int whole = 1;
    for (int i = 0; i < 16; i++) {
        const float size = levels[i] < 0 ? -levels[i] : levels[i];
        largest = size > largest ? size : largest;
        whole = whole && size <= MOST_FIXED && levels[i] == (float)(int)levels[i];
    }
    found.step = whole || largest == 0 ? 1.0f : largest / MOST_FIXED;
    for (int i = 0; i < 16; i++) {
        const float ratio = levels[i] / found.step;
        const int fixed = (int)((ratio + ROUNDING) - ROUNDING);
        found.low[i] = (uint8_t)(fixed & 255);
        found.high[i] = (uint8_t)(fixed >> 8 & 255);
    }
    return found;
}

/* Where the code of one nibble of byte `byte` of a half unit is summed up: its block in the half, ... */
INLINE int block_of(int byte) {
#if defined(__AVX2__)
    return byte % 8 / 2;
#else
    return byte % 4;
#endif
}

/* ... and where its input lies in the unit. */
INLINE int place_of(int half, int byte, int nibble) {
    const int vector = 2 * nibble + byte / 8;
#if defined(__AVX2__)
    return (vector * 2 + half) * 8 + byte % 8;
#else
    return (half * 4 + vector) * 8 + byte % 8;
#endif
}

/* A unit of inputs x [64] → fixed [64] and the blocks' steps [8]; of a block with an input that is not finite it is NaN. */
static __attribute__((noinline)) void fix_unit(const float *x, int16_t *fixed, float *steps) {
    Floats8 value[8], largest = {0}, poison = {0};
    int filled[BLOCKS] = {0}, places[8][BLOCKS];
    UNROLL
    for (int half = 0; half < 2; half++)
        UNROLL
        for (int byte = 0; byte < 16; byte++)
            UNROLL
            for (int nibble = 0; nibble < 2; nibble++) {
                const int block = half * 4 + block_of(byte), nth = filled[block]++;
                places[nth][block] = place_of(half, byte, nibble);
                value[nth][block] = x[half * 32 + byte * 2 + nibble];
            }
    for (int i = 0; i < 8; i++) {
        const Floats8 size = (Floats8)((Integers8)value[i] & INT32_MAX);
        const Integers8 more = size > largest;
        largest = (Floats8)((more & (Integers8)size) | (~more & (Integers8)largest));
        poison += value[i] * 0.0f;
    }
    Floats8 step = largest / (float)MOST_FIXED;
    const Integers8 tiny = step < 0x1p-126f; /* whose inverse may be infinite */
    const Floats8 least = (Floats8){0} + 0x1p-126f;
    step = (Floats8)((tiny & (Integers8)least) | (~tiny & (Integers8)step));
    const Floats8 inverse = 1.0f / step;
    *(Floats8 *)steps = step + poison;
    const Integers8 origin = (Integers8)((Floats8){0} + ROUNDING);
    for (int i = 0; i < 8; i++) {
        const Integers8 rounded = (Integers8)(value[i] * inverse + ROUNDING) - origin;
        for (int block = 0; block < BLOCKS; block++) fixed[places[i][block]] = (int16_t)rounded[block];
    }
}

#if defined(__AVX2__)
/* sum + the products of 16-bit numbers, two in each lane. */
INLINE __m256i add_pairs(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

/* A row of packed codes [k / 2 bytes] from place `first` of the matrix on, its groups of 2^group codes, half a unit where
 * `halves`, times `count` inputs laid out by `fix_unit`. */
INLINE void dot_fixed(const FixedLevels *levels, const uint8_t *packed, const float *scales, int64_t first, int64_t group,
                      const int halves, const int16_t *fixed, const float *steps, int64_t k, const int count,
                      float *found) {
    const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)levels->low));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)levels->high));
    const __m256i nibble = _mm256_set1_epi8(15);
    Register total[4] = {{0}};
    for (int64_t c = 0; c < k; c += UNIT) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(packed + c / 2));
        const __m256i even = _mm256_and_si256(bytes, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        const __m256i even_low = _mm256_shuffle_epi8(low, even), even_high = _mm256_shuffle_epi8(high, even);
        const __m256i odd_low = _mm256_shuffle_epi8(low, odd), odd_high = _mm256_shuffle_epi8(high, odd);
        const __m256i level[] = {
            _mm256_unpacklo_epi8(even_low, even_high), _mm256_unpackhi_epi8(even_low, even_high),
            _mm256_unpacklo_epi8(odd_low, odd_high), _mm256_unpackhi_epi8(odd_low, odd_high)};
        const Register scale = scales_of_unit(scales + ((first + c) >> group), halves, 0);
        UNROLL
        for (int i = 0; i < count; i++) {
            const __m256i *x = (const __m256i *)(fixed + i * k + c);
            __m256i sum = _mm256_madd_epi16(level[0], _mm256_loadu_si256(x));
            UNROLL
            for (int j = 1; j < 4; j++) sum = add_pairs(sum, level[j], _mm256_loadu_si256(x + j));
            total[i] += (Register)_mm256_cvtepi32_ps(sum) * (scale * get(steps + (i * k + c) / BLOCKS));
        }
    }
    UNROLL
    for (int i = 0; i < count; i++) found[i] = sum_of(total[i]) * levels->step;
}
#else
INLINE void dot_fixed(const FixedLevels *levels, const uint8_t *packed, const float *scales, int64_t first, int64_t group,
                      const int halves, const int16_t *fixed, const float *steps, int64_t k, const int count,
                      float *found) {
    const uint8x16_t low = vld1q_u8(levels->low), high = vld1q_u8(levels->high);
    Register total[4] = {{0}};
    for (int64_t c = 0; c < k; c += UNIT)
        UNROLL
        for (int half = 0; half < 2; half++) {
            const uint8x16_t bytes = vld1q_u8(packed + c / 2 + half * 16);
            const uint8x16_t even = vandq_u8(bytes, vdupq_n_u8(15)), odd = vshrq_n_u8(bytes, 4);
            const uint8x16_t even_low = vqtbl1q_u8(low, even), even_high = vqtbl1q_u8(high, even);
            const uint8x16_t odd_low = vqtbl1q_u8(low, odd), odd_high = vqtbl1q_u8(high, odd);
            const int16x8_t level[] = {(int16x8_t)vzip1q_u8(even_low, even_high), (int16x8_t)vzip2q_u8(even_low, even_high),
                                       (int16x8_t)vzip1q_u8(odd_low, odd_high), (int16x8_t)vzip2q_u8(odd_low, odd_high)};
            const float scale = scales[((first + c) >> group) + (halves ? half : 0)];
            UNROLL
            for (int i = 0; i < count; i++) {
                int32x4_t sum = vdupq_n_s32(0);
                UNROLL
                for (int j = 0; j < 4; j++) {
                    const int16x8_t x = vld1q_s16(fixed + i * k + c + (half * 4 + j) * 8);
                    sum = vmlal_s16(sum, vget_low_s16(level[j]), vget_low_s16(x));
                    sum = vmlal_high_s16(sum, level[j], x);
                }
                total[i] += (Register)vcvtq_f32_s32(sum) * (get(steps + (i * k + c) / BLOCKS + half * 4) * scale);
            }
        }
    UNROLL
    for (int i = 0; i < count; i++) found[i] = sum_of(total[i]) * levels->step;
}
#endif

#endif

#endif
