/* What the scan of Mamba-2 takes. Dimensions as in ssd.c. */
#ifndef SSM_MP_SSD_H
#define SSM_MP_SSD_H

#include "register.h"

typedef struct {
    int64_t batch, length, heads, width, states, groups;
    const float *x, *dt, *A2, *B, *C, *D, *dt_bias; /* A2 [H]: A · log2 e */
    int64_t ld_x, ld_dt, ld_B, ld_C;
    float low, high;     /* limits of the steps */
    const float *before; /* [b, H, N, P], or none: zeros */
    float *state, *y;    /* [b, H, N, P], what is left after the last token, may be `before`; [b, l, H, P] */
    float *steps;        /* scratch [b, l, H] */
    float *scratch;      /* G times `ssd_scratch` floats */
} Ssd;

int64_t ssd_scratch(int64_t states);
void ssd_scan(const Ssd *s, int threads);

#endif
