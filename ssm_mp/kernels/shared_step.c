/* The scan of `itera` as calls of a program: its steps and states, and its outputs; products with B and C between them
 * are calls of their own.
 *
 * Dimensions: b sequences, l tokens of each, m rows (b · l), I inner, N state.
 */
#include "program.h"
#include "register.h"

typedef struct {
    Rows dt, driven; /* [m, I], before softplus; [m, N], B times the inputs, in whose place the states come */
    int64_t inner, states;
    const float *A2; /* [N]: A · log2 e */
    int64_t state;   /* [b, N] */
} SharedStep;

int64_t shared_step_scratch(const void *what, const Pass *pass) {
    (void)what;
    return pass->rows * (int64_t)sizeof(float);
}

/* The mean of softplus(dt) over the channels. */
INLINE float step_of(const float *dt, int64_t inner) {
    Register sum = {0};
    int64_t c = 0;
    for (; c + WIDTH <= inner; c += WIDTH) sum += softplus_of(get(dt + c));
    float total = total_of(sum);
    if (c < inner) {
        const Register rest = softplus_of(get_part(dt + c, inner - c));
        for (int i = 0; c + i < inner; i++) total += rest[i];
    }
    return total / (float)inner;
}

/* Some states of one sequence: h_t = 2^(step_t · A2) ∘ h_{t−1} + step_t · driven_t, from `h`, which is then the last. */
INLINE void recur(const SharedStep *s, int64_t length, const float *steps, float *driven, float *h, int64_t n) {
    const int64_t left = s->states - n;
    const Register A2 = get_part(s->A2 + n, left);
    Register held = get_part(h + n, left);
    for (int64_t t = 0; t < length; t++) {
        float *at = driven + t * s->driven.ld + n;
        held = decay_of(A2 * steps[t]) * held + get_part(at, left) * steps[t];
        put_part(at, held, left);
    }
    put_part(h + n, held, left);
}

void shared_step_run(const void *what, const Pass *pass) {
    const SharedStep *s = what;
    const int64_t l = pass->length, blocks = (s->states + WIDTH - 1) / WIDTH;
    const float *dt = rows_at(pass, &s->dt);
    float *steps = (float *)pass->scratch, *driven = rows_at(pass, &s->driven);
    float *state = state_at(pass, s->state, s->states);
    int threads = threads_for(pass, pass->rows * s->inner);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < pass->rows; i++) steps[i] = step_of(dt + i * s->dt.ld, s->inner);
    threads = threads_for(pass, pass->rows * s->states);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t w = 0; w < pass->sequences * blocks; w++) {
        const int64_t b = w / blocks;
        recur(s, l, steps + b * l, driven + b * l * s->driven.ld, state + b * s->states, w % blocks * WIDTH);
    }
}

typedef struct {
    Rows y, a, z; /* y: C times the states, in whose place the outputs come */
    int64_t inner;
    const float *D; /* [I] */
} SharedStepOutputs;

/* y = (y + D · a) · silu(z). */
void shared_step_outputs_run(const void *what, const Pass *pass) {
    const SharedStepOutputs *s = what;
    float *y = rows_at(pass, &s->y);
    const float *a = rows_at(pass, &s->a), *z = rows_at(pass, &s->z);
    const int threads = threads_for(pass, pass->rows * s->inner);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < pass->rows; i++)
        for (int64_t c = 0; c < s->inner; c += WIDTH) {
            const int64_t left = s->inner - c;
            float *to = y + i * s->y.ld + c;
            const Register sum = get_part(to, left) + get_part(s->D + c, left) * get_part(a + i * s->a.ld + c, left);
            put_part(to, sum * silu_of(get_part(z + i * s->z.ld + c, left)), left);
        }
}
