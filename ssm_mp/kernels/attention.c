/* Attention as a call of a program: queries and keys are turned, keys and values join those of the tokens before, and
 * each token looks at itself and at all before it.
 *
 * Dimensions: b sequences, l tokens of each, h query heads, g heads of keys and values, e head, r numbers of a head that
 * are turned, t tokens so far.
 */
#include <math.h>

#include "attend.h"
#include "program.h"
#include "register.h"
#include "threads.h"

typedef struct {
    Rows q, k, v, y;
    int64_t heads, groups, width, pairs; /* h, g, e, r / 2 */
    int64_t gated;                       /* behind each head's query, its gate */
    const float *frequencies;            /* [r / 2] */
    float louder, scale;                 /* what cosine and sine, and the scores are multiplied with */
    int64_t keys, values;                /* [b, g, t, e] */
} Attention;

enum { PRODUCTS = 16 }; /* that take as long as one of the numbers of `threads_for` */

INLINE int64_t waves_floats(const Attention *a, const Pass *pass) { return 2 * pass->length * a->pairs; }

INLINE int64_t thread_floats(const Attention *a) {
    const int64_t block = block_floats(a->width), token = token_floats(a->heads / a->groups, a->width);
    return whole_lines((block > token ? block : token) * (int64_t)sizeof(float)) / (int64_t)sizeof(float);
}

int64_t attention_scratch(const void *what, const Pass *pass) {
    const Attention *a = what;
    return whole_lines((pass->threads * thread_floats(a) + waves_floats(a, pass)) * (int64_t)sizeof(float));
}

/* Cosines [l, r / 2] and then sines of the positions. */
static void make_waves(const Attention *a, const Pass *pass, float *waves) {
    const int64_t pairs = a->pairs, size = pass->length * pairs;
    const int threads = threads_for(pass, 4 * size);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < pass->length; t++)
        for (int64_t i = 0; i < pairs; i++) {
            const float angle = (float)(pass->position + t) * a->frequencies[i];
            waves[t * pairs + i] = cosf(angle) * a->louder;
            waves[size + t * pairs + i] = sinf(angle) * a->louder;
        }
}

/* The pairs of one head, half a rotation apart. */
INLINE void turn(float *x, int64_t pairs, const float *cosine, const float *sine) {
    for (int64_t i = 0; i < pairs; i += WIDTH) {
        const int64_t left = pairs - i;
        const Register first = get_part(x + i, left), second = get_part(x + pairs + i, left);
        const Register c = get_part(cosine + i, left), s = get_part(sine + i, left);
        put_part(x + i, first * c - second * s, left);
        put_part(x + pairs + i, second * c + first * s, left);
    }
}

/* One token's queries and keys are turned, and its keys and values kept. */
static void place(const Attention *a, const Pass *pass, int64_t row, const float *waves) {
    const int64_t b = row / pass->length, t = row % pass->length, width = a->width;
    const int64_t size = a->groups * pass->capacity * width, bytes = width * (int64_t)sizeof(float);
    const float *cosine = waves + t * a->pairs, *sine = cosine + pass->length * a->pairs;
    float *q = rows_at(pass, &a->q) + row * a->q.ld, *k = rows_at(pass, &a->k) + row * a->k.ld;
    const float *v = rows_at(pass, &a->v) + row * a->v.ld;
    for (int64_t h = 0; h < a->heads && a->pairs; h++) turn(q + h * (width << a->gated), a->pairs, cosine, sine);
    for (int64_t g = 0; g < a->groups; g++) {
        const int64_t at = b * size + (g * pass->capacity + pass->position + t) * width;
        turn(k + g * width, a->pairs, cosine, sine);
        memcpy(state_at(pass, a->keys, size) + at, k + g * width, bytes);
        memcpy(state_at(pass, a->values, size) + at, v + g * width, bytes);
    }
}

/* The queries of sequence `b` that share head `g` of the keys. */
static Queries queries_of(const Attention *a, const Pass *pass, int64_t b, int64_t g) {
    const int64_t width = a->width, apart = width << a->gated, shared = a->heads / a->groups;
    const int64_t size = a->groups * pass->capacity * width, at = (b * a->groups + g) * pass->capacity * width;
    const int64_t row = b * pass->length, head = g * shared;
    return (Queries){
        shared, width, pass->position, rows_at(pass, &a->q) + row * a->q.ld + head * apart, a->q.ld, apart,
        a->gated ? width : 0, state_at(pass, a->keys, size) + at, state_at(pass, a->values, size) + at,
        rows_at(pass, &a->y) + row * a->y.ld + head * width, a->y.ld, a->scale * LOG2_E,
    };
}

void attention_run(const void *what, const Pass *pass) {
    const Attention *a = what;
    const int64_t pairs = pass->sequences * a->groups, rows = pass->length * (a->heads / a->groups);
    const int64_t blocks = pass->length == 1 ? 1 : (rows + QUERIES - 1) / QUERIES;
    float *scratch = (float *)pass->scratch, *waves = scratch + pass->threads * thread_floats(a);
    make_waves(a, pass, waves);
    const int placing = threads_for(pass, pass->rows * (a->heads + a->groups) * a->width);
#pragma omp parallel for num_threads(placing) if (placing > 1) schedule(static)
    for (int64_t row = 0; row < pass->rows; row++) place(a, pass, row, waves);

    const int64_t products = 2 * pass->rows * a->heads * (pass->position + pass->length) * a->width;
    const int threads = threads_for(pass, products / PRODUCTS);
    /* the last tokens see most and come first: whoever is ready early takes up what is left */
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t w = 0; w < pairs * blocks; w++) {
        const int64_t pair = w % pairs, from = (blocks - 1 - w / pairs) * QUERIES;
        const Queries queries = queries_of(a, pass, pair / a->groups, pair % a->groups);
        float *own = scratch + (threads > 1 ? thread_number() : 0) * thread_floats(a);
        if (pass->length == 1) attend_token(&queries, own);
        else attend_block(&queries, from, rows - from < QUERIES ? rows - from : QUERIES, own);
    }
}
