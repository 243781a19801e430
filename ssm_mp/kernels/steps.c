/* The calls of a program that many blocks have: norms, products, convolutions, sums.
 *
 * Dimensions: b sequences, l tokens of each, m rows (b · l); d width, K convolution kernel.
 */
#include <math.h>

#include "program.h"
#include "register.h"

void normalise_rows(int64_t m, int64_t d, const float *x, int64_t ld_x, const float *weight, const float *bias, float eps,
                    float *y, int64_t ld_y, int threads);
void conv_silu(int64_t batch, int64_t length, int64_t inner, int64_t K, const float *x, int64_t ld, const float *weight,
               const float *bias, const float *before, float *y, int threads);
void convolve(int64_t batch, int64_t length, int64_t inner, int64_t K, const float *x, int64_t ld, const float *weight,
              const float *bias, const float *before, float *y, int threads);

typedef struct {
    Rows x, y;
    int64_t width, repeats; /* neighbouring pieces of a row, each normalised for itself with the same weight */
    const float *weight, *bias;
    float eps;
} Norm;

void norm_run(const void *what, const Pass *pass) {
    const Norm *n = what;
    const int threads = threads_for(pass, pass->rows * n->width * n->repeats);
    for (int64_t i = 0; i < n->repeats; i++)
        normalise_rows(pass->rows, n->width, rows_at(pass, &n->x) + i * n->width, n->x.ld, n->weight, n->bias, n->eps,
                       rows_at(pass, &n->y) + i * n->width, n->y.ld, threads);
}

typedef struct {
    Matrix matrix;
    Rows x, y;
    int64_t adds; /* to y, or is all that is in y */
    int64_t laid; /* where it lies among weights that are laid out beforehand; −1: nowhere */
} Product;

int64_t product_scratch(const void *what, const Pass *pass) {
    const Product *p = what;
    if (!pass->few) return inputs_bytes(&p->matrix, pass->threads);
    return whole_lines(scratch_bytes(&p->matrix, pass->rows)) + (p->adds ? pass->rows * p->matrix.n * (int64_t)sizeof(float) : 0);
}

static void few_product(const Product *p, const Pass *pass, const float *x, float *y) {
    float *found = p->adds ? (float *)(pass->scratch + whole_lines(scratch_bytes(&p->matrix, pass->rows))) : y;
    const int64_t n = p->matrix.n, ld = p->adds ? n : p->y.ld;
    multiply(&p->matrix, pass->rows, x, p->x.ld, found, ld, pass->scratch, pass->threads);
    for (int64_t i = 0; i < pass->rows && p->adds; i++)
        for (int64_t c = 0; c < n; c++) y[i * p->y.ld + c] += found[i * n + c];
}

void product_run(const void *what, const Pass *pass) {
    const Product *p = what;
    const float *x = rows_at(pass, &p->x);
    float *y = rows_at(pass, &p->y);
    if (pass->few) {
        few_product(p, pass, x, y);
        return;
    }
    int8_t *laid = pass->packed && p->laid >= 0 ? pass->packed + p->laid : NULL;
    multiply_packed(&p->matrix, laid, pass->rows, x, p->x.ld, p->adds ? y : NULL, y, p->y.ld, pass->scratch, pass->threads);
}

typedef struct {
    Rows x, y; /* y is as wide as its rows */
    int64_t width, kernel, silu;
    const float *taps, *bias; /* [K, width], [width] or none */
    int64_t state;            /* [b, K − 1, width]: the inputs before these, and then the last of all */
} Convolution;

/* The last inputs, x [l] with `ld` between tokens, take the place of those before, [K − 1, width]. */
static void keep_inputs(const Convolution *c, int64_t length, const float *x, float *before) {
    const int64_t kept = c->kernel - 1, bytes = c->width * (int64_t)sizeof(float);
    for (int64_t k = 0; k < kept; k++) {
        const int64_t at = length - kept + k;
        memcpy(before + k * c->width, at >= 0 ? x + at * c->x.ld : before + (k + length) * c->width, bytes);
    }
}

void convolution_run(const void *what, const Pass *pass) {
    const Convolution *c = what;
    const int64_t size = (c->kernel - 1) * c->width, l = pass->length;
    const float *x = rows_at(pass, &c->x);
    float *before = state_at(pass, c->state, size);
    (c->silu ? conv_silu : convolve)(pass->sequences, l, c->width, c->kernel, x, c->x.ld, c->taps, c->bias, before,
                                     rows_at(pass, &c->y), threads_for(pass, pass->rows * c->width));
    for (int64_t b = 0; b < pass->sequences; b++) keep_inputs(c, l, x + b * l * c->x.ld, before + b * size);
}

typedef struct {
    const Matrix *blocks;            /* of rows, one after another; or a single one */
    const int64_t *block_of, *row_of; /* of each token, or none: it is the number of its row */
    int64_t vocabulary, width;
    Rows y;
    float factor;
    const float *positions; /* [positions, width], added; or none */
} Lookup;

/* A token's row, y [width]. Whether there is one. */
INLINE int found_row(const Lookup *e, int64_t id, float *y) {
    if (id < 0 || id >= e->vocabulary) return 0;
    const int64_t row = e->row_of ? e->row_of[id] : id;
    return look_up(e->blocks + (e->block_of ? e->block_of[id] : 0), 1, &row, y) < 0;
}

/* The embedding of each row's token into y; a token that is none has NaN. Without ids y is what it should be already. */
void lookup_run(const void *what, const Pass *pass) {
    const Lookup *e = what;
    for (int64_t i = 0; i < pass->rows && pass->ids; i++) {
        float *y = rows_at(pass, &e->y) + i * e->y.ld;
        const float factor = found_row(e, pass->ids[i], y) ? e->factor : NAN;
        const float *position = e->positions ? e->positions + (pass->position + i % pass->length) * e->width : NULL;
        for (int64_t c = 0; c < e->width; c++) y[c] = y[c] * factor + (position ? position[c] : 0.0f);
    }
}

typedef struct {
    Rows x, y;
    int64_t width;
    float factor;
    int64_t adds;
} Scaled;

/* y = x · factor, or y += x · factor; y may be x. */
void scaled_run(const void *what, const Pass *pass) {
    const Scaled *s = what;
    const float *from = rows_at(pass, &s->x);
    float *to = rows_at(pass, &s->y);
    for (int64_t i = 0; i < pass->rows; i++)
        for (int64_t c = 0; c < s->width; c++) {
            const float value = from[i * s->x.ld + c] * s->factor;
            to[i * s->y.ld + c] = s->adds ? to[i * s->y.ld + c] + value : value;
        }
}
