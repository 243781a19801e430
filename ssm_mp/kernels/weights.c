/* Weights → codes and float16 scales; a least-square scale is looked for while its values are near the core.
 *
 * Dimensions: r rows, n values in a row, g groups of 64 values, s clippings of a range, c levels of a book.
 */
#include <math.h>

#include "quantize.h"

enum { GROUP = 64, BLOCK = 1024, HALF_OF_ONE = 0x3c00, HALF_OF_INFINITY = 0x7c00 };

/* A code book: `levels` [c], rising, and what lies in the middle `between` two of them [c − 1]; `limit` is the largest
 * magnitude. Where the levels are the integers from −limit to limit, `integers` says so. */
typedef struct {
    int64_t bits, count, integers;
    const float *levels, *between;
    float limit;
} Book;

/* The smallest float16 that is not below x, as its bits; 1 for zero, infinity above float16's largest. */
INLINE uint16_t half_not_below(float x) {
    if (!(x > 0)) return HALF_OF_ONE;
    if (x < 0x1p-14f) return (uint16_t)ceilf(x * 0x1p24f);
    if (!(x <= 65504.0f)) return HALF_OF_INFINITY;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(((bits + 0x1fff) >> 13) - (112 << 10));
}

/* The number that the bits of a positive float16 are. */
INLINE float float_of(uint16_t half) {
    if (half < 0x400) return half * 0x1p-24f;
    const uint32_t bits = ((uint32_t)half + (112 << 10)) << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float largest_magnitude(const float *x, int64_t n) {
    Register largest = {0};
    for (int64_t c = 0; c < n; c += WIDTH) largest = larger((Register)((Integers)get_part(x + c, n - c) & INT32_MAX), largest);
    float top = 0;
    for (int i = 0; i < WIDTH; i++) top = largest[i] > top ? largest[i] : top;
    return top;
}

/* (the nearest integer to x / scale in [−limit, limit]) · scale − x. A quotient in the middle between two integers may
 * go to either, which are as far away. */
INLINE Register integer_error(Register x, float scale, float inverse, float limit) {
    const Register zero = {0};
    const Register bounded = smaller(larger(x * inverse, zero - limit), zero + limit);
    return ((bounded + ROUNDING) - ROUNDING) * scale - x;
}

/* Σ error² of a row x [n] of int8; not all of it where a part is `enough`. */
INLINE double row_error(const float *x, int64_t n, float scale, double enough) {
    const float inverse = 1.0f / scale;
    double total = 0;
    for (int64_t first = 0; first < n && total < enough; first += BLOCK) {
        const int64_t end = n - first < BLOCK ? n : first + BLOCK;
        Register sum[4] = {{0}};
        int64_t c = first;
        for (; c + 4 * WIDTH <= end; c += 4 * WIDTH)
            UNROLL
            for (int i = 0; i < 4; i++) {
                const Register error = integer_error(get(x + c + i * WIDTH), scale, inverse, 127.0f);
                sum[i] += error * error;
            }
        for (; c < end; c += WIDTH) { /* beyond the row there are zeros, which are held exactly */
            const Register error = integer_error(get_part(x + c, end - c), scale, inverse, 127.0f);
            sum[0] += error * error;
        }
        total += total_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    return total;
}

/* Σ error² of a group x [64]. */
INLINE double group_error(const float *x, float scale, const Book *book) {
    enum { HALF = GROUP / 2 / WIDTH }; /* half a group at a time, so that all of it stays in registers */
    const float inverse = 1.0f / scale;
    Register sum = {0};
    if (book->integers) {
        UNROLL
        for (int c = 0; c < GROUP; c += WIDTH) {
            const Register error = integer_error(get(x + c), scale, inverse, book->limit);
            sum += error * error;
        }
        return total_of(sum);
    }
    for (int half = 0; half < 2; half++) {
        const float *part = x + half * GROUP / 2;
        Register ratio[HALF], level[HALF];
        UNROLL
        for (int i = 0; i < HALF; i++) {
            ratio[i] = get(part + i * WIDTH) * inverse;
            level[i] = (Register){0} + book->levels[0];
        }
        for (int64_t c = 1; c < book->count; c++) {
            const Register bound = (Register){0} + book->between[c - 1], above = (Register){0} + book->levels[c];
            UNROLL
            for (int i = 0; i < HALF; i++) level[i] = choose(ratio[i] > bound, above, level[i]);
        }
        UNROLL
        for (int i = 0; i < HALF; i++) {
            const Register error = level[i] * scale - get(part + i * WIDTH);
            sum += error * error;
        }
    }
    return total_of(sum);
}

/* The code of the nearest level for each of x [64]; ties go down. */
INLINE void group_codes(const float *x, float scale, const Book *book, uint8_t *codes) {
    const Register zero = {0};
    for (int c = 0; c < GROUP; c += WIDTH) {
        const Register ratio = get(x + c) / scale;
        Integers code = {0};
        if (book->integers) {
            const Register bounded = smaller(larger(ratio, zero - book->limit), zero + book->limit);
            const Register nearest = (bounded + ROUNDING) - ROUNDING;
            code = __builtin_convertvector(nearest + book->limit, Integers) + (bounded - nearest == -0.5f);
        } else
            for (int64_t i = 0; i + 1 < book->count; i++) code -= ratio > book->between[i];
        for (int i = 0; i < WIDTH; i++) codes[c + i] = (uint8_t)code[i];
    }
}

/* codes [64] → bytes [8 · bits], the first code in the lowest bits. */
INLINE void pack_group(const uint8_t *codes, int64_t bits, uint8_t *bytes) {
    for (int octet = 0; octet < GROUP / 8; octet++) {
        uint64_t word = 0;
        for (int i = 0; i < 8; i++) word |= (uint64_t)codes[8 * octet + i] << (bits * i);
        for (int64_t b = 0; b < bits; b++) bytes[octet * bits + b] = (uint8_t)(word >> (8 * b));
    }
}

/* The best of the scales of `factors` [s] · full, the first among equals. `book`: of a group; none: a row of int8. */
INLINE uint16_t best_scale(const float *x, int64_t n, float full, int64_t s, const float *factors, const Book *book) {
    uint16_t best = half_not_below(full * factors[0]);
    if (s == 1 || best == HALF_OF_INFINITY || full == 0) return best;
    double least = INFINITY;
    for (int64_t i = 0, before = -1; i < s; i++) {
        const uint16_t half = half_not_below(full * factors[i]);
        if (half == before) continue;
        before = half;
        const float scale = float_of(half);
        const double error = book ? group_error(x, scale, book) : row_error(x, n, scale, least);
        if (error < least) least = error, best = half;
    }
    return best;
}

/* Rows x [r, n] → q [r, n] and the bits of a float16 scale each; where that is infinity, q is left as it is. */
void quantize_weight_rows(int64_t r, int64_t n, const float *x, int64_t s, const float *factors, int8_t *q,
                          uint16_t *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < r; i++) {
        const float *row = x + i * n;
        scales[i] = best_scale(row, n, largest_magnitude(row, n) / 127.0f, s, factors, NULL);
        float poison = 0;
        if (scales[i] != HALF_OF_INFINITY) quantize_row(row, n, float_of(scales[i]), 0, q + i * n, &poison);
    }
}

/* Groups x [g, 64] → packed codes [g, 8 · bits] and a scale each, likewise. */
void quantize_weight_groups(int64_t g, const float *x, int64_t s, const float *factors, const Book *book,
                            uint8_t *packed, uint16_t *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < g; i++) {
        const float *group = x + i * GROUP;
        scales[i] = best_scale(group, GROUP, largest_magnitude(group, GROUP) / book->limit, s, factors, book);
        if (scales[i] == HALF_OF_INFINITY) continue;
        uint8_t codes[GROUP];
        group_codes(group, float_of(scales[i]), book, codes);
        pack_group(codes, book->bits, packed + i * 8 * book->bits);
    }
}
