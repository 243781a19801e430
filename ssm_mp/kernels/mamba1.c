/* The selective scan as a call of a program.
 *
 * Dimensions: b sequences, l tokens of each, I inner, N state.
 */
#include "program.h"
#include "scan.h"

typedef struct {
    Rows a, dt, B, C, z, y;  /* a and y: as wide as their rows; y may be a */
    int64_t inner, states;
    const float *A2, *A2t, *D; /* A · log2 e, of one token [I, N], of many [N, I]; [I] */
    int64_t state;             /* [b, I, N] */
} SelectiveScan;

/* One step for one channel: its N states lie side by side. */
INLINE float scan_channel(float *h, const float *A2, const float *B, const float *C, int64_t N, float delta, float driven) {
    v16 sum = splat(0);
    for (int64_t n = 0; n < N; n += LANES) {
        const int count = N - n < LANES ? (int)(N - n) : LANES;
        const v16 next = load_part(h + n, count) * exp2_16(splat(delta) * load_part(A2 + n, count)) +
                         splat(driven) * load_part(B + n, count);
        store_part(h + n, next, count);
        sum = sum + next * load_part(C + n, count);
    }
    return sum16(sum);
}

/* One token, sixteen channels or fewer from `from` on. */
static void step_block(const SelectiveScan *s, const Pass *pass, int64_t row, int64_t from, int count) {
    const int64_t N = s->states;
    const v16 x = load_part(rows_at(pass, &s->a) + row * s->a.ld + from, count);
    const v16 delta = softplus16(load_part(rows_at(pass, &s->dt) + row * s->dt.ld + from, count)), driven = delta * x;
    const float *B = rows_at(pass, &s->B) + row * s->B.ld, *C = rows_at(pass, &s->C) + row * s->C.ld;
    float *h = state_at(pass, s->state, s->inner * N) + (row * s->inner + from) * N;
    v16 sum = load_part(s->D + from, count) * x;
    for (int i = 0; i < count; i++)
        sum[i] += scan_channel(h + i * N, s->A2 + (from + i) * N, B, C, N, delta[i], driven[i]);
    const v16 z = load_part(rows_at(pass, &s->z) + row * s->z.ld + from, count);
    store_part(rows_at(pass, &s->y) + row * s->y.ld + from, sum * silu16(z), count);
}

static void step(const SelectiveScan *s, const Pass *pass) {
    const int64_t blocks = (s->inner + LANES - 1) / LANES;
    const int threads = threads_for(pass, pass->rows * s->inner * s->states);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t w = 0; w < pass->rows * blocks; w++) {
        const int64_t from = w % blocks * LANES, left = s->inner - from;
        step_block(s, pass, w / blocks, from, left < LANES ? (int)left : LANES);
    }
}

void selective_scan_run(const void *what, const Pass *pass) {
    const SelectiveScan *s = what;
    if (pass->length == 1) {
        step(s, pass);
        return;
    }
    const Scan scan = {pass->sequences, pass->length, s->inner, s->states, rows_at(pass, &s->a), rows_at(pass, &s->dt),
                       s->A2t, rows_at(pass, &s->B), rows_at(pass, &s->C), s->D, rows_at(pass, &s->z),
                       s->dt.ld, s->B.ld, s->C.ld, s->z.ld, state_at(pass, s->state, s->inner * s->states),
                       rows_at(pass, &s->y)};
    selective_scan(&scan, pass->threads);
}
