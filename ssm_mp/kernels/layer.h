/* One layer of a Mamba-1 model. Dimensions: b batch, d model, I inner, N state, K convolution kernel. */
#ifndef SSM_MP_LAYER_H
#define SSM_MP_LAYER_H

#include "matrix.h"

typedef struct {
    const float *weight, *bias; /* [d]; no bias: RMSNorm */
    float eps;
} Norm;

typedef struct {
    Norm norm;
    Matrix in_proj, x_proj, dt_proj, out_proj;
    const float *taps, *conv_bias; /* [K, I], [I] or none */
    const float *A2, *D;           /* A · log2 e, of one token [I, N], of many [N, I]; [I] */
    float *conv, *state;           /* [b, K − 1, I], [b, I, N], in and out */
} Layer;

void normalise_rows(int64_t m, int64_t d, const float *x, const float *weight, const float *bias, float eps, float *y,
                    int threads);

INLINE void normalise(const Norm *norm, int64_t m, int64_t d, const float *x, float *y, int threads) {
    normalise_rows(m, d, x, norm->weight, norm->bias, norm->eps, y, threads);
}

#endif
