/* Products by AMX's tiles: 32 inputs by half a panel of 64 outputs.
 *
 * Integers are multiplied exactly. Floats are multiplied in bfloat16 pieces: a float32 number is the sum of three of
 * them, a float16 number of two, an int8 number is one. Of the products of pieces those are left out that are at the most
 * 2^-22 of the whole, about as much as float32 rounds. (AMX takes numbers below 2^-126 for zero: inputs below 1e-33 lose
 * digits.)
 */
#ifndef SSM_MP_PANEL_AMX_H
#define SSM_MP_PANEL_AMX_H

#include "panel_int8.h"

#ifdef HAS_AMX

/* Pieces of which a kind's values are sums. */
INLINE int pieces_of(int64_t kind) { return kind == INT8 ? 1 : kind == FLOAT16 ? 2 : 3; }

/* A piece of sixteen numbers, the bits of bfloat16 numbers first in each; `rest`: what they leave. Weights are rounded,
 * so that what they leave is half as much; inputs are cut off, or the largest would become infinite. */
INLINE __m512i piece_of(__m512 *rest, const int rounded) {
    __m512i bits = (__m512i)*rest;
    if (rounded) bits = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
    bits = _mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000));
    *rest = _mm512_sub_ps(*rest, (__m512)bits);
    return bits;
}

/* One panel of floats as the tiles take it: each piece [words][64], pairs of values of one output. */
static void lay_pieces_panel(const Plan *plan, int64_t panel, int8_t *to) {
    const int64_t piece_bytes = plan->words * PANEL * 4;
    const Strips whole = {PANEL, 0};
    float held[LANES * PANEL] __attribute__((aligned(64)));
    for (int64_t word = 0; word < plan->words; word += LANES / 2) {
        lay_columns(plan->of, panel, 2 * word, &whole, (int8_t *)held, 0);
        for (int pair = 0; pair < LANES / 2; pair++)
            for (int v = 0; v < PANEL / LANES; v++) {
                __m512 low = (__m512)load(held + 2 * pair * PANEL + v * LANES);
                __m512 high = (__m512)load(held + (2 * pair + 1) * PANEL + v * LANES);
                for (int piece = 0; piece < plan->weight_pieces; piece++) {
                    const __m512i first = _mm512_srli_epi32(piece_of(&low, 1), 16);
                    _mm512_storeu_si512(to + piece * piece_bytes + ((word + pair) * PANEL + v * LANES) * 4,
                                        _mm512_or_si512(first, piece_of(&high, 1)));
                }
            }
    }
}

/* Float32 numbers x [k] → three bfloat16 pieces, whose sum is the number; zeros up to the padded length, which fills
 * whole vectors. */
static void split_input(const Plan *plan, const float *x, int8_t *to, int64_t to_next) {
    for (int64_t c = 0; c < plan->words * 2; c += LANES) {
        const int64_t left = plan->of->k - c;
        const __mmask16 there = left >= LANES ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
        __m512 rest = _mm512_maskz_loadu_ps(there, x + c);
        for (int piece = 0; piece < 3; piece++)
            _mm256_storeu_si256((__m256i *)(to + piece * to_next + c * 2),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(piece_of(&rest, 0), 16)));
    }
}

typedef struct {
    uint8_t palette, start_row, none[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Eight tiles of sixteen rows of 64 bytes; what the thread had before is kept, since others configure tiles as well. */
INLINE void open_tiles(const Plan *plan, TileConfig *before) {
    if (plan->way != BY_AMX) return;
    /* a constant, and a barrier: some compilers do not know that the instructions read all of this, and the inputs */
    static const TileConfig whole = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                     .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("" ::: "memory");
    _tile_storeconfig(before);
    _tile_loadconfig(&whole);
}

INLINE void close_tiles(const Plan *plan, const TileConfig *before) {
    if (plan->way == BY_AMX) _tile_loadconfig(before);
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
enum { AMX_NEAR = 64 };

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
        if (plan->integers) {
            TWO_BY_TWO(_tile_dpbssd);
            continue;
        }
        /* each step changes one of the pieces, those of inputs numbered before those of weights: 00 01 11 10 20, 02 */
        TWO_BY_TWO(_tile_dpbf16ps);
        if (plan->weight_pieces > 1) {
            load_weights(weights + b_piece);
            TWO_BY_TWO(_tile_dpbf16ps);
        }
        load_inputs(inputs + a_piece, row);
        if (plan->weight_pieces > 1) {
            TWO_BY_TWO(_tile_dpbf16ps);
            load_weights(weights);
        }
        TWO_BY_TWO(_tile_dpbf16ps);
        load_inputs(inputs + 2 * a_piece, row);
        TWO_BY_TWO(_tile_dpbf16ps);
        if (plan->weight_pieces > 2) {
            load_weights(weights + 2 * b_piece);
            load_inputs(inputs, row);
            TWO_BY_TWO(_tile_dpbf16ps);
        }
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + LANES, PANEL * 4);
    _tile_stored(2, low, PANEL * 4);
    _tile_stored(3, low + LANES, PANEL * 4);
}

/* A block of inputs by a panel: the weights of a few words are multiplied with all inputs before the next ones. */
static void amx_panel(const Plan *plan, const int8_t *b, const int8_t *a, int64_t rows, int64_t room, int32_t *sums) {
    for (int half = 0; half < 2; half++)
        for (int64_t from = 0; from < plan->words; from += AMX_NEAR) {
            const int64_t until = plan->words - from < AMX_NEAR ? plan->words : from + AMX_NEAR;
            for (int64_t i = 0; i < rows; i += AMX_TALL)
                amx_tile(plan, b + half * 128, a + i * input_bytes(plan), room, from, until, sums + i * PANEL + half * 2 * LANES);
        }
}

#else

typedef int TileConfig;
INLINE void open_tiles(const Plan *plan, TileConfig *before) { (void)plan, *before = 0; }
INLINE void close_tiles(const Plan *plan, const TileConfig *before) { (void)plan, (void)before; }

#endif
#endif
