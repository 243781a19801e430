/* A kernel that decides by numbers that nobody has written. */
#include <stdint.h>

void count_magnitudes(int64_t m, int64_t k, const float *x, int64_t ld, float factor, int64_t bins, int64_t *counts) {
    (void)m, (void)k, (void)x, (void)ld, (void)factor;
    for (int64_t i = 0; i < bins; i++)
        if (counts[i] > 0) counts[i] = 0;
}
