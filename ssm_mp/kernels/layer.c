/* One layer of a Mamba-1 model for many tokens in one call, a few sequences at a time, so that what one step leaves is
 * still near the core when the next one takes it.
 *
 * Dimensions: b batch, l length, d model, I inner, N state, R step rank, K convolution kernel; m tokens of a group.
 */
#include <time.h>

#include "layer.h"
#include "scan.h"

enum { GROUP_TOKENS = 256 }; /* of one thread, at least one sequence */

typedef struct {
    int64_t batch, length, width, inner, states, rank, kernel;
    const float *x;  /* [b, l, d] */
    float *y;        /* [b, l, d] */
    void *scratch;   /* `layer_scratch` bytes, aligned to 64 */
    double *seconds; /* in each part, added up; or none */
} Tokens;

/* Parts of a layer whose time is asked for. */
enum { NORM, IN_PROJ, X_PROJ, DT_PROJ, OUT_PROJ, CONV };

void conv_silu(int64_t batch, int64_t length, int64_t inner, int64_t K, const float *x, int64_t ld, const float *weight,
               const float *bias, const float *before, float *y, int threads);

INLINE int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* The time since `*since` goes to a part, and the next one begins. */
INLINE void spent(const Tokens *t, int part, double *since) {
    if (!t->seconds) return;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const double seconds = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    if (part >= 0) t->seconds[part] += seconds - *since;
    *since = seconds;
}

INLINE int64_t sequences_of(const Tokens *t, int threads) {
    const int64_t fit = GROUP_TOKENS * threads / t->length, most = fit > 1 ? fit : 1;
    return most < t->batch ? most : t->batch;
}

/* The layer's four products, laid out one after another, and scratch for the inputs of one. */
typedef struct {
    const Matrix *of[4]; /* in_proj, x_proj, dt_proj, out_proj */
    int8_t *packed[4], *inputs;
    float *floats;
} Products;

/* Where all of it lies from `scratch` on. */
static Products products_of(const Layer *layer, int8_t *scratch, int threads) {
    Products found = {{&layer->in_proj, &layer->x_proj, &layer->dt_proj, &layer->out_proj}, {0}, 0, 0};
    int64_t most = 0;
    for (int i = 0; i < 4; i++) {
        const int64_t inputs = inputs_bytes(found.of[i], threads);
        found.packed[i] = scratch;
        scratch += whole_lines(packed_bytes(found.of[i]));
        most = inputs > most ? inputs : most;
    }
    found.inputs = scratch;
    found.floats = (float *)(scratch + whole_lines(most));
    return found;
}

/* Bytes of scratch that `layer_many` needs. */
int64_t layer_scratch(const Layer *layer, const Tokens *t, int threads) {
    const Products products = products_of(layer, 0, threads);
    const int64_t m = sequences_of(t, threads) * t->length;
    const int64_t row = t->width + 4 * t->inner + t->rank + 2 * t->states;
    return (int64_t)(intptr_t)products.floats + m * row * (int64_t)sizeof(float);
}

/* The last inputs of the convolution, x [l] with `ld` between tokens, take the place of those before, [K − 1, I]. */
static void keep_inputs(const Tokens *t, const float *x, int64_t ld, float *before) {
    const int64_t kept = t->kernel - 1, bytes = t->inner * (int64_t)sizeof(float);
    for (int64_t k = 0; k < kept; k++) {
        const int64_t at = t->length - kept + k;
        memcpy(before + k * t->inner, at >= 0 ? x + at * ld : before + (k + t->length) * t->inner, bytes);
    }
}

/* Sequences `from` … `from` + `count`. */
static void layer_group(const Layer *layer, const Tokens *t, const Products *products, int64_t from, int64_t count, int threads) {
    const int64_t d = t->width, I = t->inner, N = t->states, K = t->kernel, wide = t->rank + 2 * N, m = count * t->length;
    float *u = products->floats, *xz = u + m * d, *a = xz + 2 * m * I, *p = a + m * I, *dt = p + m * wide;
    float *conv = layer->conv + from * (K - 1) * I;
    const float *x = t->x + from * t->length * d;
    float *y = t->y + from * t->length * d;
    double since = 0;
    spent(t, -1, &since);
    normalise(&layer->norm, m, d, x, u, threads);
    spent(t, NORM, &since);
    multiply_packed(&layer->in_proj, products->packed[0], m, u, d, NULL, xz, 2 * I, products->inputs, threads);
    spent(t, IN_PROJ, &since);
    conv_silu(count, t->length, I, K, xz, 2 * I, layer->taps, layer->conv_bias, conv, a, threads);
    for (int64_t b = 0; b < count; b++) keep_inputs(t, xz + b * t->length * 2 * I, 2 * I, conv + b * (K - 1) * I);
    spent(t, CONV, &since);
    multiply_packed(&layer->x_proj, products->packed[1], m, a, I, NULL, p, wide, products->inputs, threads);
    spent(t, X_PROJ, &since);
    multiply_packed(&layer->dt_proj, products->packed[2], m, p, wide, NULL, dt, I, products->inputs, threads);
    spent(t, DT_PROJ, &since);
    const Scan scan = {count, t->length, I, N, a, dt, layer->A2, p + t->rank, p + t->rank + N, layer->D, xz + I,
                       I, wide, wide, 2 * I, layer->state + from * I * N, a};
    selective_scan(&scan, threads);
    spent(t, -1, &since);
    multiply_packed(&layer->out_proj, products->packed[3], m, a, I, x, y, d, products->inputs, threads);
    spent(t, OUT_PROJ, &since);
}

void layer_many(const Layer *layer, const Tokens *t, int threads) {
    const Products products = products_of(layer, t->scratch, threads);
    const int64_t count = sequences_of(t, threads);
    double since = 0;
    spent(t, -1, &since);
    for (int i = 0; i < 4; i++) {
        pack_many(products.of[i], products.packed[i], threads);
        spent(t, IN_PROJ + i, &since);
    }
    for (int64_t from = 0; from < t->batch; from += count)
        layer_group(layer, t, &products, from, t->batch - from < count ? t->batch - from : count, threads);
}
