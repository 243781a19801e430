/* Attention of a single token: each key and each value is read once for all heads that share it.
 *
 * Dimensions: s query heads that share keys, e head.
 */
#include <float.h>

#include "attend.h"
#include "register.h"

enum {
    KEYS = 64,   /* of a block, a multiple of four */
    HEADS = 3,   /* that are multiplied with four keys at a time */
    ROWS = 4,    /* heads that are multiplied with sixteen numbers of a value at a time */
    STREAMS = 8, /* values that are read side by side, each in the order of memory */
    AHEAD = 16,  /* keys and values that are fetched before they are read */
};

/* What the heads found so far, each in a row of its own. */
typedef struct {
    const Queries *queries;
    float *q, *y;       /* [s, e] */
    float *scores;      /* [s, KEYS] */
    float *top, *total; /* [s] */
} Found;

int64_t token_floats(int64_t shared, int64_t width) { return shared * (2 * width + KEYS + 2); }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Has memory brought near that is read soon. */
INLINE void expect(const float *from, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) __builtin_prefetch(from + i);
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

/* The totals of four registers. */
INLINE void totals(const Register x[4], float *to) {
#if defined(__AVX__) && !defined(__AVX512F__)
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps((__m256)x[0], (__m256)x[1]), _mm256_hadd_ps((__m256)x[2], (__m256)x[3]));
    *(Four *)to = (Four)_mm256_castps256_ps128(sums) + (Four)_mm256_extractf128_ps(sums, 1);
#else
    Four sum[4], total = {0};
    UNROLL
    for (int i = 0; i < 4; i++) {
        float held[WIDTH];
        put(held, x[i]);
        sum[i] = *(const Four *)held;
        for (int j = 4; j < WIDTH; j += 4) sum[i] += *(const Four *)(held + j);
    }
    UNROLL
    for (int j = 0; j < 4; j++) total += (Four){sum[0][j], sum[1][j], sum[2][j], sum[3][j]};
    *(Four *)to = total;
#endif
}

/* Scores of some heads and four keys, q [heads, e] and keys [4, e]. */
INLINE void scores_of(const int heads, int64_t width, const float *q, const float *keys, float *scores) {
    Register held[HEADS][4];
    UNROLL
    for (int h = 0; h < heads; h++)
        UNROLL
        for (int k = 0; k < 4; k++) held[h][k] = (Register){0};
    int64_t d = 0;
    for (; d + WIDTH <= width; d += WIDTH) {
        Register key[4];
        UNROLL
        for (int k = 0; k < 4; k++) key[k] = get(keys + k * width + d);
        UNROLL
        for (int h = 0; h < heads; h++) {
            const Register query = get(q + h * width + d);
            UNROLL
            for (int k = 0; k < 4; k++) held[h][k] += query * key[k];
        }
    }
    UNROLL
    for (int h = 0; h < heads; h++) {
        totals(held[h], scores + h * KEYS);
        for (int64_t c = d; c < width; c++)
            for (int k = 0; k < 4; k++) scores[h * KEYS + k] += q[h * width + c] * keys[k * width + c];
    }
}

/* The same of all heads and of `count` keys, four at most. */
static void score(const Found *f, const float *keys, int count, float *scores) {
    const int64_t width = f->queries->width;
    const float *q = f->q;
    int64_t left = f->queries->shared;
    if (count < 4) {
        for (int64_t h = 0; h < left; h++)
            for (int k = 0; k < count; k++) {
                float sum = 0;
                for (int64_t d = 0; d < width; d++) sum += q[h * width + d] * keys[k * width + d];
                scores[h * KEYS + k] = sum;
            }
        return;
    }
    for (; left >= 3 && left != 4; left -= 3, q += 3 * width, scores += 3 * KEYS) scores_of(3, width, q, keys, scores);
    for (; left >= 2; left -= 2, q += 2 * width, scores += 2 * KEYS) scores_of(2, width, q, keys, scores);
    if (left) scores_of(1, width, q, keys, scores);
}

/* One head's scores become weights; its largest score and their sum are of all keys so far, and what it found before is
 * worth less where there is a larger score. */
static void weigh(const Found *f, int64_t head, int64_t count) {
    const int64_t width = f->queries->width;
    float *scores = f->scores + head * KEYS, *y = f->y + head * width;
    const Register lowest = (Register){0} - FLT_MAX;
    float top = f->top[head];
    for (int64_t k = count; k < least(KEYS, (count + WIDTH - 1) / WIDTH * WIDTH); k++) scores[k] = -FLT_MAX;
    Register most = lowest, total = {0};
    for (int64_t k = 0; k < count; k += WIDTH) most = larger(get(scores + k), most);
    for (int i = 0; i < WIDTH; i++) top = most[i] > top ? most[i] : top;
    for (int64_t k = 0; k < count; k += WIDTH) {
        const Register weight = decay_of(get(scores + k) - top);
        put(scores + k, weight);
        for (int64_t i = count - k; i < WIDTH; i++) scores[k + i] = 0;
        total += get(scores + k);
    }
    const Register factor = decay_of((Register){0} + (f->top[head] - top));
    for (int64_t d = 0; d < width; d += WIDTH) put_part(y + d, get_part(y + d, width - d) * factor, width - d);
    f->total[head] = f->total[head] * factor[0] + total_of(total);
    f->top[head] = top;
}

/* Sixteen numbers of some heads, and those of `count` further values. */
INLINE void gather_of(const int heads, int64_t width, int64_t count, const float *scores, const float *values, float *y) {
    Register held[ROWS][PIECES];
    UNROLL
    for (int h = 0; h < heads; h++)
        UNROLL
        for (int i = 0; i < PIECES; i++) held[h][i] = get(y + h * width + i * WIDTH);
    for (int64_t k = 0; k < count; k++) {
        Register value[PIECES];
        UNROLL
        for (int i = 0; i < PIECES; i++) value[i] = get(values + k * width + i * WIDTH);
        UNROLL
        for (int h = 0; h < heads; h++)
            UNROLL
            for (int i = 0; i < PIECES; i++) held[h][i] += scores[h * KEYS + k] * value[i];
    }
    UNROLL
    for (int h = 0; h < heads; h++)
        UNROLL
        for (int i = 0; i < PIECES; i++) put(y + h * width + i * WIDTH, held[h][i]);
}

/* What all heads find in `count` further values [count, e] of weights from `scores` on. */
static void gather(const Found *f, const float *scores, const float *values, int64_t count) {
    const int64_t width = f->queries->width, shared = f->queries->shared;
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
        const float *weights = scores;
        float *y = f->y + d;
        int64_t left = shared;
        for (; left >= 4; left -= 4, weights += 4 * KEYS, y += 4 * width) gather_of(4, width, count, weights, values + d, y);
        for (; left >= 2; left -= 2, weights += 2 * KEYS, y += 2 * width) gather_of(2, width, count, weights, values + d, y);
        if (left) gather_of(1, width, count, weights, values + d, y);
    }
    for (int64_t h = 0; h < shared; h++)
        for (int64_t c = d; c < width; c++)
            for (int64_t k = 0; k < count; k++) f->y[h * width + c] += scores[h * KEYS + k] * values[k * width + c];
}

void attend_token(const Queries *queries, float *scratch) {
    const int64_t shared = queries->shared, width = queries->width, seen = queries->before + 1;
    float *y = scratch + shared * width, *scores = y + shared * width, *top = scores + shared * KEYS;
    const Found f = {queries, scratch, y, scores, top, top + shared};
    for (int64_t h = 0; h < shared; h++) {
        const float *q = queries->q + h * queries->apart;
        for (int64_t d = 0; d < width; d++) f.q[h * width + d] = q[d] * queries->scale;
        memset(f.y + h * width, 0, width * sizeof(float));
        f.top[h] = -FLT_MAX;
        f.total[h] = 0;
    }
    for (int64_t from = 0; from < seen; from += KEYS) {
        const int64_t count = least(seen - from, KEYS);
        const float *keys = queries->keys + from * width, *values = queries->values + from * width;
        for (int64_t k = 0; k < count; k += 4) {
            expect(keys + (k + AHEAD) * width, 4 * width);
            score(&f, keys + k * width, (int)least(count - k, 4), f.scores + k);
        }
        for (int64_t h = 0; h < shared; h++) weigh(&f, h, count);
        for (int64_t k = 0; k < count; k += STREAMS) {
            expect(values + (k + AHEAD) * width, STREAMS * width);
            gather(&f, f.scores + k, values + k * width, least(count - k, STREAMS));
        }
    }
    for (int64_t h = 0; h < shared; h++) {
        const float *gate = queries->q + h * queries->apart + queries->gate;
        const float factor = 1.0f / f.total[h];
        for (int64_t d = 0; d < width; d += WIDTH) {
            Register found = get_part(f.y + h * width + d, width - d) * factor;
            if (queries->gate) found = found / (exp_of(-get_part(gate + d, width - d)) + 1.0f);
            put_part(queries->y + h * width + d, found, width - d);
        }
    }
}
