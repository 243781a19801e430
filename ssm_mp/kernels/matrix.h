/* A weight as it is stored, and its product with few inputs: every weight is read once and unpacked on the way.
 *
 * Dimensions: m inputs, k inner and n outputs of a product.
 */
#ifndef SSM_MP_MATRIX_H
#define SSM_MP_MATRIX_H

#include "vector.h"

enum { FLOAT32, FLOAT16, INT8, CODES4, CODES3, CODES2 }; /* how a weight is stored */
enum { INPUTS_AS_THEY_ARE, STATIC_INPUTS, DYNAMIC_INPUTS }; /* how its inputs are quantised, of INT8 only */

/* Bytes up to the end of a line of the cache. */
INLINE int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

typedef struct {
    int64_t kind, inputs, n, k, group_bits; /* groups of codes are of 2^group_bits values, at least sixteen */
    const void *values;     /* [n, k] of the kind; codes are packed, row after row, in groups */
    const float *scales;    /* INT8: [n]; codes: one a group */
    const int32_t *sums;    /* INT8: sum of each row's values [n] */
    const float *bias;      /* [n], or none */
    const float *levels;    /* codes: the value of each of sixteen codes */
    float input_scale;      /* STATIC_INPUTS: theirs; DYNAMIC_INPUTS: the least that one may be */
} Matrix;

/* y [m, n] (`ld_y` between rows) = x [m, k] (`ld_x`) times the matrix transposed, plus bias.
 * scratch: at least `scratch_bytes(matrix, m)`, aligned to 64 bytes.
 *
 * Inputs of codes are float32 in value. CPUs whose registers have no room for sixteen float levels (AVX2, ARM) multiply
 * codes of 4 bits in 16-bit fixed point, where rows are of whole units (codes.h): an input is then off by at most 1/32766
 * of the largest of its block, eight of 32 neighbours, a level that is no integer by 1/32766 of the largest level. Of random
 * inputs and weights that is less than 1e−5 of Σ |w| · |x|. Everything else is rounded as float32 is. */
void multiply(const Matrix *matrix, int64_t m, const float *x, int64_t ld_x, float *y, int64_t ld_y, void *scratch,
              int threads);
int64_t scratch_bytes(const Matrix *matrix, int64_t m);

/* The rows of these numbers [m] as float32, y [m, k]. The place of the first number that no row has, or −1: then all are
 * there. */
int64_t look_up(const Matrix *w, int64_t m, const int64_t *rows, float *y);

/* For many inputs a weight is laid out anew first (many.c), if `takes_many` says so: whole, in `packed`, or, where that is
 * NULL, some outputs at a time. y [m, n] (`ld_y` between rows) = x [m, k] (`ld_x`) times the matrix transposed, plus bias,
 * plus `residual`, which lies like y and may be it, or none. `inputs`: `inputs_bytes` of scratch, aligned to 64 bytes. */
int takes_many(const Matrix *w);
int64_t packed_bytes(const Matrix *w);
void pack_many(const Matrix *w, void *packed, int threads);
int64_t inputs_bytes(const Matrix *w, int threads);
void multiply_packed(const Matrix *w, void *packed, int64_t m, const float *x, int64_t ld_x, const float *residual,
                     float *y, int64_t ld_y, void *inputs, int threads);

#endif
