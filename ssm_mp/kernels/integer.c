/* Products of many int8 inputs with an int8 weight, the passes before and after them inside: inputs are quantised block
 * by block, sums are scaled (or, of a head, enter the log-sum-exp) while they are in registers, and are never stored.
 *
 * Needs VNNI. The instruction multiplies unsigned with signed: 128 is added to the inputs, and −128 · the sum of a row
 * of weights is what its sums start from.
 *
 * Dimensions: m inputs, k inner and n outputs of a product; a panel is 64 outputs, a block 24 inputs, a tile 6 by 64.
 */
#include <math.h>

#include "matrix.h"
#include "quantize.h"

enum { TALL = 6, WIDE = 4, BLOCK = 4 * TALL, PANEL = WIDE * LANES, MOST_INNER = 2048 };

/* Whether these functions take this matrix. */
int takes_many(const Matrix *w) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return w->kind == INT8 && w->inputs != INPUTS_AS_THEY_ARE && w->k <= MOST_INNER;
#else
    (void)w;
    return 0;
#endif
}

static int64_t steps_of(const Matrix *w) { return (w->k + 3) / 4; }
static int64_t panels_of(const Matrix *w) { return (w->n + PANEL - 1) / PANEL; }

/* Bytes of scratch, aligned to 64, that the functions below need. */
int64_t many_scratch_bytes(const Matrix *w) { return panels_of(w) * PANEL * (steps_of(w) * 4 + (int64_t)sizeof(int32_t)); }

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

typedef struct {
    const Matrix *of;
    int64_t steps;
    const int8_t *panels;  /* [n / 64][k / 4][64][4], zeros beyond the matrix */
    const int32_t *starts; /* [n / 64][64] */
} Packed;

/* Four values of each of sixteen rows from `row` and column `c` on; zeros beyond the matrix. */
INLINE __m512i four_of_sixteen(const Matrix *w, int64_t row, int64_t c) {
    const int8_t *values = (const int8_t *)w->values + row * w->k + c;
    if (row + LANES <= w->n && c + 4 <= w->k) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_i32gather_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)w->k)), values, 1);
    }
    int8_t held[LANES][4] = {{0}};
    for (int i = 0; i < LANES && row + i < w->n; i++)
        for (int j = 0; j < 4 && c + j < w->k; j++) held[i][j] = values[i * w->k + j];
    return _mm512_loadu_si512(held);
}

static Packed pack(const Matrix *w, void *scratch, int threads) {
    const int64_t steps = steps_of(w), panels = panels_of(w);
    int8_t *packed = scratch;
    int32_t *starts = (int32_t *)(packed + panels * PANEL * steps * 4);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        for (int64_t s = 0; s < steps; s++)
            for (int v = 0; v < WIDE; v++)
                _mm512_storeu_si512(packed + ((p * steps + s) * WIDE + v) * 64, four_of_sixteen(w, p * PANEL + v * LANES, s * 4));
        for (int64_t i = p * PANEL; i < (p + 1) * PANEL; i++) starts[i] = i < w->n ? -128 * w->sums[i] : 0;
    }
    return (Packed){w, steps, packed, starts};
}

/* Quantised inputs plus 128, row after row, up to a whole block, and each row's scale: NaN where one is not finite. */
static void quantize_block(const Packed *w, const float *x, int64_t ld, int64_t rows, uint8_t *a, float *scales) {
    const int64_t k = w->of->k;
    for (int64_t i = 0; i < rows; i++, x += ld, a += w->steps * 4) {
        v16 poison = splat(0.0f);
        const float scale = w->of->inputs == DYNAMIC_INPUTS ? scale_of_row(x, k, SMALLEST_SCALE) : w->of->input_scale;
        quantize_row(x, k, scale, 128, (int8_t *)a, &poison);
        scales[i] = scale + sum16(poison);
    }
}

/* The integer sums of six inputs with a panel. */
INLINE void multiply_tile(const Packed *w, int64_t panel, const uint8_t *a, __m512i sums[TALL][WIDE]) {
    const int8_t *b = w->panels + panel * PANEL * w->steps * 4;
    const int64_t row = w->steps * 4;
#pragma GCC unroll 6
    for (int i = 0; i < TALL; i++)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) sums[i][v] = _mm512_loadu_si512(w->starts + panel * PANEL + v * LANES);
    for (int64_t s = 0; s < w->steps; s++, a += 4, b += PANEL * 4) {
        __m512i weights[WIDE];
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) weights[v] = _mm512_loadu_si512(b + v * 64);
#pragma GCC unroll 6
        for (int i = 0; i < TALL; i++) {
            int32_t four;
            memcpy(&four, a + i * row, 4);
            const __m512i input = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; v++) sums[i][v] = _mm512_dpbusd_epi32(sums[i][v], input, weights[v]);
        }
    }
}

/* The same by way of memory, so that what is done with the sums takes no registers from the product. */
static __attribute__((noinline)) void store_tile(const Packed *w, int64_t panel, const uint8_t *a, int32_t *sums) {
    __m512i held[TALL][WIDE];
    multiply_tile(w, panel, a, held);
#pragma GCC unroll 6
    for (int i = 0; i < TALL; i++)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) _mm512_storeu_si512(sums + i * PANEL + v * LANES, held[i][v]);
}

/* Lanes of vector `v` of a panel that are outputs. */
INLINE int lanes_of(const Packed *w, int64_t panel, int v) {
    const int64_t left = w->of->n - panel * PANEL - v * LANES;
    return left >= LANES ? LANES : left > 0 ? (int)left : 0;
}

static void linear_block(const Packed *w, const float *x, int64_t ld, int64_t rows, float *y) {
    uint8_t a[BLOCK * MOST_INNER];
    float scales[BLOCK];
    const int64_t panels = panels_of(w->of), n = w->of->n;
    quantize_block(w, x, ld, rows, a, scales);
    for (int64_t p = 0; p < panels; p++)
        for (int64_t from = 0; from < rows; from += TALL) {
            __m512i sums[TALL][WIDE];
            multiply_tile(w, p, a + from * w->steps * 4, sums);
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; v++) {
                const int64_t column = p * PANEL + v * LANES;
                const int count = lanes_of(w, p, v);
                if (count == 0) continue;
                const v16 scale = load_part(w->of->scales + column, count);
                const v16 bias = w->of->bias ? load_part(w->of->bias + column, count) : splat(0.0f);
#pragma GCC unroll 6
                for (int i = 0; i < TALL; i++)
                    if (from + i < rows)
                        store_part(y + (from + i) * n + column,
                                   (v16)_mm512_cvtepi32_ps(sums[i][v]) * scale * splat(scales[from + i]) + bias, count);
            }
        }
}

/* One row's sum of 2^(score − top) over the panels so far; scores are logits · log2 e. */
typedef struct {
    float top;
    v16 recent;                   /* of the panels since the last time that it was added to the others */
    __m512d total[2];
} LogSum;

enum { RECENT = 16 };   /* panels that float32 adds well */
#define HEADROOM 64.0f  /* how far above `top` a score may be */

INLINE void add_recent(LogSum *sum) {
    sum->total[0] = _mm512_add_pd(sum->total[0], _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)sum->recent)));
    sum->total[1] = _mm512_add_pd(sum->total[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)sum->recent, 1)));
    sum->recent = splat(0.0f);
}

/* Measure from `higher` above the old top. */
static void raise_top(LogSum *sum, float higher) {
    const __m512d factor = _mm512_set1_pd(exp2(-(double)higher));
    add_recent(sum);
    for (int half = 0; half < 2; half++) sum->total[half] = _mm512_mul_pd(sum->total[half], factor);
    sum->top += higher;
}

/* Add a panel's scores, given above the row's top. */
INLINE void add_scores(LogSum *sum, v16 above[WIDE], int first) {
    const __m512 largest = _mm512_max_ps(_mm512_max_ps((__m512)above[0], (__m512)above[1]),
                                         _mm512_max_ps((__m512)above[2], (__m512)above[3]));
    if (__builtin_expect(first || _mm512_cmp_ps_mask(largest, (__m512)splat(HEADROOM), _CMP_GT_OQ), 0)) {
        const float higher = _mm512_reduce_max_ps(largest);
        raise_top(sum, higher);
        for (int v = 0; v < WIDE; v++) above[v] = above[v] - splat(higher);
    }
    sum->recent = sum->recent + ((exp2_16(above[0]) + exp2_16(above[1])) + (exp2_16(above[2]) + exp2_16(above[3])));
}

INLINE double natural_log(const LogSum *sum) {
    return log(_mm512_reduce_add_pd(_mm512_add_pd(sum->total[0], sum->total[1])));
}

static void nll_block(const Packed *w, const float *x, int64_t ld, int64_t rows, const int64_t *targets, double *nll) {
    uint8_t a[BLOCK * MOST_INNER];
    float scales[BLOCK];
    LogSum rows_sums[BLOCK];
    const int64_t panels = panels_of(w->of);
    quantize_block(w, x, ld, rows, a, scales);
    for (int64_t i = 0; i < rows; i++) rows_sums[i] = (LogSum){0};
    for (int64_t p = 0; p < panels; p++) {
        v16 scale[WIDE];
        int count[WIDE];
        for (int v = 0; v < WIDE; v++) {
            count[v] = lanes_of(w, p, v);
            scale[v] = load_part(w->of->scales + p * PANEL + v * LANES, count[v]);
        }
        for (int64_t from = 0; from < rows; from += TALL) {
            int32_t sums[TALL * PANEL] __attribute__((aligned(64)));
            store_tile(w, p, a + from * w->steps * 4, sums);
            for (int i = 0; i < TALL && from + i < rows; i++) {
                LogSum *sum = &rows_sums[from + i];
                const float factor = scales[from + i] * LOG2_E;
                v16 above[WIDE];
#pragma GCC unroll 4
                for (int v = 0; v < WIDE; v++) {
                    above[v] = (v16)_mm512_cvtepi32_ps(_mm512_load_si512(sums + i * PANEL + v * LANES)) * scale[v] * splat(factor) -
                               splat(sum->top);
                    if (count[v] < LANES)
                        for (int j = count[v]; j < LANES; j++) above[v][j] = -INFINITY;
                }
                add_scores(sum, above, p == 0);
            }
        }
        if (p % RECENT == RECENT - 1)
            for (int64_t i = 0; i < rows; i++) add_recent(&rows_sums[i]);
    }
    for (int64_t i = 0; i < rows; i++) {
        const int8_t *row = (const int8_t *)w->of->values + targets[i] * w->of->k;
        int32_t dot = w->starts[targets[i]];
        for (int64_t c = 0; c < w->of->k; c++) dot += (int32_t)a[i * w->steps * 4 + c] * row[c];
        const double wanted = (double)dot * w->of->scales[targets[i]] * scales[i];
        add_recent(&rows_sums[i]);
        nll[i] = natural_log(&rows_sums[i]) + rows_sums[i].top * M_LN2 - wanted;
    }
}

/* y [m, n] = x [m, k] (`ld` between rows), quantised, times the matrix transposed, scaled, plus bias. */
void multiply_many(const Matrix *w, int64_t m, const float *x, int64_t ld, float *y, void *scratch, int threads) {
    const Packed packed = pack(w, scratch, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t from = 0; from < m; from += BLOCK)
        linear_block(&packed, x + from * ld, ld, m - from < BLOCK ? m - from : BLOCK, y + from * w->n);
}

/* Negative log-likelihoods [m] of targets [m] where those products, without bias, are logits. */
void nll_many(const Matrix *w, int64_t m, const float *x, int64_t ld, const int64_t *targets, double *nll, void *scratch,
              int threads) {
    const Packed packed = pack(w, scratch, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t from = 0; from < m; from += BLOCK)
        nll_block(&packed, x + from * ld, ld, m - from < BLOCK ? m - from : BLOCK, targets + from, nll + from);
}

#endif
