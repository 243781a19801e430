/* What a feed-forward does between its projections, be it a block of its own or one expert of many.
 *
 * Dimensions: m rows, E hidden.
 */
#ifndef SSM_MP_HIDDEN_H
#define SSM_MP_HIDDEN_H

#include "register.h"

enum { GELU, GELU_TANH, RELU2, SILU }; /* in the order of kernels/feed_forward.py */

/* activation(x), or activation(gate · multiplier) · up. */
typedef struct {
    int64_t size, activation, gated; /* E */
    float multiplier;
} Hidden;

/* y [m, E] of gate and up, or of gate alone, each with its `ld` between rows; y may be either. */
void activate_rows(const Hidden *hidden, int64_t m, const float *gate, int64_t ld_gate, const float *up, int64_t ld_up,
                   float *y, int64_t ld_y, int threads);

/* x Φ(x) as max(x, 0) − |x| Φ(−|x|), so that small results keep their digits.
 *
 * Φ(−a) is ½ e^(−a P(a)); P is the best of degree 9 up to a = 6, where an error of the exponent counts relative to it,
 * and constant from there on: error of Φ 6e−8. */
INLINE Register gelu_of(Register x) {
    const Register zero = {0}, a = (Register)((Integers)x & INT32_MAX), bounded = choose(a > 6.0f, zero + 6.0f, a);
    Register p = bounded * 1.21233724e-8f + -3.9050254e-7f;
    p = p * bounded + 5.36927774e-6f;
    p = p * bounded + -3.97660782e-5f;
    p = p * bounded + 1.47525895e-4f;
    p = p * bounded + 9.76485477e-5f;
    p = p * bounded + -4.93635801e-3f;
    p = p * bounded + 3.64323256e-2f;
    p = p * bounded + 3.18280412e-1f;
    p = p * bounded + 7.97887728e-1f;
    return choose(x < zero, zero, x) - a * 0.5f * exp_of(-(a * p));
}

/* ½ x (1 + tanh y) is x sigmoid(2 y), where y = √(2/π) (x + 0.044715 x³). */
INLINE Register gelu_tanh_of(Register x) { return x * sigmoid_of(x * (x * x * 0.0713548163f + 1.59576912f)); }

INLINE Register relu2_of(Register x) {
    const Register zero = {0}, positive = choose(x < zero, zero, x);
    return positive * positive;
}

#endif
