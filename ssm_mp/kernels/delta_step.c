/* One token of the gated delta rule: twice through a head's state in the order of memory, the second time where the
 * first has left it near the core.
 *
 * Dimensions: b batch, G key heads, H value heads, n keys and m values of a head.
 */
#include <math.h>

#include "delta.h"
#include "register.h"

enum { COLUMNS = 256, ROWS = 4 }; /* values of a head, nearly always all; rows of the state at a time */

INLINE float dot(const float *x, const float *y, int64_t n) {
    Register sum = {0};
    for (int64_t i = 0; i < n; i += WIDTH) sum += get_part(x + i, n - i) * get_part(y + i, n - i);
    return total_of(sum);
}

/* What key and query read of some rows, `ld` apart: of `count` columns. */
INLINE void read_rows(const float *state, int64_t ld, const float *k, const float *q, int rows, float *known,
                      float *asked, int64_t count) {
    for (int64_t c = 0; c < count; c += WIDTH) {
        Register from_key = get(known + c), from_query = get(asked + c);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const Register s = get_part(state + r * ld + c, count - c);
            from_key += s * k[r];
            from_query += s * q[r];
        }
        put(known + c, from_key);
        put(asked + c, from_query);
    }
}

void delta_step(const Delta *d, int64_t b, int64_t h, int64_t token, const float *before) {
    const int64_t n = d->keys, m = d->values, H = d->value_heads;
    const int64_t row = b * d->length + token, key_head = h / (H / d->key_heads);
    const float *q = d->q + row * d->ld_q + key_head * n, *k = d->k + row * d->ld_k + key_head * n;
    const float q_factor = 1.0f / sqrtf((dot(q, q, n) + NORM_EPS) * (float)n);
    const float k_factor = 1.0f / sqrtf(dot(k, k, n) + NORM_EPS);
    const float decay = expf(d->g[row * H + h]), beta = d->beta[row * H + h], both = dot(k, q, n) * k_factor * q_factor;
    for (int64_t from = 0; from < m; from += COLUMNS) {
        const int64_t count = m - from < COLUMNS ? m - from : COLUMNS;
        const float *state = before ? before + from : NULL, *v = d->v + row * d->ld_v + h * m + from;
        float *last = d->last + (b * H + h) * n * m + from, *y = d->y + (row * H + h) * m + from;
        float known[COLUMNS] = {0}, asked[COLUMNS] = {0}, written[COLUMNS] = {0};
        int64_t i = 0;
        for (; state && i + ROWS <= n; i += ROWS) read_rows(state + i * m, m, k + i, q + i, ROWS, known, asked, count);
        for (; state && i < n; i++) read_rows(state + i * m, m, k + i, q + i, 1, known, asked, count);
        for (int64_t c = 0; c < count; c++) {
            const float delta = beta * (v[c] - decay * k_factor * known[c]);
            y[c] = decay * q_factor * asked[c] + both * delta;
            written[c] = k_factor * delta;
        }
        for (i = 0; i < n; i++)
            for (int64_t c = 0; c < count; c += WIDTH) {
                Register s = get(written + c) * k[i];
                if (state) s += get_part(state + i * m + c, count - c) * decay;
                put_part(last + i * m + c, s, count - c);
            }
    }
}
