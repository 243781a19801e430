/* Hidden values of feed-forwards; see hidden.h. */
#include "hidden.h"

INLINE Register activated(Register x, const int activation) {
    switch (activation) {
    case GELU: return gelu_of(x);
    case GELU_TANH: return gelu_tanh_of(x);
    case RELU2: return relu2_of(x);
    default: return silu_of(x);
    }
}

INLINE void activate_row(const Hidden *h, const float *gate, const float *up, float *y, const int activation) {
    for (int64_t c = 0; c < h->size; c += WIDTH) {
        Register value = activated(get_part(gate + c, h->size - c) * h->multiplier, activation);
        if (up) value = value * get_part(up + c, h->size - c);
        put_part(y + c, value, h->size - c);
    }
}

void activate_rows(const Hidden *hidden, int64_t m, const float *gate, int64_t ld_gate, const float *up, int64_t ld_up,
                   float *y, int64_t ld_y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        const float *own_gate = gate + i * ld_gate, *own_up = hidden->gated ? up + i * ld_up : NULL;
        float *to = y + i * ld_y;
        switch (hidden->activation) { /* with a constant the compiler leaves one loop each */
        case GELU: activate_row(hidden, own_gate, own_up, to, GELU); break;
        case GELU_TANH: activate_row(hidden, own_gate, own_up, to, GELU_TANH); break;
        case RELU2: activate_row(hidden, own_gate, own_up, to, RELU2); break;
        default: activate_row(hidden, own_gate, own_up, to, SILU);
        }
    }
}
