/* The selective scan as a call of a program.
 *
 * Dimensions: b sequences, l tokens of each, I inner, N state.
 */
#include "program.h"
#include "register.h"
#include "scan.h"

typedef struct {
    Rows a, dt, B, C, z, y;  /* a and y: as wide as their rows; y may be a */
    int64_t inner, states;
    const float *A2, *A2t, *D; /* A · log2 e, of one token [I, N], of many [N, I]; [I] */
    int64_t state;             /* [b, I, N] */
} SelectiveScan;

/* One step for one channel: its N states lie side by side. */
INLINE float scan_channel(float *h, const float *A2, const float *B, const float *C, int64_t N, float delta, float driven) {
    Register sum = {0};
    for (int64_t n = 0; n < N; n += WIDTH) {
        const int64_t left = N - n;
        const Register next = get_part(h + n, left) * decay_of(delta * get_part(A2 + n, left)) + driven * get_part(B + n, left);
        put_part(h + n, next, left);
        sum += next * get_part(C + n, left);
    }
    return sum_of(sum);
}

/* One token, as many channels from `from` on as a register holds, or fewer. */
static void step_block(const SelectiveScan *s, const Pass *pass, int64_t row, int64_t from, int64_t count) {
    const int64_t N = s->states;
    const Register x = get_part(rows_at(pass, &s->a) + row * s->a.ld + from, count);
    const Register delta = softplus_of(get_part(rows_at(pass, &s->dt) + row * s->dt.ld + from, count)), driven = delta * x;
    const float *B = rows_at(pass, &s->B) + row * s->B.ld, *C = rows_at(pass, &s->C) + row * s->C.ld;
    float *h = state_at(pass, s->state, s->inner * N) + (row * s->inner + from) * N;
    float found[WIDTH] = {0};
    for (int i = 0; i < count; i++)
        found[i] = scan_channel(h + i * N, s->A2 + (from + i) * N, B, C, N, delta[i], driven[i]);
    const Register z = get_part(rows_at(pass, &s->z) + row * s->z.ld + from, count);
    const Register y = get(found) + get_part(s->D + from, count) * x;
    put_part(rows_at(pass, &s->y) + row * s->y.ld + from, y * silu_of(z), count);
}

static void step(const SelectiveScan *s, const Pass *pass) {
    const int64_t blocks = (s->inner + WIDTH - 1) / WIDTH;
    const int threads = threads_for(pass, pass->rows * s->inner * s->states);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t w = 0; w < pass->rows * blocks; w++) {
        const int64_t from = w % blocks * WIDTH, left = s->inner - from;
        step_block(s, pass, w / blocks, from, left < WIDTH ? left : WIDTH);
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
