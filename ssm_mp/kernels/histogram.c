/* Magnitudes counted in equal bins, in one pass over memory. */
#include "register.h"

/* Adds to counts [bins] how many of x [m, k], `ld` between rows, have |x| · factor in [i, i + 1); those beyond the last
 * bin are counted in it. Products below 2^31 are taken for granted. */
void count_magnitudes(int64_t m, int64_t k, const float *x, int64_t ld, float factor, int64_t bins, int64_t *counts) {
    const Register last = (Register){0} + (float)(bins - 1);
    for (int64_t i = 0; i < m; i++) {
        const float *row = x + i * ld;
        int64_t c = 0;
        for (; c + WIDTH <= k; c += WIDTH) {
            const Register size = (Register)((Integers)get(row + c) & INT32_MAX) * factor;
            const Integers bin = __builtin_convertvector(smaller(size, last), Integers);
            UNROLL
            for (int j = 0; j < WIDTH; j++) counts[bin[j]]++;
        }
        for (; c < k; c++) {
            const float size = __builtin_fabsf(row[c]) * factor;
            counts[size < bins - 1 ? (int64_t)size : bins - 1]++;
        }
    }
}
