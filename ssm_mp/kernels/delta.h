/* What the gated delta rule takes. Dimensions as in delta.c. */
#ifndef SSM_MP_DELTA_H
#define SSM_MP_DELTA_H

#include "vector.h"

typedef struct {
    int64_t batch, length, key_heads, value_heads, keys, values;
    const float *q, *k, *v; /* [b, l, G, n] twice, [b, l, H, m] */
    int64_t ld_q, ld_k, ld_v; /* floats between tokens */
    const float *g, *beta;  /* [b, l, H] */
    const float *state;     /* [b, H, n, m]; NULL: zeros */
    float *last;            /* [b, H, n, m], may be `state` */
    float *y;               /* [b, l, H, m] */
} Delta;

#define NORM_EPS 1e-6f

void delta_rule(const Delta *d, int threads);

/* A single token of one head of one sequence; `before` [n, m]: the state before it, NULL: zeros. */
void delta_step(const Delta *d, int64_t b, int64_t h, int64_t token, const float *before);

#endif
