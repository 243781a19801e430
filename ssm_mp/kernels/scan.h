/* What a selective scan takes. Dimensions: b batch, l length, I inner, N state; `ld`: floats between tokens. */
#ifndef SSM_MP_SCAN_H
#define SSM_MP_SCAN_H

#include "vector.h"

typedef struct {
    int64_t batch, length, inner, states;
    const float *a, *dt, *A2t, *B, *C, *D, *z; /* A2t [N, I]: A · log2 e, transposed */
    int64_t ld_dt, ld_B, ld_C, ld_z;
    float *state; /* [b, I, N], in and out */
    float *y;     /* [b, l, I] */
} Scan;

/* `y` may be `a`. */
void selective_scan(const Scan *s, int threads);

#endif
