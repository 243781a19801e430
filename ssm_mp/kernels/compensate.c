/* Rounding a block of columns one after another, each making up for the errors of those before it.
 *
 * Dimensions: n rows, b columns of a block, c levels of a book.
 */
#include <math.h>
#include <stdint.h>

/* The level nearest to x; of two as near the lower. levels [c] rise, between [c - 1] lie in the middle of two. */
static inline float nearest(float x, const float *levels, const float *between, int64_t c) {
    int64_t at = 0;
    for (int64_t i = 0; i + 1 < c; i++) at += x > between[i];
    return levels[at];
}

/* Rounds w [n, b] column after column to level · scale: q [n, b]. What column j is off, divided by u[j, j], goes into
 * error [n, b] and times row j of u [b, b] out of the columns after it. */
void round_columns(int64_t n, int64_t b, float *restrict w, const float *restrict u, const float *restrict scale,
                   int64_t c, const float *restrict levels, const float *restrict between, float *restrict q,
                   float *restrict error, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float *row = w + i * b;
        for (int64_t j = 0; j < b; j++) {
            const float s = scale[i * b + j], *factor = u + j * b;
            const float value = nearest(row[j] / s, levels, between, c) * s;
            const float off = (row[j] - value) / factor[j];
            q[i * b + j] = value;
            error[i * b + j] = off;
            for (int64_t m = j + 1; m < b; m++) row[m] -= off * factor[m];
        }
    }
}

/* Moves each of q [n, b], column after column, to the level · scale that is best while all others stay. gradient [n, b]
 * is half that of the square error, h [b, b] its curvature, and both q and gradient are kept up to date. */
void descend_columns(int64_t n, int64_t b, float *restrict q, float *restrict gradient, const float *restrict h,
                     const float *restrict scale, int64_t c, const float *restrict levels,
                     const float *restrict between, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float *row = q + i * b, *slope = gradient + i * b;
        for (int64_t j = 0; j < b; j++) {
            const float s = scale[i * b + j], *curvature = h + j * b;
            const float value = nearest((row[j] - slope[j] / curvature[j]) / s, levels, between, c) * s;
            const float change = value - row[j];
            if (change == 0) continue;
            row[j] = value;
            for (int64_t m = 0; m < b; m++) slope[m] += change * curvature[m];
        }
    }
}

enum { MOST = 128 };

/* For each group x [n] of g the one of its candidates [parts, g] with the least weighted square error, the first among
 * equals: best [g]. weight [g, n]; n is at most MOST. */
void choose_scales(int64_t g, int64_t n, const float *restrict x, const float *restrict weight, int64_t parts,
                   const float *restrict candidates, int64_t c, const float *restrict levels,
                   const float *restrict between, float *restrict best, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < g; i++) {
        const float *values = x + i * n, *counts = weight + i * n;
        float least = INFINITY, found = candidates[i];
        for (int64_t part = 0; part < parts; part++) {
            const float scale = candidates[part * g + i];
            float part_of[MOST], level[MOST], error = 0;
            for (int64_t j = 0; j < n; j++) {
                part_of[j] = values[j] / scale;
                level[j] = levels[0];
            }
            for (int64_t l = 1; l < c; l++)
                for (int64_t j = 0; j < n; j++) level[j] = part_of[j] > between[l - 1] ? levels[l] : level[j];
            for (int64_t j = 0; j < n; j++) {
                const float off = level[j] * scale - values[j];
                error += counts[j] * off * off;
            }
            if (error < least) {
                least = error;
                found = scale;
            }
        }
        best[i] = found;
    }
}
