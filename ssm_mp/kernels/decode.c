/* One token of a Mamba-1 language model in one call: from its embedding to the logits, states carried in place.
 *
 * Dimensions: b batch, d model, I inner, N state, R step rank, K convolution kernel, V vocabulary.
 */
#include "layer.h"
#include "register.h"

typedef struct {
    int64_t batch, width, inner, states, rank, kernel, vocabulary, layers, heads;
    const Layer *layer;
    Norm norm;
    const Matrix *head; /* one after another: a tied head may be in blocks */
    float *x;           /* [b, d], in and out */
    float *logits;      /* [b, V] */
    float *scratch;
} Model;

/* The newest input enters the convolution's window, and SiLU of the convolution goes to `a`. */
static void convolve(const Model *m, const Layer *layer, int64_t b, int64_t from, int count, const float *input, float *a) {
    const int64_t I = m->inner, before = m->kernel - 1;
    float *held = layer->conv + b * before * I + from;
    const v16 newest = load_part(input, count);
    v16 sum = layer->conv_bias ? load_part(layer->conv_bias + from, count) : splat(0);
    for (int64_t k = 0; k < before; k++) {
        sum = sum + load_part(held + k * I, count) * load_part(layer->taps + k * I + from, count);
        if (k > 0) store_part(held + (k - 1) * I, load_part(held + k * I, count), count);
    }
    sum = sum + newest * load_part(layer->taps + before * I + from, count);
    if (before) store_part(held + (before - 1) * I, newest, count);
    store_part(a, silu16(sum), count);
}

/* One step of the scan for one channel: its N states lie side by side. */
INLINE float scan_channel(float *h, const float *A2, const float *B, const float *C, int64_t N, float delta, float driven) {
    Register sum = {0};
    for (int64_t n = 0; n < N; n += WIDTH) {
        const Register decay = decay_of(get_part(A2 + n, N - n) * delta); /* A2 is negative */
        const Register next = get_part(h + n, N - n) * decay + get_part(B + n, N - n) * driven;
        put_part(h + n, next, N - n);
        sum += next * get_part(C + n, N - n);
    }
    return sum_of(sum);
}

static void scan_step(const Model *m, const Layer *layer, int64_t b, int64_t from, int count, const float *a,
                      const float *dt, const float *z, const float *B, const float *C, float *y) {
    const int64_t N = m->states;
    const v16 x = load_part(a, count), delta = softplus16(load_part(dt, count)), driven = delta * x;
    v16 sum = load_part(layer->D + from, count) * x;
    float *h = layer->state + (b * m->inner + from) * N;
    for (int i = 0; i < count; i++)
        sum[i] += scan_channel(h + i * N, layer->A2 + (from + i) * N, B, C, N, delta[i], driven[i]);
    store_part(y, sum * silu16(load_part(z, count)), count);
}

static void layer_step(const Model *m, const Layer *layer, float *scratch, int threads) {
    const int64_t b = m->batch, d = m->width, I = m->inner, N = m->states, wide = m->rank + 2 * N;
    float *u = scratch, *xz = u + b * d, *a = xz + 2 * b * I, *p = a + b * I, *dt = p + b * wide, *y = dt + b * I;
    void *rest = (void *)(((uintptr_t)(y + b * I) + 63) / 64 * 64);
    const int64_t blocks = (I + LANES - 1) / LANES;
    const int many = threads > 1 && b * I * N > (1 << 14);
    normalise(&layer->norm, b, d, m->x, u, 1);
    multiply(&layer->in_proj, b, u, d, xz, 2 * I, rest, threads);
    for (int64_t w = 0; w < b * blocks; w++) {
        const int64_t i = w / blocks, from = w % blocks * LANES;
        convolve(m, layer, i, from, I - from < LANES ? (int)(I - from) : LANES, xz + i * 2 * I + from, a + i * I + from);
    }
    multiply(&layer->x_proj, b, a, I, p, wide, rest, threads);
    multiply(&layer->dt_proj, b, p, wide, dt, I, rest, threads);
#pragma omp parallel for num_threads(threads) if (many) schedule(static)
    for (int64_t w = 0; w < b * blocks; w++) {
        const int64_t i = w / blocks, from = w % blocks * LANES, at = i * I + from;
        const float *B = p + i * wide + m->rank;
        scan_step(m, layer, i, from, I - from < LANES ? (int)(I - from) : LANES, a + at, dt + at,
                  xz + i * 2 * I + I + from, B, B + N, y + at);
    }
    multiply(&layer->out_proj, b, y, I, u, d, rest, threads);
    for (int64_t i = 0; i < b * d; i++) m->x[i] += u[i];
}

/* Floats of scratch that `decode_step` needs. */
int64_t decode_scratch(const Model *m) {
    int64_t most = 0;
    for (int64_t i = 0; i < m->layers; i++) {
        const Matrix *used[] = {&m->layer[i].in_proj, &m->layer[i].x_proj, &m->layer[i].dt_proj, &m->layer[i].out_proj};
        for (int j = 0; j < 4; j++) most = scratch_bytes(used[j], m->batch) > most ? scratch_bytes(used[j], m->batch) : most;
    }
    for (int64_t i = 0; i < m->heads; i++)
        most = scratch_bytes(&m->head[i], m->batch) > most ? scratch_bytes(&m->head[i], m->batch) : most;
    const int64_t arrays = m->batch * (m->width + 5 * m->inner + m->rank + 2 * m->states);
    return arrays + 32 + most / (int64_t)sizeof(float) + 1;
}

void decode_step(const Model *m, int threads) {
    for (int64_t i = 0; i < m->layers; i++) layer_step(m, &m->layer[i], m->scratch, threads);
    float *u = m->scratch;
    void *rest = (void *)(((uintptr_t)(u + m->batch * m->width) + 63) / 64 * 64);
    normalise(&m->norm, m->batch, m->width, m->x, u, 1);
    float *logits = m->logits;
    for (int64_t i = 0; i < m->heads; i++) {
        multiply(&m->head[i], m->batch, u, m->width, logits, m->vocabulary, rest, threads);
        logits += m->head[i].n;
    }
}
