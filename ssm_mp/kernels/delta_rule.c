/* The gated delta rule as a call of a program, and what puts rows in its order.
 *
 * Dimensions: b sequences, l tokens of each, m rows (b · l), G key heads, H value heads, n keys and v values of a head.
 */
#include "delta.h"
#include "program.h"
#include "register.h"

typedef struct {
    Rows q, k, v; /* [m, G · n] twice, [m, H · v] */
    Rows b, a, y; /* what β and the decay come from, [m, H]; y is as wide as its rows */
    int64_t key_heads, value_heads, keys, values;
    const float *rate, *offset; /* [H] each: the decay is e^(rate · softplus(a + offset)) */
    int64_t state;              /* [b, H, n, v] */
} DeltaRule;

INLINE int64_t gates_bytes(const DeltaRule *d, const Pass *pass) {
    return whole_lines(pass->rows * d->value_heads * (int64_t)sizeof(float));
}

int64_t delta_rule_scratch(const void *what, const Pass *pass) { return 2 * gates_bytes(what, pass); }

/* The logarithm of a row's decays, and its β. */
INLINE void gates_of_row(const DeltaRule *d, const float *a, const float *b, float *g, float *beta) {
    for (int64_t h = 0; h < d->value_heads; h += WIDTH) {
        const int64_t left = d->value_heads - h;
        const Register step = softplus_of(get_part(a + h, left) + get_part(d->offset + h, left));
        put_part(g + h, get_part(d->rate + h, left) * step, left);
        put_part(beta + h, sigmoid_of(get_part(b + h, left)), left);
    }
}

void delta_rule_run(const void *what, const Pass *pass) {
    const DeltaRule *d = what;
    const int64_t H = d->value_heads, size = H * d->keys * d->values;
    float *g = (float *)pass->scratch, *beta = (float *)(pass->scratch + gates_bytes(d, pass));
    for (int64_t i = 0; i < pass->rows; i++)
        gates_of_row(d, rows_at(pass, &d->a) + i * d->a.ld, rows_at(pass, &d->b) + i * d->b.ld, g + i * H, beta + i * H);
    float *state = state_at(pass, d->state, size);
    const Delta delta = {pass->sequences, pass->length, d->key_heads, H, d->keys, d->values, rows_at(pass, &d->q),
                         rows_at(pass, &d->k), rows_at(pass, &d->v), d->q.ld, d->k.ld, d->v.ld, g, beta, state, state,
                         rows_at(pass, &d->y)};
    delta_rule(&delta, threads_for(pass, pass->rows * size));
}

typedef struct {
    Rows x, y;
    int64_t groups, stride, width;
} Regrouped;

/* `width` columns of each group of x, which are `stride` apart, one after another in y. */
void regrouped_run(const void *what, const Pass *pass) {
    const Regrouped *r = what;
    for (int64_t i = 0; i < pass->rows; i++) {
        const float *from = rows_at(pass, &r->x) + i * r->x.ld;
        float *to = rows_at(pass, &r->y) + i * r->y.ld;
        for (int64_t g = 0; g < r->groups; g++)
            memcpy(to + g * r->width, from + g * r->stride, r->width * sizeof(float));
    }
}
