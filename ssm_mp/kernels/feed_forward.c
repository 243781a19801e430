/* The calls of a feed-forward that are its own.
 *
 * Dimensions: m rows, d model, E hidden.
 */
#include "hidden.h"
#include "program.h"

typedef struct {
    Rows gate, up, y; /* up: where it is gated; y may be either */
    Hidden hidden;
} HiddenValues;

void hidden_run(const void *what, const Pass *pass) {
    const HiddenValues *v = what;
    activate_rows(&v->hidden, pass->rows, rows_at(pass, &v->gate), v->gate.ld, rows_at(pass, &v->up), v->up.ld,
                  rows_at(pass, &v->y), v->y.ld, threads_for(pass, pass->rows * v->hidden.size));
}

typedef struct {
    Rows x, gate, y; /* [m, d], [m, 1], [m, d] */
    int64_t width;
    int64_t adds; /* to y, or is all that is in y */
} TokenGate;

/* x · sigmoid(gate), one factor a row. */
void token_gate_run(const void *what, const Pass *pass) {
    const TokenGate *g = what;
    const int threads = threads_for(pass, pass->rows * g->width);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < pass->rows; i++) {
        const Register zero = {0};
        const float *x = rows_at(pass, &g->x) + i * g->x.ld, factor = sigmoid_of(zero + rows_at(pass, &g->gate)[i * g->gate.ld])[0];
        float *y = rows_at(pass, &g->y) + i * g->y.ld;
        for (int64_t c = 0; c < g->width; c++) y[c] = g->adds ? y[c] + x[c] * factor : x[c] * factor;
    }
}
