/* Weights → codes and float16 scales; a least-square scale is looked for while its values are near the core.
 *
 * Dimensions: r rows, n values in a row, g groups of k values (32, 64 or 128), s parts of a range, c levels of a book.
 */
#include <math.h>

#include "quantize.h"

enum { STEP = 32, LARGEST_GROUP = 128, BLOCK = 1024 };
enum { HALF_OF_ONE = 0x3c00, HALF_OF_INFINITY = 0x7c00, HALF_SIGN = 0x8000 };

/* A code book: `levels` [c], rising, what lies in the middle `between` two of them [c − 1], and their `codes` [c];
 * `limit` is the largest magnitude, `reach` the level that has it, 0 where both ends have. Where the levels are all
 * integers from the first to the last, `integers` says so. */
typedef struct {
    int64_t bits, count, integers;
    const float *levels, *between;
    const uint8_t *codes;
    float limit, reach;
} Book;

/* The smallest float16 that is not below x ≥ 0, as its bits; 1 for zero, infinity above float16's largest. */
INLINE uint16_t half_not_below(float x) {
    if (!(x > 0)) return HALF_OF_ONE;
    if (x < 0x1p-14f) return (uint16_t)ceilf(x * 0x1p24f);
    if (!(x <= 65504.0f)) return HALF_OF_INFINITY;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(((bits + 0x1fff) >> 13) - (112 << 10));
}

/* The float16 of the magnitude of x rounded up, with its sign. */
INLINE uint16_t half_of_scale(float x) {
    const uint16_t half = half_not_below(fabsf(x));
    return x < 0 ? half | HALF_SIGN : half;
}

/* The number that the bits of a finite float16 are. */
INLINE float float_of(uint16_t half) {
    const uint16_t size = half & (HALF_SIGN - 1);
    float x = size * 0x1p-24f;
    if (size >= 0x400) {
        const uint32_t bits = ((uint32_t)size + (112 << 10)) << 13;
        memcpy(&x, &bits, sizeof x);
    }
    return half & HALF_SIGN ? -x : x;
}

INLINE float largest_magnitude(const float *x, int64_t n) {
    Register largest = {0};
    for (int64_t c = 0; c < n; c += WIDTH) largest = larger((Register)((Integers)get_part(x + c, n - c) & INT32_MAX), largest);
    float top = 0;
    for (int i = 0; i < WIDTH; i++) top = largest[i] > top ? largest[i] : top;
    return top;
}

/* Of a group of zeros: 0, or the smallest float16 where the book has no zero, a level of which is then as good as one. */
INLINE float range_of_zeros(const Book *book) {
    for (int64_t i = 0; i < book->count; i++)
        if (book->levels[i] == 0) return 0;
    return 0x1p-24f;
}

/* The scale with which the farther end of the book is the value of largest magnitude of x [k], the negative one where
 * both signs have it; where both ends are as far, the positive scale. */
INLINE float range_of_group(const float *x, int64_t k, const Book *book) {
    if (book->reach == 0) {
        const float range = largest_magnitude(x, k) / book->limit;
        return range == 0 ? range_of_zeros(book) : range;
    }
    Register least = {0}, most = {0}; /* where all have one sign, zero is not the larger magnitude */
    for (int64_t c = 0; c < k; c += WIDTH) {
        least = smaller(get(x + c), least);
        most = larger(get(x + c), most);
    }
    float low = 0, high = 0;
    for (int i = 0; i < WIDTH; i++) {
        low = least[i] < low ? least[i] : low;
        high = most[i] > high ? most[i] : high;
    }
    const float range = (-low >= high ? low : high) / book->reach;
    return range == 0 ? range_of_zeros(book) : range;
}

/* (the nearest integer to x / scale in [lowest, highest]) · scale − x. A quotient in the middle between two integers may
 * go to either, which are as far away. */
INLINE Register integer_error(Register x, float scale, float inverse, float lowest, float highest) {
    const Register zero = {0};
    const Register bounded = smaller(larger(x * inverse, zero + lowest), zero + highest);
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
                const Register error = integer_error(get(x + c + i * WIDTH), scale, inverse, -127.0f, 127.0f);
                sum[i] += error * error;
            }
        for (; c < end; c += WIDTH) { /* beyond the row there are zeros, which are held exactly */
            const Register error = integer_error(get_part(x + c, end - c), scale, inverse, -127.0f, 127.0f);
            sum[0] += error * error;
        }
        total += total_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    return total;
}

/* Σ error² of a group x [k]. */
INLINE double group_error(const float *x, int64_t k, float scale, const Book *book) {
    enum { PARTS = STEP / WIDTH }; /* a few values at a time, so that all of them stay in registers */
    const float inverse = 1.0f / scale, lowest = book->levels[0], highest = book->levels[book->count - 1];
    Register sum = {0};
    if (book->integers) {
        for (int64_t first = 0; first < k; first += STEP)
            UNROLL
            for (int c = 0; c < STEP; c += WIDTH) {
                const Register error = integer_error(get(x + first + c), scale, inverse, lowest, highest);
                sum += error * error;
            }
        return total_of(sum);
    }
    for (int64_t first = 0; first < k; first += STEP) {
        const float *part = x + first;
        Register ratio[PARTS], level[PARTS];
        UNROLL
        for (int i = 0; i < PARTS; i++) {
            ratio[i] = get(part + i * WIDTH) * inverse;
            level[i] = (Register){0} + lowest;
        }
        for (int64_t c = 1; c < book->count; c++) {
            const Register bound = (Register){0} + book->between[c - 1], above = (Register){0} + book->levels[c];
            UNROLL
            for (int i = 0; i < PARTS; i++) level[i] = choose(ratio[i] > bound, above, level[i]);
        }
        UNROLL
        for (int i = 0; i < PARTS; i++) {
            const Register error = level[i] * scale - get(part + i * WIDTH);
            sum += error * error;
        }
    }
    return total_of(sum);
}

/* The code of the nearest level for each of x [k]; ties go to the lower level. */
INLINE void group_codes(const float *x, int64_t k, float scale, const Book *book, uint8_t *codes) {
    const Register zero = {0}, lowest = zero + book->levels[0], highest = zero + book->levels[book->count - 1];
    for (int64_t c = 0; c < k; c += WIDTH) {
        const Register ratio = get(x + c) / scale;
        Integers place = {0}; /* of the level */
        if (book->integers) {
            const Register bounded = smaller(larger(ratio, lowest), highest);
            const Register nearest = (bounded + ROUNDING) - ROUNDING;
            place = __builtin_convertvector(nearest - lowest, Integers) + (bounded - nearest == -0.5f);
        } else
            for (int64_t i = 0; i + 1 < book->count; i++) place -= ratio > book->between[i];
        for (int i = 0; i < WIDTH; i++) codes[c + i] = book->codes[place[i]];
    }
}

/* codes [k] → bytes [k · bits / 8], the first code in the lowest bits. */
INLINE void pack_group(const uint8_t *codes, int64_t k, int64_t bits, uint8_t *bytes) {
    for (int64_t octet = 0; octet < k / 8; octet++) {
        uint64_t word = 0;
        for (int i = 0; i < 8; i++) word |= (uint64_t)codes[8 * octet + i] << (bits * i);
        for (int64_t b = 0; b < bits; b++) bytes[octet * bits + b] = (uint8_t)(word >> (8 * b));
    }
}

/* The best of the scales of `factors` [s] · full, the first among equals; of those beyond float16 only the first counts.
 * `book`: of a group; none: a row of int8. */
INLINE uint16_t best_scale(const float *x, int64_t n, float full, int64_t s, const float *factors, const Book *book) {
    uint16_t best = half_of_scale(full * factors[0]);
    if (s == 1 || (best & ~HALF_SIGN) == HALF_OF_INFINITY || full == 0) return best;
    double least = INFINITY;
    for (int64_t i = 0, before = -1; i < s; i++) {
        const uint16_t half = half_of_scale(full * factors[i]);
        if (half == before || (half & ~HALF_SIGN) == HALF_OF_INFINITY) continue;
        before = half;
        const float scale = float_of(half);
        const double error = book ? group_error(x, n, scale, book) : row_error(x, n, scale, least);
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

/* One group x [k], of a constant size, so that its loops are straight. */
INLINE uint16_t quantize_group(const float *x, int64_t k, int64_t s, const float *factors, const Book *book,
                               uint8_t *packed) {
    const uint16_t scale = best_scale(x, k, range_of_group(x, k, book), s, factors, book);
    if ((scale & ~HALF_SIGN) == HALF_OF_INFINITY) return scale;
    uint8_t codes[LARGEST_GROUP];
    group_codes(x, k, float_of(scale), book, codes);
    pack_group(codes, k, book->bits, packed);
    return scale;
}

/* Groups x [g, k] → packed codes [g, k · bits / 8] and a scale each, likewise. */
void quantize_weight_groups(int64_t g, int64_t k, const float *x, int64_t s, const float *factors, const Book *book,
                            uint8_t *packed, uint16_t *scales, int threads) {
    const int64_t bytes = k * book->bits / 8;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < g; i++) {
        const float *group = x + i * k;
        if (k == 32) scales[i] = quantize_group(group, 32, s, factors, book, packed + i * bytes);
        else if (k == 64) scales[i] = quantize_group(group, 64, s, factors, book, packed + i * bytes);
        else scales[i] = quantize_group(group, 128, s, factors, book, packed + i * bytes);
    }
}
