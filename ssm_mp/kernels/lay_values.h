/* Stored values as float32, columns of them: each value of 64 outputs side by side, as products of many inputs read a
 * panel of a weight.
 *
 * Codes and float16 values are laid out as the numbers that they stand for; int8 values without their scale.
 */
#ifndef SSM_MP_LAY_VALUES_H
#define SSM_MP_LAY_VALUES_H

#include "matrix.h"
#include "transpose.h"
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { PANEL = 64 };

/* A panel in strips, one after another: of each column `outputs` values side by side. */
typedef struct {
    int64_t outputs, bytes;
} Strips;

/* Where a column's values of a panel's outputs from `first` on go. */
INLINE float *place_in(const Strips *strips, int8_t *panel, int64_t column, int64_t first) {
    return (float *)(panel + first / strips->outputs * strips->bytes) + column * strips->outputs + first % strips->outputs;
}

typedef struct {
    Register piece[PIECES];
} Sixteen;

/* A register of float16 numbers. */
INLINE Register lay_half(const uint16_t *p) {
#if defined(__AVX512F__)
    return (Register)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (Register)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
    const Integers bits = __builtin_convertvector(*(const Halves *)p, Integers);
    /* exponent and fraction in their new places, then the exponent's other bias by an exact product */
    return (Register)((Integers)((Register)((bits & 0x7fff) << 13) * 0x1p112f) | ((bits & 0x8000) << 16));
#endif
}

/* A register of int8 numbers. */
INLINE Register lay_byte(const int8_t *p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Register)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    typedef int8_t Bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
    return __builtin_convertvector(__builtin_convertvector(*(const Bytes *)p, Integers), Register);
#endif
}

/* Sixteen values from `at` on, which is theirs in the array, of a kind that takes a whole number of bytes each. */
INLINE Sixteen lay_whole(int64_t kind, const void *at) {
    Sixteen found;
    UNROLL
    for (int p = 0; p < PIECES; p++)
        found.piece[p] = kind == FLOAT16 ? lay_half((const uint16_t *)at + p * WIDTH)
                         : kind == INT8  ? lay_byte((const int8_t *)at + p * WIDTH)
                                         : get((const float *)at + p * WIDTH);
    return found;
}

/* Where the levels of codes lie, in registers. */
typedef struct {
#if defined(__AVX512F__)
    Register all;
#elif defined(__AVX2__)
    __m256 low, high;
#elif defined(__aarch64__)
    uint8x16x4_t bytes;
#else
    const float *at;
#endif
} Levels;

INLINE Levels levels_of(const Matrix *w) {
#if defined(__AVX512F__)
    return (Levels){get(w->levels)};
#elif defined(__AVX2__)
    return (Levels){_mm256_loadu_ps(w->levels), _mm256_loadu_ps(w->levels + 8)};
#elif defined(__aarch64__)
    Levels found;
    for (int i = 0; i < 4; i++) found.bytes.val[i] = vreinterpretq_u8_f32(vld1q_f32(w->levels + 4 * i));
    return found;
#else
    return (Levels){w->levels};
#endif
}

/* The level of each code. `bits`: of the largest one. */
INLINE Register lay_levels(const Levels *levels, Integers codes, const int bits) {
#if defined(__AVX512F__)
    (void)bits;
    return (Register)_mm512_permutexvar_ps((__m512i)codes, (__m512)levels->all);
#elif defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps(levels->low, (__m256i)codes);
    if (bits < 4) return (Register)low;
    /* the fourth bit as a sign chooses the other half */
    const __m256 high = _mm256_permutevar8x32_ps(levels->high, (__m256i)codes);
    return (Register)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
#elif defined(__aarch64__)
    (void)bits; /* the four bytes of each level */
    const Integers bytes = codes * 0x04040404 + 0x03020100;
    return (Register)vreinterpretq_f32_u8(vqtbl4q_u8(levels->bytes, (uint8x16_t)bytes));
#else
    (void)bits;
    Register found;
    for (int i = 0; i < WIDTH; i++) found[i] = levels->at[codes[i]];
    return found;
#endif
}

/* Sixteen codes: bytes of a number of them that has no type are put together, since copying them would wait for memory. */
INLINE uint64_t lay_word(const uint8_t *p, const int bits) {
    uint32_t low;
    memcpy(&low, p, 4);
    if (bits == 2) return low;
    if (bits == 3) return low | (uint64_t)(p[4] | p[5] << 8) << 32;
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

/* The codes of piece `p` of sixteen, the first one in the lowest bits of `word`. */
INLINE Integers lay_codes(uint64_t word, const int bits, const int p) {
    Integers shift, low, last;
    const int32_t first = (int32_t)(uint32_t)(word >> (p * WIDTH * bits)), second = (int32_t)(uint32_t)(word >> 8 * bits);
    UNROLL
    for (int i = 0; i < WIDTH; i++) { /* constants, but of `first` and `second` */
        shift[i] = i % 8 * bits;
        low[i] = first;
        last[i] = i < 8 ? first : second;
    }
    return ((WIDTH == LANES ? last : low) >> shift) & ((1 << bits) - 1);
}

/* A single value of a code, scale included; the code may reach into the next byte. */
INLINE float lay_code(const Matrix *w, const int bits, int64_t at) {
    const uint8_t *packed = w->values;
    const int64_t bit = at * bits;
    const uint32_t low = packed[bit / 8], next = bit % 8 + bits > 8 ? packed[bit / 8 + 1] : 0;
    return w->levels[((low | next << 8) >> (bit % 8)) & ((1u << bits) - 1)] * w->scales[at >> w->group_bits];
}

INLINE int lay_bits(int64_t kind) { return kind == CODES4 ? 4 : kind == CODES3 ? 3 : 2; }

/* Columns `c` … `c` + 15 of a row; zeros beyond the matrix. */
INLINE Sixteen lay_row(const Matrix *w, const int64_t kind, const Levels *levels, int64_t row, int64_t c) {
    const int64_t at = row * w->k + c, count = row < w->n ? w->k - c : 0;
    float held[LANES] = {0};
    if (kind >= CODES4) {
        const int bits = lay_bits(kind);
        if (count < LANES || at % LANES != 0) {
            for (int64_t i = 0; i < count && i < LANES; i++) held[i] = lay_code(w, bits, at + i);
            return lay_whole(FLOAT32, held);
        }
        Sixteen found;
        const uint64_t word = lay_word((const uint8_t *)w->values + at * bits / 8, bits);
        const float scale = w->scales[at >> w->group_bits];
        UNROLL
        for (int p = 0; p < PIECES; p++) found.piece[p] = lay_levels(levels, lay_codes(word, bits, p), bits) * scale;
        return found;
    }
    const int64_t size = kind == FLOAT32 ? 4 : kind == FLOAT16 ? 2 : 1;
    const void *from = (const char *)w->values + at * size;
    if (count >= LANES) return lay_whole(kind, from);
    if (count > 0) memcpy(held, from, count * size);
    return lay_whole(kind, held);
}

/* Columns `c` … `c` + 15 of a panel → columns `at` … `at` + 15 there. */
INLINE void lay_columns_of(const Matrix *w, const int64_t kind, int64_t panel, int64_t c, const Strips *strips, int8_t *to,
                           int64_t at) {
    const Levels levels = kind >= CODES4 ? levels_of(w) : (Levels){0};
    for (int64_t first = 0; first < PANEL; first += WIDTH) {
        Register held[PIECES][WIDTH];
        UNROLL
        for (int i = 0; i < WIDTH; i++) {
            const Sixteen values = lay_row(w, kind, &levels, panel * PANEL + first + i, c);
            UNROLL
            for (int p = 0; p < PIECES; p++) held[p][i] = values.piece[p];
        }
        UNROLL
        for (int p = 0; p < PIECES; p++) {
            transpose(held[p]);
            UNROLL
            for (int i = 0; i < WIDTH; i++) put(place_in(strips, to, at + p * WIDTH + i, first), held[p][i]);
        }
    }
}

static __attribute__((noinline)) void lay_columns(const Matrix *w, int64_t panel, int64_t c, const Strips *strips, int8_t *to,
                                                  int64_t at) {
    switch (w->kind) {
    case FLOAT32: lay_columns_of(w, FLOAT32, panel, c, strips, to, at); return;
    case FLOAT16: lay_columns_of(w, FLOAT16, panel, c, strips, to, at); return;
    case INT8: lay_columns_of(w, INT8, panel, c, strips, to, at); return;
    case CODES4: lay_columns_of(w, CODES4, panel, c, strips, to, at); return;
    case CODES3: lay_columns_of(w, CODES3, panel, c, strips, to, at); return;
    default: lay_columns_of(w, CODES2, panel, c, strips, to, at);
    }
}

#endif
