/* Causal attention of many queries (Dao et al. 2022, FlashAttention): block after block of keys, while what was found so
 * far is held with the largest score and the sum of weights of each query.
 *
 * Sixteen queries lie side by side, so that keys and values are read as they are, number by number, and the largest
 * scores, the sums and what a new largest score takes from what was found are vectors.
 *
 * Dimensions: e head.
 */
#include <float.h>

#include "attend.h"
#include "register.h"

enum {
#if defined(__AVX512F__)
    ROWS = 12, /* of a tile: as many sums as registers hold */
#else
    ROWS = 6,
#endif
    KEYS = 48, /* of a block, a multiple of ROWS */
    TILES = QUERIES / LANES,
};

/* Sixteen queries or fewer, and what they found so far. */
typedef struct {
    float *q, *y; /* [e, LANES] */
    float top[LANES], total[LANES], factor[LANES];
    int32_t last[LANES];   /* key that each sees */
    int64_t certain, seen; /* keys that all of them see, and that any sees */
    int rows;
} Tile;

/* Keys from one on, as far as a tile sees them. */
typedef struct {
    const float *keys, *values;
    int64_t from, count, certain;
    float scores[KEYS * LANES];
} Block;

int64_t block_floats(int64_t width) { return TILES * 2 * width * LANES; }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE Register kept(Integers where, Register x) { return (Register)(where & (Integers)x); }

/* held[r] += Σ_j a[r · row + j · column] · b[j], of `depth` vectors. */
INLINE void add_products(Register held[ROWS][PIECES], const int rows, int64_t depth, const float *a, int64_t row,
                         int64_t column, const float *b) {
    for (int64_t j = 0; j < depth; j++) {
        Register value[PIECES];
        UNROLL
        for (int i = 0; i < PIECES; i++) value[i] = get(b + j * LANES + i * WIDTH);
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int i = 0; i < PIECES; i++) held[r][i] += a[r * row + j * column] * value[i];
    }
}

/* Scores of some keys. */
INLINE void scores_of(const Tile *tile, const int rows, int64_t width, const float *keys, float *scores) {
    Register held[ROWS][PIECES];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < PIECES; i++) held[r][i] = (Register){0};
    add_products(held, rows, width, keys, width, 1, tile->q);
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < PIECES; i++) put(scores + r * LANES + i * WIDTH, held[r][i]);
}

static void score(const Tile *tile, int64_t width, Block *block) {
    const float *keys = block->keys;
    float *scores = block->scores;
    int64_t left = block->count;
    for (; left >= ROWS; left -= ROWS, keys += ROWS * width, scores += ROWS * LANES) scores_of(tile, ROWS, width, keys, scores);
    for (; left >= 4; left -= 4, keys += 4 * width, scores += 4 * LANES) scores_of(tile, 4, width, keys, scores);
    for (; left > 0; left--, keys += width, scores += LANES) scores_of(tile, 1, width, keys, scores);
}

/* Scores become weights, those of keys that a query does not see zeros; what was found before is worth less where there
 * is a larger score. */
static void weigh(Tile *tile, Block *block) {
    for (int i = 0; i < LANES; i += WIDTH) {
        const Integers last = *(const Integers *)(tile->last + i) - (int32_t)block->from;
        const Register lowest = (Register){0} - FLT_MAX, before = get(tile->top + i);
        float *scores = block->scores + i;
        for (int64_t k = block->certain; k < block->count; k++)
            put(scores + k * LANES, choose(last >= (int32_t)k, get(scores + k * LANES), lowest));
        Register even = before, odd = before;
        for (int64_t k = 0; k + 1 < block->count; k += 2) {
            even = larger(get(scores + k * LANES), even);
            odd = larger(get(scores + (k + 1) * LANES), odd);
        }
        if (block->count % 2) even = larger(get(scores + (block->count - 1) * LANES), even);
        const Register top = larger(odd, even), factor = decay_of(before - top);
        Register total = {0};
        for (int64_t k = 0; k < block->count; k++) {
            Register weight = decay_of(get(scores + k * LANES) - top);
            if (k >= block->certain) weight = kept(last >= (int32_t)k, weight);
            put(scores + k * LANES, weight);
            total += weight;
        }
        put(tile->top + i, top);
        put(tile->factor + i, factor);
        put(tile->total + i, get(tile->total + i) * factor + total);
    }
}

/* Some numbers of the heads, `at` the first, with those of further values. A value that is not finite does not reach
 * queries that do not see it, as zero times it would. */
INLINE void gather(const Tile *tile, const int rows, int64_t width, const Block *block, int64_t at) {
    float *y = tile->y + at * LANES;
    Register held[ROWS][PIECES];
    UNROLL
    for (int i = 0; i < PIECES; i++) {
        const Register factor = get(tile->factor + i * WIDTH);
        UNROLL
        for (int r = 0; r < rows; r++) held[r][i] = get(y + r * LANES + i * WIDTH) * factor;
    }
    add_products(held, rows, block->certain, block->values + at, 1, width, block->scores);
    for (int64_t k = block->certain; k < block->count; k++)
        UNROLL
        for (int i = 0; i < PIECES; i++) {
            const Integers sees = *(const Integers *)(tile->last + i * WIDTH) >= (int32_t)(block->from + k);
            const Register weight = get(block->scores + k * LANES + i * WIDTH);
            UNROLL
            for (int r = 0; r < rows; r++) held[r][i] += kept(sees, block->values[k * width + at + r] * weight);
        }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < PIECES; i++) put(y + r * LANES + i * WIDTH, held[r][i]);
}

static void gather_all(const Tile *tile, int64_t width, const Block *block) {
    int64_t at = 0;
    for (; at + ROWS <= width; at += ROWS) gather(tile, ROWS, width, block, at);
    for (; at + 4 <= width; at += 4) gather(tile, 4, width, block, at);
    for (; at < width; at++) gather(tile, 1, width, block, at);
}

/* Queries `row` and following, scaled; where there are none, zeros that see what the last one sees. */
static void begin(const Queries *queries, Tile *tile, int64_t row) {
    const int64_t width = queries->width, shared = queries->shared;
    memset(tile->y, 0, width * LANES * sizeof(float));
    if (tile->rows < LANES) memset(tile->q, 0, width * LANES * sizeof(float));
    for (int i = 0; i < LANES; i++) {
        const int64_t own = row + least(i, tile->rows - 1);
        const float *q = queries->q + own / shared * queries->ld_q + own % shared * queries->apart;
        for (int64_t d = 0; d < width && i < tile->rows; d++) tile->q[d * LANES + i] = q[d] * queries->scale;
        tile->last[i] = (int32_t)(queries->before + own / shared);
        tile->top[i] = -FLT_MAX;
        tile->total[i] = 0;
    }
    tile->certain = tile->last[0] + 1;
    tile->seen = tile->last[LANES - 1] + 1;
}

/* What a tile found, by its gates. */
static void end(const Queries *queries, const Tile *tile, int64_t row) {
    const int64_t width = queries->width, shared = queries->shared;
    for (int i = 0; i < tile->rows; i++) {
        const int64_t token = (row + i) / shared, head = (row + i) % shared;
        const float *gate = queries->q + token * queries->ld_q + head * queries->apart + queries->gate;
        float *y = queries->y + token * queries->ld_y + head * width;
        const float factor = 1.0f / tile->total[i];
        for (int64_t d = 0; d < width; d++) y[d] = tile->y[d * LANES + i] * factor;
        for (int64_t d = 0; d < width && queries->gate; d += WIDTH)
            put_part(y + d, get_part(y + d, width - d) / (exp_of(-get_part(gate + d, width - d)) + 1.0f), width - d);
    }
}

void attend_block(const Queries *queries, int64_t from, int64_t rows, float *scratch) {
    const int64_t width = queries->width, size = width * LANES;
    Tile tiles[TILES];
    Block block;
    int count = 0;
    for (; count * LANES < rows; count++) {
        tiles[count] = (Tile){.q = scratch + 2 * count * size, .y = scratch + (2 * count + 1) * size,
                              .rows = (int)least(rows - count * LANES, LANES)};
        begin(queries, &tiles[count], from + count * LANES);
    }
    for (block.from = 0; block.from < tiles[count - 1].seen; block.from += KEYS) {
        block.keys = queries->keys + block.from * width;
        block.values = queries->values + block.from * width;
        for (int i = 0; i < count; i++) {
            if (tiles[i].seen <= block.from) continue;
            block.count = least(tiles[i].seen - block.from, KEYS);
            block.certain = tiles[i].certain > block.from ? least(tiles[i].certain - block.from, KEYS) : 0;
            score(&tiles[i], width, &block);
            weigh(&tiles[i], &block);
            gather_all(&tiles[i], width, &block);
        }
    }
    for (int i = 0; i < count; i++) end(queries, &tiles[i], from + i * LANES);
}
