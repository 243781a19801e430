/* A tile of the product of many inputs with a weight: up to 32 inputs by a panel of 64 outputs.
 *
 * Integers are multiplied by VNNI or AMX, exactly. Float16 weights are multiplied by AMX in bfloat16 pieces: a float32
 * number is the sum of three of them, a float16 number of two, and of the six products the smallest is left out: at the
 * most 2^-22 of the product, about as much as float32 rounds. (AMX takes numbers below 2^-126 for zero: inputs below
 * 1e-33 lose digits.)
 *
 * Values of one output lie in words of four bytes, the same word of 64 outputs side by side: four int8 values, or two
 * bfloat16 ones. Inputs lie row after row.
 */
#ifndef SSM_MP_TILES_H
#define SSM_MP_TILES_H

#include "matrix.h"
#include "quantize.h"

#if defined(HAS_VNNI) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef HAS_VNNI

enum { WIDE = 4, PANEL = WIDE * LANES, TALL = 32, FEW_TALL = 6, AMX_WORDS = 16 };

/* Whether the system lets this process use AMX's registers, which it has to ask for (Linux, Documentation/x86/xstate). */
static int amx_allowed(void) {
#ifdef HAS_AMX
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    static int known; /* 0: not asked yet; threads that ask at once get the same answer */
    if (known == 0) known = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? 1 : -1;
    return known > 0;
#else
    return 0;
#endif
}

/* How a matrix is multiplied. */
typedef struct {
    const Matrix *of;
    int amx;
    int64_t words;          /* of a row, padded */
    int input_pieces, weight_pieces;
    int tall;               /* inputs of a tile */
} Plan;

static Plan plan_of(const Matrix *w) {
    const int amx = amx_allowed(), floats = w->kind == FLOAT16;
    const int64_t words = floats ? (w->k + 1) / 2 : (w->k + 3) / 4;
    const int64_t padded = amx ? (words + AMX_WORDS - 1) / AMX_WORDS * AMX_WORDS : words;
    return (Plan){w, amx, padded, floats ? 3 : 1, floats ? 2 : 1, amx ? TALL : FEW_TALL};
}

INLINE int64_t panel_bytes(const Plan *plan) { return plan->words * PANEL * 4 * plan->weight_pieces; }
INLINE int64_t input_bytes(const Plan *plan) { return plan->words * 4; } /* of one piece of one input */

/* The word of each of sixteen rows from `row` on that holds the values from column `c` on; zeros beyond the matrix. */
INLINE __m512i words_of_rows(const Matrix *w, int64_t row, int64_t c) {
    const int size = w->kind == FLOAT16 ? 2 : 1, per_word = 4 / size;
    const int8_t *values = (const int8_t *)w->values + (row * w->k + c) * size;
    if (row + LANES <= w->n && c + per_word <= w->k) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_i32gather_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)w->k * size)), values, 1);
    }
    int8_t held[LANES][4] = {{0}};
    const int64_t left = (w->k - c) * size;
    if (left > 0)
        for (int i = 0; i < LANES && row + i < w->n; i++) memcpy(held[i], values + i * w->k * size, left < 4 ? left : 4);
    return _mm512_loadu_si512(held);
}

/* Pairs of float16 numbers → pairs of the bfloat16 numbers that are their first bits, and of the rest. */
INLINE void split_halves(__m512i pairs, __m512i *first, __m512i *rest) {
    const __m512i top = _mm512_set1_epi32((int)0xffff0000);
    const __m512i low = (__m512i)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    const __m512i high = (__m512i)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
    const __m512i low_first = _mm512_and_si512(low, top), high_first = _mm512_and_si512(high, top);
    const __m512i low_rest = (__m512i)_mm512_sub_ps((__m512)low, (__m512)low_first);
    const __m512i high_rest = (__m512i)_mm512_sub_ps((__m512)high, (__m512)high_first);
    *first = _mm512_or_si512(_mm512_srli_epi32(low_first, 16), high_first);
    *rest = _mm512_or_si512(_mm512_srli_epi32(low_rest, 16), _mm512_and_si512(high_rest, top));
}

/* One panel of weights as the products read it: each piece [words][64] words. */
static void pack_panel(const Plan *plan, int64_t panel, int8_t *to) {
    const Matrix *w = plan->of;
    const int per_word = w->kind == FLOAT16 ? 2 : 4;
    for (int64_t word = 0; word < plan->words; word++)
        for (int v = 0; v < WIDE; v++) {
            int8_t *at = to + (word * WIDE + v) * 64;
            const __m512i held = words_of_rows(w, panel * PANEL + v * LANES, word * per_word);
            if (w->kind == INT8) {
                _mm512_storeu_si512(at, held);
                continue;
            }
            __m512i first, rest;
            split_halves(held, &first, &rest);
            _mm512_storeu_si512(at, first);
            _mm512_storeu_si512(at + plan->words * PANEL * 4, rest);
        }
}

/* Float32 numbers x [k] → three bfloat16 pieces, whose sum is the number; zeros up to the padded length, which fills
 * whole vectors. */
static void split_input(const Plan *plan, const float *x, int8_t *to, int64_t to_next) {
    const __m512i top = _mm512_set1_epi32((int)0xffff0000);
    for (int64_t c = 0; c < plan->words * 2; c += LANES) {
        const int64_t left = plan->of->k - c;
        const __mmask16 there = left >= LANES ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
        __m512 rest = _mm512_maskz_loadu_ps(there, x + c);
        for (int piece = 0; piece < 3; piece++) {
            const __m512 part = (__m512)_mm512_and_si512((__m512i)rest, top);
            _mm256_storeu_si256((__m256i *)(to + piece * to_next + c * 2),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)part, 16)));
            rest = _mm512_sub_ps(rest, part);
        }
    }
}

/* `rows` inputs as the products read them, each piece [room][k] one after another; `scales` of each row: NaN where an
 * input that is quantised is not finite. VNNI multiplies unsigned inputs: theirs are 128 higher. */
static void lay_inputs(const Plan *plan, const float *x, int64_t ld, int64_t rows, int64_t room, int8_t *to, float *scales) {
    const Matrix *w = plan->of;
    for (int64_t i = 0; i < rows; i++, x += ld, to += input_bytes(plan)) {
        if (w->kind == FLOAT16) {
            split_input(plan, x, to, room * input_bytes(plan));
            continue;
        }
        float poison = 0;
        const float scale = w->inputs == DYNAMIC_INPUTS ? scale_of_row(x, w->k, w->input_scale) : w->input_scale;
        quantize_row(x, w->k, scale, plan->amx ? 0 : 128, to, &poison);
        scales[i] = scale + poison;
    }
}

#ifdef HAS_AMX

typedef struct {
    uint8_t palette, start_row, none[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Eight tiles of sixteen rows of 64 bytes; what the thread had before is kept, since others configure tiles as well. */
INLINE void open_tiles(const Plan *plan, TileConfig *before) {
    if (!plan->amx) return;
    /* a constant, and a barrier: some compilers do not know that the instructions read all of this, and the inputs */
    static const TileConfig whole = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                     .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("" ::: "memory");
    _tile_storeconfig(before);
    _tile_loadconfig(&whole);
}

INLINE void close_tiles(const Plan *plan, const TileConfig *before) {
    if (plan->amx) _tile_loadconfig(before);
}

/* Tiles 0 … 3 += inputs (4, 5) times weights (6, 7). */
#define TWO_BY_TWO(product)                                                                                            \
    do {                                                                                                               \
        product(0, 4, 6);                                                                                              \
        product(1, 4, 7);                                                                                              \
        product(2, 5, 6);                                                                                              \
        product(3, 5, 7);                                                                                              \
    } while (0)

INLINE void load_inputs(const int8_t *a, int64_t row) {
    _tile_loadd(4, a, row);
    _tile_loadd(5, a + 16 * row, row);
}

INLINE void load_weights(const int8_t *b) {
    _tile_loadd(6, b, PANEL * 4);
    _tile_loadd(7, b + 64, PANEL * 4);
}

/* Words of a row that a block's inputs and half a panel may have to stay near the core together. */
enum { NEAR_WORDS = 64 };

/* 32 inputs by half a panel, words `from` … `until`, added to the sums so far (none before word 0). */
static void amx_tile(const Plan *plan, const int8_t *b, const int8_t *a, int64_t room, int64_t from, int64_t until,
                     int32_t *sums) {
    const int64_t row = input_bytes(plan), a_piece = room * row, b_piece = plan->words * PANEL * 4;
    int32_t *low = sums + LANES * PANEL;
    if (from == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, PANEL * 4);
        _tile_loadd(1, sums + LANES, PANEL * 4);
        _tile_loadd(2, low, PANEL * 4);
        _tile_loadd(3, low + LANES, PANEL * 4);
    }
    for (int64_t word = from; word < until; word += AMX_WORDS) {
        const int8_t *inputs = a + word * 4, *weights = b + word * PANEL * 4;
        load_weights(weights);
        load_inputs(inputs, row);
        if (plan->of->kind == INT8) {
            TWO_BY_TWO(_tile_dpbssd);
            continue;
        }
        /* of three pieces of inputs and two of weights, each step changes one */
        TWO_BY_TWO(_tile_dpbf16ps);
        load_weights(weights + b_piece);
        TWO_BY_TWO(_tile_dpbf16ps);
        load_inputs(inputs + a_piece, row);
        TWO_BY_TWO(_tile_dpbf16ps);
        load_weights(weights);
        TWO_BY_TWO(_tile_dpbf16ps);
        load_inputs(inputs + 2 * a_piece, row);
        TWO_BY_TWO(_tile_dpbf16ps);
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + LANES, PANEL * 4);
    _tile_stored(2, low, PANEL * 4);
    _tile_stored(3, low + LANES, PANEL * 4);
}

/* A block of inputs by a panel: the weights of a few words are multiplied with all inputs before the next ones. */
static void amx_panel(const Plan *plan, const int8_t *b, const int8_t *a, int64_t rows, int64_t room, int32_t *sums) {
    for (int half = 0; half < 2; half++)
        for (int64_t from = 0; from < plan->words; from += NEAR_WORDS) {
            const int64_t until = plan->words - from < NEAR_WORDS ? plan->words : from + NEAR_WORDS;
            for (int64_t i = 0; i < rows; i += TALL)
                amx_tile(plan, b + half * 128, a + i * input_bytes(plan), room, from, until, sums + i * PANEL + half * 2 * LANES);
        }
}

#else

typedef int TileConfig;
INLINE void open_tiles(const Plan *plan, TileConfig *before) { (void)plan, *before = 0; }
INLINE void close_tiles(const Plan *plan, const TileConfig *before) { (void)plan, (void)before; }

#endif

/* Six inputs by a panel; 128 · the sum of each row of weights is taken away again. */
static __attribute__((noinline)) void vnni_tile(const Plan *plan, int64_t panel, const int8_t *b, const int8_t *a, int32_t *to) {
    const int64_t row = input_bytes(plan), column = panel * PANEL, left = plan->of->n - column;
    __m512i sums[FEW_TALL][WIDE];
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; v++) {
        const int64_t lanes = left - v * LANES;
        const __mmask16 there = lanes >= LANES ? 0xffff : lanes > 0 ? (__mmask16)((1 << lanes) - 1) : 0;
        const __m512i weights = _mm512_maskz_loadu_epi32(there, plan->of->sums + column + v * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < FEW_TALL; i++) sums[i][v] = _mm512_mullo_epi32(weights, _mm512_set1_epi32(-128));
    }
    for (int64_t word = 0; word < plan->words; word++, a += 4, b += PANEL * 4) {
        __m512i weights[WIDE];
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) weights[v] = _mm512_loadu_si512(b + v * 64);
#pragma GCC unroll 6
        for (int i = 0; i < FEW_TALL; i++) {
            int32_t four;
            memcpy(&four, a + i * row, 4);
            const __m512i input = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; v++) sums[i][v] = _mm512_dpbusd_epi32(sums[i][v], input, weights[v]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < FEW_TALL; i++)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) _mm512_storeu_si512(to + i * PANEL + v * LANES, sums[i][v]);
}

/* The sums of a block of inputs with a panel of weights, int32 or float32: [rows, up to a whole tile][64]. `room`: rows
 * of a piece. */
INLINE void multiply_panel(const Plan *plan, int64_t panel, const int8_t *b, const int8_t *a, int64_t rows, int64_t room,
                           int32_t *sums) {
#ifdef HAS_AMX
    if (plan->amx) {
        amx_panel(plan, b, a, rows, room, sums);
        return;
    }
#endif
    (void)room;
    for (int64_t i = 0; i < rows; i += FEW_TALL) vnni_tile(plan, panel, b, a + i * input_bytes(plan), sums + i * PANEL);
}

#endif
#endif
