/* The scan of Mamba-2 as a call of a program.
 *
 * Dimensions: b sequences, l tokens of each, m rows (b · l), H heads, P channels of a head, N state, G groups of heads.
 */
#include "program.h"
#include "ssd.h"

typedef struct {
    Rows x, B, C, dt, y; /* [m, H · P], [m, G · N] twice, [m, H] before the bias; y is as wide as its rows */
    int64_t heads, width, states, groups;
    const float *A2, *D, *dt_bias; /* [H] each; A2: A · log2 e */
    float low, high;               /* limits of the steps */
    int64_t state;                 /* [b, H, N, P] */
} Mamba2Scan;

INLINE int64_t steps_bytes(const Mamba2Scan *s, const Pass *pass) {
    return whole_lines(pass->rows * s->heads * (int64_t)sizeof(float));
}

int64_t mamba2_scan_scratch(const void *what, const Pass *pass) {
    const Mamba2Scan *s = what;
    return steps_bytes(s, pass) + s->groups * ssd_scratch(s->states) * (int64_t)sizeof(float);
}

void mamba2_scan_run(const void *what, const Pass *pass) {
    const Mamba2Scan *s = what;
    const int64_t size = s->heads * s->width * s->states;
    float *state = state_at(pass, s->state, size);
    const Ssd scan = {pass->sequences, pass->length, s->heads, s->width, s->states, s->groups, rows_at(pass, &s->x),
                      rows_at(pass, &s->dt), s->A2, rows_at(pass, &s->B), rows_at(pass, &s->C), s->D, s->dt_bias,
                      s->x.ld, s->dt.ld, s->B.ld, s->C.ld, s->low, s->high, state, state, rows_at(pass, &s->y),
                      (float *)pass->scratch, (float *)(pass->scratch + steps_bytes(s, pass))};
    ssd_scan(&scan, threads_for(pass, pass->rows * size));
}
