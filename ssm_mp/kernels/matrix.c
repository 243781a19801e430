/* The products of matrix.h. A product of few inputs waits for memory, so what counts is to read stored weights once. */
#include "matrix.h"

#include "codes.h"
#include "dots.h"
#include "fixed.h"

#define PARALLEL_BYTES (1 << 18) /* smaller matrices are through before a second thread has woken up */

/* Bytes of a value, by kind; to unpack a code takes as long as to read a float from near. */
static const int work_of[] = {4, 2, 1, 4, 4, 4}, kind_bits[] = {32, 16, 8, 4, 3, 2};

enum { HALF_BITS = 5 };       /* of groups of half a unit */
enum { TOGETHER = 4 };        /* inputs that a row is multiplied with at a time */
enum { ROWS_OF_A_TURN = 16 }; /* that a thread takes for some inputs after the others, still near the core */

void quantize_static(int64_t m, int64_t k, const float *x, int64_t ld, float scale, int8_t *q, float *scales, int threads);
void quantize_dynamic(int64_t m, int64_t k, const float *x, int64_t ld, float smallest, int8_t *q, float *scales, int threads);

/* How a product is computed. */
enum { FLOATS, INTEGERS, UNITS, FIXED, SIXTEENS };

static int way_of(const Matrix *w) {
    if (w->kind == INT8 && w->inputs != INPUTS_AS_THEY_ARE) return INTEGERS;
    if (w->kind <= INT8) return FLOATS;
    /* rows of whole units, each in one group or in two halves */
    if (w->k % UNIT != 0 || w->group_bits < HALF_BITS) return SIXTEENS;
#ifdef HAS_FIXED
    if (w->kind == CODES4) return FIXED;
#endif
    return UNITS;
}

/* A product and its inputs as it takes them: as they are or, of UNITS, laid out by `code_in_turn`; or quantised, with a scale
 * each; or fixed, with the steps of blocks. */
typedef struct {
    const Matrix *of;
    int way;
    int64_t ld, ld_y;
    const float *x;       /* [m, k], `ld` between inputs */
    const int8_t *q;      /* [m, k] */
    const int16_t *fixed; /* [m, k] */
    const float *scales;  /* [m], or [m, k / 8] of fixed ones */
    float *y;             /* [m, n], `ld_y` between inputs */
} Product;

/* Codes in groups that run on over the ends of rows: `first` is the place of the row's first code. */
INLINE float dot_sixteens(const Matrix *w, const int bits, const Levels *levels, int64_t first, const float *x) {
    const uint8_t *packed = w->values;
    const int64_t group = w->group_bits;
    Register total = {0};
    float rest = 0;
    int64_t c = 0;
    while (c < w->k) {
        const int64_t at = first + c, left = w->k - c;
        const float scale = w->scales[at >> group];
        if (at % LANES == 0 && left >= LANES) {
            const uint8_t *p = packed + at * bits / 8;
            Register sum = {0};
            UNROLL
            for (int i = 0; i < PIECES; i++)
                sum += levels_at(levels, codes_in_order(p, bits, i), bits) * get(x + c + i * WIDTH);
            total += sum * scale;
            c += LANES;
            continue;
        }
        /* up to the next boundary of sixteen codes, or the row's end, one after another */
        const int64_t to_boundary = LANES - at % LANES, count = left < to_boundary ? left : to_boundary;
        for (int64_t i = 0; i < count; i++) rest += w->levels[code_at(packed, at + i, bits)] * scale * x[c + i];
        c += count;
    }
    return sum_of(total) + rest;
}

/* Codes in whole units, times `count` inputs that are laid out; groups are half a unit where `halves`. */
INLINE void dot_units(const Matrix *w, const int bits, const int halves, const Levels *levels, int64_t first, const float *x,
                      int64_t ld, const int count, float *found) {
    const uint8_t *packed = (const uint8_t *)w->values + first / 8 * bits;
    const int parts = count == 1 ? 2 : 1; /* sums of an input, so that none waits long for the one before */
    Register total[TOGETHER] = {{0}};
    for (int64_t c = 0; c < w->k; c += UNIT) {
        const float *scales = w->scales + ((first + c) >> w->group_bits);
        Integers words[WORDS];
        words_of(packed + c / 8 * bits, bits, words);
        UNROLL
        for (int r = 0; r < WORDS; r++) {
            Register sum[TOGETHER] = {{0}};
            UNROLL
            for (int turn = 0; turn < TURNS; turn++) {
                const Register value = levels_at(levels, words[r] >> (turn * bits), bits);
                UNROLL
                for (int i = 0; i < count; i++)
                    sum[i * parts + turn % parts] += value * get(x + i * ld + c + (turn * WORDS + r) * WIDTH);
            }
            const Register scale = scales_of_unit(scales, halves, r);
            UNROLL
            for (int i = 0; i < count; i++) {
                if (parts == 2) sum[i] += sum[i + 1];
                total[i] += sum[i] * scale;
            }
        }
    }
    UNROLL
    for (int i = 0; i < count; i++) found[i] = sum_of(total[i]);
}

/* `count` inputs from `i` on times rows `from` … `to`; with all that is constant the compiler leaves one loop. */
INLINE void multiply_rows(const Product *p, const int kind, const int way, const int halves, const int count, int64_t from,
                          int64_t to, int64_t i) {
    const Matrix *w = p->of;
    const int64_t k = w->k;
    const float *x = p->x + i * p->ld;
    Levels levels;
    if (way == UNITS || way == SIXTEENS) levels = repeated_levels(w->levels, kind_bits[kind]);
#ifdef HAS_FIXED
    FixedLevels fixed;
    if (way == FIXED) fixed = fixed_levels(w->levels);
#endif
    for (int64_t row = from; row < to; row++) {
        const int64_t at = row * k;
        float found[TOGETHER];
        if (way == FLOATS) dot_stored(kind, w->values, at, x, p->ld, k, count, found);
        if (way == UNITS) dot_units(w, kind_bits[kind], halves, &levels, at, x, p->ld, count, found);
        if (way == SIXTEENS) found[0] = dot_sixteens(w, kind_bits[kind], &levels, at, x);
#ifdef HAS_FIXED
        if (way == FIXED)
            dot_fixed(&fixed, (const uint8_t *)w->values + at / 2, w->scales, at, w->group_bits, halves, p->fixed + i * k,
                      p->scales + i * k / BLOCKS, k, count, found);
#endif
        if (way == INTEGERS) {
            int32_t sums[TOGETHER];
            dot_int8((const int8_t *)w->values + at, p->q + i * k, k, w->sums[row], count, sums);
            for (int j = 0; j < count; j++) found[j] = (float)sums[j] * p->scales[i + j];
        }
        for (int j = 0; j < count; j++) {
            const float scaled = kind == INT8 ? found[j] * w->scales[row] : found[j];
            p->y[(i + j) * p->ld_y + row] = w->bias ? scaled + w->bias[row] : scaled;
        }
    }
}

INLINE void multiply_halves(const Product *p, const int kind, const int way, const int count, int64_t from, int64_t to, int64_t i) {
    if (p->of->group_bits == HALF_BITS) multiply_rows(p, kind, way, 1, count, from, to, i);
    else multiply_rows(p, kind, way, 0, count, from, to, i);
}

INLINE void multiply_some(const Product *p, const int count, int64_t from, int64_t to, int64_t i) {
    switch (p->of->kind * 8 + p->way) {
    case FLOAT32 * 8 + FLOATS: multiply_rows(p, FLOAT32, FLOATS, 0, count, from, to, i); break;
    case FLOAT16 * 8 + FLOATS: multiply_rows(p, FLOAT16, FLOATS, 0, count, from, to, i); break;
    case INT8 * 8 + FLOATS: multiply_rows(p, INT8, FLOATS, 0, count, from, to, i); break;
    case INT8 * 8 + INTEGERS: multiply_rows(p, INT8, INTEGERS, 0, count, from, to, i); break;
    case CODES3 * 8 + UNITS: multiply_halves(p, CODES3, UNITS, count, from, to, i); break;
    case CODES2 * 8 + UNITS: multiply_halves(p, CODES2, UNITS, count, from, to, i); break;
#ifdef HAS_FIXED
    case CODES4 * 8 + FIXED: multiply_halves(p, CODES4, FIXED, count, from, to, i); break;
#else
    case CODES4 * 8 + UNITS: multiply_halves(p, CODES4, UNITS, count, from, to, i); break;
#endif
    }
}

/* One input times some rows whose groups run on over their ends. */
INLINE void multiply_sixteens(const Product *p, int64_t from, int64_t to, int64_t i) {
    switch (p->of->kind) {
    case CODES4: multiply_rows(p, CODES4, SIXTEENS, 0, 1, from, to, i); break;
    case CODES3: multiply_rows(p, CODES3, SIXTEENS, 0, 1, from, to, i); break;
    case CODES2: multiply_rows(p, CODES2, SIXTEENS, 0, 1, from, to, i); break;
    }
}

/* All m inputs times some rows: the last four overlap with others where m is no multiple. */
static void multiply_block(const Product *p, int64_t m, int64_t from, int64_t to) {
    const int64_t four = p->way != SIXTEENS && m >= TOGETHER ? m : 0;
    for (int64_t i = 0; i < four; i += TOGETHER)
        multiply_some(p, TOGETHER, from, to, m - i < TOGETHER ? m - TOGETHER : i);
    for (int64_t i = four; i < m; i++) {
        if (p->way == SIXTEENS) multiply_sixteens(p, from, to, i);
        else multiply_some(p, 1, from, to, i);
    }
}

/* The inputs as the product takes them; in `scratch`, where that is not as they are. */
static Product prepare(const Matrix *w, int64_t m, const float *x, int64_t ld, void *scratch) {
    Product p = {.of = w, .way = way_of(w), .ld = ld, .x = x};
    const int64_t k = w->k;
    if (p.way == INTEGERS) {
        int8_t *q = scratch;
        float *scales = (float *)(q + whole_lines(m * k));
        if (w->inputs == STATIC_INPUTS) quantize_static(m, k, x, ld, w->input_scale, q, scales, 1);
        else quantize_dynamic(m, k, x, ld, w->input_scale, q, scales, 1);
        p.q = q;
        p.scales = scales;
    }
    if (p.way == UNITS) {
        float *laid_out = scratch;
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < k; c += UNIT)
                for (int64_t place = 0; place < UNIT; place++)
                    laid_out[i * k + c + place] = x[i * ld + c + code_in_turn(place)];
        p.x = laid_out;
        p.ld = k;
    }
#ifdef HAS_FIXED
    if (p.way == FIXED) {
        int16_t *fixed = scratch;
        float *steps = (float *)(fixed + m * k);
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < k; c += UNIT)
                fix_unit(x + i * ld + c, fixed + i * k + c, steps + (i * k + c) / BLOCKS);
        p.fixed = fixed;
        p.scales = steps;
    }
#endif
    return p;
}

int64_t scratch_bytes(const Matrix *w, int64_t m) {
    switch (way_of(w)) {
    case INTEGERS: return whole_lines(m * w->k) + m * (int64_t)sizeof(float);
    case UNITS: return m * w->k * (int64_t)sizeof(float);
    case FIXED: return m * w->k * (int64_t)sizeof(int16_t) + m * w->k / 8 * (int64_t)sizeof(float);
    default: return 0;
    }
}

void multiply(const Matrix *w, int64_t m, const float *x, int64_t ld_x, float *y, int64_t ld_y, void *scratch, int threads) {
    Product p = prepare(w, m, x, ld_x, scratch);
    p.y = y;
    p.ld_y = ld_y;
    const int many = threads > 1 && w->n * w->k * work_of[w->kind] > PARALLEL_BYTES;
#pragma omp parallel for num_threads(threads) if (many) schedule(static)
    for (int64_t from = 0; from < w->n; from += ROWS_OF_A_TURN)
        multiply_block(&p, m, from, w->n - from < ROWS_OF_A_TURN ? w->n : from + ROWS_OF_A_TURN);
}

void multiply_once(const Matrix *w, int64_t m, const float *x, int64_t ld, float *y, void *scratch, int threads) {
    multiply(w, m, x, ld, y, w->n, scratch, threads);
}

/* One row of codes as float32. */
INLINE void unpack_codes(const Matrix *w, const int bits, int64_t first, float *y) {
    const uint8_t *packed = w->values;
    const int64_t group = w->group_bits;
    const Levels levels = repeated_levels(w->levels, bits);
    for (int64_t c = 0; c < w->k;) {
        const int64_t at = first + c;
        const float scale = w->scales[at >> group];
        if (at % LANES == 0 && w->k - c >= LANES) {
            const uint8_t *p = packed + at * bits / 8;
            UNROLL
            for (int i = 0; i < PIECES; i++) put(y + c + i * WIDTH, levels_at(&levels, codes_in_order(p, bits, i), bits) * scale);
            c += LANES;
        } else {
            y[c++] = w->levels[code_at(packed, at, bits)] * scale;
        }
    }
}

/* One row of floats or integers. */
INLINE void unpack_stored(const Matrix *w, const int kind, int64_t row, float *y) {
    const float scale = kind == INT8 ? w->scales[row] : 1.0f;
    for (int64_t c = 0; c < w->k; c += WIDTH)
        put_part(y + c, stored_part(kind, w->values, row * w->k + c, w->k - c) * scale, w->k - c);
}

/* One row as float32, y [k]. */
static void unpack_row(const Matrix *w, int64_t row, float *y) {
    switch (w->kind) {
    case FLOAT32: unpack_stored(w, FLOAT32, row, y); break;
    case FLOAT16: unpack_stored(w, FLOAT16, row, y); break;
    case INT8: unpack_stored(w, INT8, row, y); break;
    case CODES4: unpack_codes(w, 4, row * w->k, y); break;
    case CODES3: unpack_codes(w, 3, row * w->k, y); break;
    case CODES2: unpack_codes(w, 2, row * w->k, y); break;
    }
}

/* The whole matrix as float32, y [n, k]. */
void unpack(const Matrix *w, float *y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < w->n; row++) unpack_row(w, row, y + row * w->k);
}

int64_t look_up(const Matrix *w, int64_t m, const int64_t *rows, float *y) {
    for (int64_t i = 0; i < m; i++) {
        if (rows[i] < 0 || rows[i] >= w->n) return i;
        unpack_row(w, rows[i], y + i * w->k);
    }
    return -1;
}

/* The sum of each row of int8 values [n, k]. */
void row_sums(int64_t n, int64_t k, const int8_t *values, int32_t *sums) {
    for (int64_t row = 0; row < n; row++) {
        int32_t sum = 0;
        for (int64_t c = 0; c < k; c++) sum += values[row * k + c];
        sums[row] = sum;
    }
}
