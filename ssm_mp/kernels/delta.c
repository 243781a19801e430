/* The gated delta rule (Yang, Kautz & Hatamizadeh 2025, "Gated Delta Networks"), forward only.
 *
 * A few tokens are taken at once: the state is read and written once for all of them, since what each of them reads
 * follows from what it reads of the state before them and from products of their keys and queries (WY representation).
 * A few columns of a head's state stay in the nearest cache for a tile of tokens.
 *
 * Dimensions: b batch, l length, G key heads, H value heads, n keys and m values of a head.
 */
#include <math.h>

#include "delta.h"

enum { TILE = LANES }; /* tokens that are prepared at once */

/* One register of floats, and the tokens that are taken at once: as many as registers hold. The loops over rows are all
 * but everything here, and compilers keep vectors that are wider than a register in memory. */
#if defined(__AVX512F__)
enum { WIDTH = 16, FEW = 4 };
#elif defined(__AVX__)
enum { WIDTH = 8, FEW = 2 };
#else
enum { WIDTH = 4, FEW = 2 };
#endif
enum { WIDE = 2, COLUMNS = WIDE * WIDTH };
typedef float vec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef float unaligned __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));

/* What a few tokens have to do with each other, whatever the column. */
typedef struct {
    float decay[FEW];      /* from before all of them to each */
    float left[FEW];       /* from each to the last */
    float beta[FEW];
    float keys[FEW][FEW];  /* [i][j], i < j: k_i · k_j, decayed from i to j */
    float asked[FEW][FEW]; /* [i][j], i ≤ j: k_i · q_j, decayed from i to j */
} Group;

INLINE float total(v16 x) {
    float held[LANES];
    store(held, x);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) held[i] += held[i + half];
    return held[0];
}

INLINE float dot(const float *x, const float *y, int64_t n) {
    v16 sum = splat(0.0f);
    for (int64_t i = 0; i < n; i += LANES) {
        const int count = n - i < LANES ? (int)(n - i) : LANES;
        sum = sum + load_part(x + i, count) * load_part(y + i, count);
    }
    return total(sum);
}

/* One head's next `tokens` tokens: `mixed` gets their keys and queries [key][k of each, q of each]. */
static void prepare(int64_t n, const float *q, int64_t ld_q, const float *k, int64_t ld_k, const float *decay,
                    const float *beta, int tokens, Group *to, float *mixed) {
    float q_factor[FEW] = {0}, k_factor[FEW] = {0};
    for (int j = 0; j < FEW; j++) {
        const int there = j < tokens; /* a token that is not there neither decays nor writes */
        if (there) {
            q_factor[j] = 1.0f / sqrtf((dot(q + j * ld_q, q + j * ld_q, n) + NORM_EPS) * n);
            k_factor[j] = 1.0f / sqrtf(dot(k + j * ld_k, k + j * ld_k, n) + NORM_EPS);
        }
        to->beta[j] = there ? beta[j] : 0.0f;
        for (int i = 0; i <= j; i++) to->keys[i][j] = to->asked[i][j] = 0.0f;
        float since = 1.0f;
        for (int i = j; i >= 0; i--) {
            if (there) {
                to->asked[i][j] = since * k_factor[i] * q_factor[j] * dot(k + i * ld_k, q + j * ld_q, n);
                if (i < j) to->keys[i][j] = since * k_factor[i] * k_factor[j] * dot(k + i * ld_k, k + j * ld_k, n);
                since *= decay[i];
            }
        }
        to->decay[j] = there ? since : to->decay[j - 1];
        for (int64_t i = 0; i < n; i++) {
            mixed[i * 2 * FEW + j] = there ? k[j * ld_k + i] * k_factor[j] : 0.0f;
            mixed[i * 2 * FEW + FEW + j] = there ? q[j * ld_q + i] * q_factor[j] : 0.0f;
        }
    }
    float since = 1.0f;
    for (int j = FEW - 1; j >= 0; j--) {
        to->left[j] = since;
        if (j < tokens) since *= decay[j];
    }
}

typedef vec Columns[WIDE];

INLINE vec all(float x) { return x - (vec){0}; }

/* Up to COLUMNS floats; the others are zero. */
INLINE void load_columns(vec *to, const float *from, int count) {
    if (count == COLUMNS) {
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) to[w] = *(const unaligned *)(from + w * WIDTH);
    } else {
        float held[COLUMNS] = {0};
        if (count > 0) memcpy(held, from, count * sizeof(float));
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) to[w] = *(const unaligned *)(held + w * WIDTH);
    }
}

INLINE void store_columns(float *to, const vec *from, int count) {
    if (count == COLUMNS) {
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) *(unaligned *)(to + w * WIDTH) = from[w];
    } else {
        float held[COLUMNS];
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) *(unaligned *)(held + w * WIDTH) = from[w];
        memcpy(to, held, count * sizeof(float));
    }
}

/* A row of the state after the writes of the tokens before. */
INLINE void write_row(vec *s, float decay, const float *mixed, const Columns *written) {
#pragma GCC unroll 2
    for (int w = 0; w < WIDE; w++) {
        s[w] = s[w] * all(decay);
#pragma GCC unroll 4
        for (int j = 0; j < FEW; j++) s[w] = s[w] + all(mixed[j]) * written[j][w];
    }
}

/* What keys and queries read of a row. */
INLINE void read_row(const vec *s, const float *mixed, Columns *known, Columns *asked) {
#pragma GCC unroll 4
    for (int j = 0; j < FEW; j++)
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) {
            known[j][w] = known[j][w] + all(mixed[j]) * s[w];
            asked[j][w] = asked[j][w] + all(mixed[FEW + j]) * s[w];
        }
}

/* Rows of the state as they were before the first tokens, and what these read of them. */
INLINE void first_rows(int64_t n, int64_t m, const float *from, int count, float *held, const float *mixed,
                       Columns *known, Columns *asked) {
    for (int64_t i = 0; i < n; i++) {
        Columns s;
        load_columns(s, from + i * m, count);
        store_columns(held + i * COLUMNS, s, COLUMNS);
        read_row(s, mixed + i * 2 * FEW, known, asked);
    }
}

/* What each token writes, and its outputs. */
INLINE void settle(const Group *group, int tokens, const float *v, int64_t ld_v, const Columns *known,
                   const Columns *asked, Columns *written, float *y, int64_t ld_y, int count) {
    Columns deltas[FEW];
#pragma GCC unroll 4
    for (int j = 0; j < FEW; j++) {
        Columns value, out;
        load_columns(value, v + j * ld_v, j < tokens ? count : 0);
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) {
            vec rest = value[w] - all(group->decay[j]) * known[j][w];
            vec sum = all(group->decay[j]) * asked[j][w];
#pragma GCC unroll 4
            for (int i = 0; i < j; i++) {
                rest = rest - all(group->keys[i][j]) * deltas[i][w];
                sum = sum + all(group->asked[i][j]) * deltas[i][w];
            }
            deltas[j][w] = all(group->beta[j]) * rest;
            out[w] = sum + all(group->asked[j][j]) * deltas[j][w];
            written[j][w] = all(group->left[j]) * deltas[j][w];
        }
        if (j < tokens) store_columns(y + j * ld_y, out, count);
    }
}

/* A tile of tokens and up to COLUMNS columns of a head's state, which is read at `from` (NULL: zeros), written at `to`. */
static void tile_columns(int64_t n, int64_t m, int tokens, const Group *groups, const float *mixed, const float *v,
                         int64_t ld_v, const float *from, float *to, float *y, int64_t ld_y, int count) {
    float held[n * COLUMNS]; /* rows of `to` are so far apart that they would compete for few places of the cache */
    const int64_t step = n * 2 * FEW;
    Columns written[FEW] = {0};
    float decay = 1.0f;
    for (int t = 0; t < tokens; t += FEW, groups++, mixed += step) {
        Columns known[FEW] = {0}, asked[FEW] = {0};
        if (t == 0 && count == COLUMNS && from) {
            first_rows(n, m, from, COLUMNS, held, mixed, known, asked);
        } else if (t == 0) {
            first_rows(n, m, from, from ? count : 0, held, mixed, known, asked);
        } else {
            for (int64_t i = 0; i < n; i++) {
                Columns s;
                load_columns(s, held + i * COLUMNS, COLUMNS);
                write_row(s, decay, mixed - step + i * 2 * FEW, written);
                store_columns(held + i * COLUMNS, s, COLUMNS);
                read_row(s, mixed + i * 2 * FEW, known, asked);
            }
        }
        const int taken = tokens - t < FEW ? tokens - t : FEW;
        settle(groups, taken, v + t * ld_v, ld_v, known, asked, written, y + t * ld_y, ld_y, count);
        decay = groups->decay[FEW - 1];
    }
    for (int64_t i = 0; i < n; i++) {
        Columns s;
        load_columns(s, held + i * COLUMNS, COLUMNS);
        write_row(s, decay, mixed - step + i * 2 * FEW, written);
        store_columns(to + i * m, s, count);
    }
}

/* One head of one sequence. */
static void head(const Delta *d, int64_t b, int64_t h) {
    const int64_t n = d->keys, m = d->values, H = d->value_heads, l = d->length;
    const int64_t key_head = h / (H / d->key_heads), ld_y = H * m, at = (b * H + h) * n * m;
    float mixed[TILE * 2 * n];
    Group groups[TILE / FEW];
    float *last = d->last + at;
    for (int64_t begin = 0; begin < l; begin += TILE) {
        const int tokens = l - begin < TILE ? (int)(l - begin) : TILE;
        const float *from = begin > 0 ? last : d->state ? d->state + at : NULL;
        if (tokens == 1) { /* wherever a sequence is cut into passes */
            delta_step(d, b, h, begin, from);
            continue;
        }
        const int64_t row = b * l + begin;
        const float *q = d->q + row * d->ld_q + key_head * n, *k = d->k + row * d->ld_k + key_head * n;
        const float *v = d->v + row * d->ld_v + h * m;
        float g[LANES] = {0}, decay[LANES], beta[TILE];
        for (int t = 0; t < tokens; t++) g[t] = d->g[(row + t) * H + h], beta[t] = d->beta[(row + t) * H + h];
        store(decay, exp16(load(g)));
        for (int t = 0; t < tokens; t += FEW)
            prepare(n, q + t * d->ld_q, d->ld_q, k + t * d->ld_k, d->ld_k, decay + t, beta + t,
                    tokens - t < FEW ? tokens - t : FEW, groups + t / FEW, mixed + t * 2 * n);
        for (int64_t c = 0; c < m; c += COLUMNS) {
            const int count = m - c < COLUMNS ? (int)(m - c) : COLUMNS;
            tile_columns(n, m, tokens, groups, mixed, v + c, d->ld_v, from ? from + c : NULL, last + c,
                         d->y + row * ld_y + h * m + c, ld_y, count);
        }
    }
}

void delta_rule(const Delta *d, int threads) {
    const int64_t work = d->batch * d->value_heads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t w = 0; w < work; w++) head(d, w / d->value_heads, w % d->value_heads);
}
