/* Products of many inputs with a weight, the passes before and after them inside: inputs are quantised or split block by
 * block, and sums are scaled, or, of a head, enter the log-sum-exp, while they are near.
 *
 * Dimensions: m inputs, k inner and n outputs of a product; a panel is 64 outputs, a block some dozens of inputs.
 */
#include <math.h>

#include "log_sum.h"
#include "tiles.h"

int omp_get_thread_num(void); /* its header belongs to a library that a compiler may come without */

/* Whether these functions take this matrix. */
int takes_many(const Matrix *w) {
#ifdef HAS_VNNI
    return (w->kind == INT8 && w->inputs != INPUTS_AS_THEY_ARE) || (w->kind == FLOAT16 && amx_allowed());
#else
    (void)w;
    return 0;
#endif
}

/* Whether float16 weights are multiplied by AMX. */
int multiplies_by_amx(void) {
#ifdef HAS_VNNI
    return amx_allowed();
#else
    return 0;
#endif
}

#ifdef HAS_VNNI

/* Inputs of a block at most: with floats as many as weights are worth fetching for; with integers, whose products are soon
 * done, as few as leave their sums near the core. */
enum { BLOCK = 192, INTEGERS = 96, SCORED_INTEGERS = 32, GROUP_BYTES = 1 << 22 };

/* Packed panels, then for each thread a block of inputs. */
typedef struct {
    Plan plan;
    int64_t first, panels; /* those that are packed */
    int8_t *packed, *inputs;
    int64_t block;         /* inputs that a thread takes at a time */
} Work;

INLINE int64_t panels_of(const Matrix *w) { return (w->n + PANEL - 1) / PANEL; }
INLINE int64_t block_bytes(const Plan *plan) { return BLOCK * plan->input_pieces * input_bytes(plan); }

/* Panels that `multiply_many` packs at once. */
INLINE int64_t group_of(const Plan *plan) {
    const int64_t all = panels_of(plan->of), some = GROUP_BYTES / panel_bytes(plan);
    return all <= some ? all : some > 0 ? some : 1;
}

/* Bytes of scratch, aligned to 64, for `multiply_many`. */
int64_t many_scratch_bytes(const Matrix *w, int threads) {
    const Plan plan = plan_of(w);
    return group_of(&plan) * panel_bytes(&plan) + threads * block_bytes(&plan);
}

/* The same for `nll_many`, and of each of the two heads for `divergence_many`. */
int64_t scored_scratch_bytes(const Matrix *w, int threads) { return packed_bytes(w) + inputs_bytes(w, threads); }

int64_t packed_bytes(const Matrix *w) {
    const Plan plan = plan_of(w);
    return panels_of(w) * panel_bytes(&plan);
}

int64_t inputs_bytes(const Matrix *w, int threads) {
    const Plan plan = plan_of(w);
    return threads * block_bytes(&plan);
}

/* `m` inputs, up to `most` of them in a block, which is then filled up to whole tiles, and as many in each. */
static Work make_work(const Matrix *w, int64_t panels, int64_t m, int64_t most, void *packed, void *inputs, int threads) {
    const Plan plan = plan_of(w);
    const int64_t share = (m + threads - 1) / threads, blocks = (share + most - 1) / most, even = (share + blocks - 1) / blocks;
    return (Work){plan, 0, panels, packed, inputs, (even + plan.tall - 1) / plan.tall * plan.tall};
}

static void pack(const Work *work, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t p = 0; p < work->panels; p++)
        pack_panel(&work->plan, work->first + p, work->packed + p * panel_bytes(&work->plan));
}

/* Lanes of vector `v` of a panel that are outputs. */
INLINE int lanes_of(const Matrix *w, int64_t panel, int v) {
    const int64_t left = w->n - panel * PANEL - v * LANES;
    return left >= LANES ? LANES : left > 0 ? (int)left : 0;
}

/* Sixteen sums as float32, without their scales. */
INLINE v16 as_floats(const Matrix *w, const int32_t *sums) {
    if (w->kind == FLOAT16) return load((const float *)sums);
    return (v16)_mm512_cvtepi32_ps(_mm512_loadu_si512(sums));
}

static void linear_block(const Work *work, const float *x, int64_t ld, int64_t rows, const float *residual, float *y) {
    const Plan *plan = &work->plan;
    const Matrix *w = plan->of;
    int8_t *a = work->inputs + omp_get_thread_num() * block_bytes(plan);
    float scales[BLOCK];
    int32_t sums[BLOCK * PANEL] __attribute__((aligned(64)));
    TileConfig before;
    lay_inputs(plan, x, ld, rows, BLOCK, a, scales);
    open_tiles(plan, &before);
    for (int64_t p = 0; p < work->panels && work->first + p < panels_of(w); p++) {
        const int64_t panel = work->first + p;
        multiply_panel(plan, panel, work->packed + p * panel_bytes(plan), a, rows, BLOCK, sums);
        for (int v = 0; v < WIDE; v++) {
            const int64_t column = panel * PANEL + v * LANES;
            const int count = lanes_of(w, panel, v);
            if (count == 0) break;
            const v16 scale = w->kind == INT8 ? load_part(w->scales + column, count) : splat(1.0f);
            const v16 bias = w->bias ? load_part(w->bias + column, count) : splat(0.0f);
            for (int64_t i = 0; i < rows; i++) {
                v16 value = as_floats(w, sums + i * PANEL + v * LANES);
                if (w->kind == INT8) value = value * scale * splat(scales[i]);
                if (residual) value = value + load_part(residual + i * w->n + column, count);
                store_part(y + i * w->n + column, value + bias, count);
            }
        }
    }
    close_tiles(plan, &before);
}

/* The scales of a panel's outputs. */
INLINE void scales_of_panel(const Matrix *w, int64_t panel, v16 scale[WIDE]) {
    for (int v = 0; v < WIDE; v++)
        scale[v] = w->kind == INT8 ? load_part(w->scales + panel * PANEL + v * LANES, lanes_of(w, panel, v)) : splat(1.0f);
}

/* A panel's scores of one row, logits · log2 e. `factor`: the scale of the row's inputs · log2 e. */
INLINE void scores_of_row(const Matrix *w, const int32_t *sums, const v16 scale[WIDE], float factor, v16 score[WIDE]) {
    /* with a rounding of its own, or compilers would fuse it with a sum where they can: scores of one head and of two
     * are the same numbers */
    enum { ROUNDED = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
    for (int v = 0; v < WIDE; v++) {
        const v16 scaled = as_floats(w, sums + v * LANES) * scale[v];
        score[v] = (v16)_mm512_mul_round_ps((__m512)scaled, (__m512)splat(factor), ROUNDED);
    }
}

/* They enter the row's log-sum-exp; `term`: what each adds to it, nothing beyond the outputs. */
INLINE void score_row(const Matrix *w, int64_t panel, const v16 score[WIDE], LogSum *sum, v16 term[WIDE]) {
    for (int v = 0; v < WIDE; v++) {
        term[v] = score[v] - splat(sum->top);
        for (int j = lanes_of(w, panel, v); j < LANES; j++) term[v][j] = -INFINITY;
    }
    add_scores(sum, term, panel == 0);
}

/* Float16 weights times inputs, summed as float64. */
static double dot_half(const uint16_t *weights, const float *x, int64_t k) {
    double sum = 0;
    for (int64_t c = 0; c < k; c++) sum += (double)_cvtsh_ss(weights[c]) * x[c];
    return sum;
}

/* A row's logit of one output. */
INLINE double logit(const Plan *plan, const int8_t *a, const float *x, float scale, int64_t target) {
    const Matrix *w = plan->of;
    if (w->kind == FLOAT16) return dot_half((const uint16_t *)w->values + target * w->k, x, w->k);
    const int8_t *row = (const int8_t *)w->values + target * w->k;
    int32_t sum = 0, dot = 0;
    if (plan->amx)
        for (int64_t c = 0; c < w->k; c++) sum += (int32_t)a[c] * row[c];
    else
        for (int64_t c = 0; c < w->k; c++) dot += (int32_t)(uint8_t)a[c] * row[c];
    return (double)(plan->amx ? sum : dot - 128 * w->sums[target]) * w->scales[target] * scale;
}

/* A row's negative log-likelihood of one output. A function of its own: the same number whoever asks for it. */
static __attribute__((noinline)) double nll_of(const LogSum *sum, const Plan *plan, const int8_t *a, const float *x,
                                               float scale, int64_t target) {
    return log_of(sum) - logit(plan, a, x, scale, target);
}

/* Two rows of scores, x and y: their log-sum-exps, and Σ 2^(x − top of x) (x − y). */
typedef struct {
    LogSum x, y;
    v16 recent;
    __m512d total[2];
} Divergence;

INLINE void add_recent_differences(Divergence *sum) {
    LogSum mixed = {0, sum->recent, {sum->total[0], sum->total[1]}};
    add_recent(&mixed);
    sum->recent = splat(0.0f);
    for (int half = 0; half < 2; half++) sum->total[half] = mixed.total[half];
}

/* A panel's scores of one row of each enter. */
INLINE void compare_row(const Matrix *of_x, const Matrix *of_y, int64_t panel, const v16 x[WIDE], const v16 y[WIDE],
                        Divergence *sum) {
    v16 term[WIDE];
    const float top = sum->x.top;
    score_row(of_y, panel, y, &sum->y, term);
    score_row(of_x, panel, x, &sum->x, term);
    if (sum->x.top != top) { /* what is measured from the old top shrinks with it */
        const __m512d shrunk = _mm512_set1_pd(panel ? exp2((double)top - (double)sum->x.top) : 0.0);
        add_recent_differences(sum);
        for (int half = 0; half < 2; half++) sum->total[half] = _mm512_mul_pd(sum->total[half], shrunk);
    }
    for (int v = 0; v < WIDE; v++) sum->recent = sum->recent + term[v] * (x[v] - y[v]);
}

/* One of two heads at work on a block. */
typedef struct {
    const Work *work;
    int8_t *a;
    float scales[BLOCK];
    v16 scale[WIDE];
    int32_t sums[BLOCK * PANEL] __attribute__((aligned(64)));
} Side;

static void open_side(Side *side, const Work *work, const float *x, int64_t ld, int64_t rows) {
    side->work = work;
    side->a = work->inputs + omp_get_thread_num() * block_bytes(&work->plan);
    for (int64_t i = 0; i < rows; i++) side->scales[i] = 1.0f;
    lay_inputs(&work->plan, x, ld, rows, BLOCK, side->a, side->scales);
}

static void multiply_side(Side *side, int64_t panel, int64_t rows) {
    const Plan *plan = &side->work->plan;
    scales_of_panel(plan->of, panel, side->scale);
    multiply_panel(plan, panel, side->work->packed + panel * panel_bytes(plan), side->a, rows, BLOCK, side->sums);
}

/* Scores of row `i`. */
INLINE void scores_of_side(const Side *side, int64_t i, v16 score[WIDE]) {
    scores_of_row(side->work->plan.of, side->sums + i * PANEL, side->scale, side->scales[i] * LOG2_E, score);
}

/* Rows of `work[0]` (y): negative log-likelihoods, and KL of the rows of `work[1]` (x) from them, in nats. */
static void divergence_block(const Work work[2], const float *const inputs[2], const int64_t ld[2], int64_t rows,
                             const int64_t *targets, double *nll, double *kl) {
    const Matrix *of_y = work[0].plan.of, *of_x = work[1].plan.of;
    Side y, x;
    Divergence of_row[BLOCK];
    TileConfig before;
    for (int64_t i = 0; i < rows; i++) of_row[i] = (Divergence){0};
    open_side(&y, &work[0], inputs[0], ld[0], rows);
    open_side(&x, &work[1], inputs[1], ld[1], rows);
    open_tiles(&work[0].plan, &before);
    for (int64_t p = 0; p < work[0].panels; p++) {
        multiply_side(&y, p, rows);
        multiply_side(&x, p, rows);
        for (int64_t i = 0; i < rows; i++) {
            v16 score_x[WIDE], score_y[WIDE];
            scores_of_side(&x, i, score_x);
            scores_of_side(&y, i, score_y);
            compare_row(of_x, of_y, p, score_x, score_y, &of_row[i]);
        }
        if (p % RECENT == RECENT - 1 || p == work[0].panels - 1)
            for (int64_t i = 0; i < rows; i++) {
                add_recent(&of_row[i].x);
                add_recent(&of_row[i].y);
                add_recent_differences(&of_row[i]);
            }
    }
    close_tiles(&work[0].plan, &before);
    for (int64_t i = 0; i < rows; i++) {
        const Divergence *sum = &of_row[i];
        const int8_t *a = y.a + i * input_bytes(&work[0].plan);
        nll[i] = nll_of(&sum->y, &work[0].plan, a, inputs[0] + i * ld[0], y.scales[i], targets[i]);
        kl[i] = whole_of(sum->total) / whole_of(sum->x.total) * M_LN2 - log_of(&sum->x) + log_of(&sum->y);
    }
}

/* The same of one head, without another to compare it with. */
static void nll_block(const Work *work, const float *x, int64_t ld, int64_t rows, const int64_t *targets, double *nll) {
    const Plan *plan = &work->plan;
    Side side;
    LogSum of_row[BLOCK];
    TileConfig before;
    for (int64_t i = 0; i < rows; i++) of_row[i] = (LogSum){0};
    open_side(&side, work, x, ld, rows);
    open_tiles(plan, &before);
    for (int64_t p = 0; p < work->panels; p++) {
        multiply_side(&side, p, rows);
        for (int64_t i = 0; i < rows; i++) {
            v16 score[WIDE], term[WIDE];
            scores_of_side(&side, i, score);
            score_row(plan->of, p, score, &of_row[i], term);
        }
        if (p % RECENT == RECENT - 1 || p == work->panels - 1)
            for (int64_t i = 0; i < rows; i++) add_recent(&of_row[i]);
    }
    close_tiles(plan, &before);
    for (int64_t i = 0; i < rows; i++)
        nll[i] = nll_of(&of_row[i], plan, side.a + i * input_bytes(plan), x + i * ld, side.scales[i], targets[i]);
}

static void multiply_panels(const Work *work, int64_t m, const float *x, int64_t ld, const float *residual, float *y,
                            int threads) {
    const int64_t n = work->plan.of->n;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t from = 0; from < m; from += work->block)
        linear_block(work, x + from * ld, ld, m - from < work->block ? m - from : work->block,
                     residual ? residual + from * n : NULL, y + from * n);
}

INLINE int64_t most_inputs(const Matrix *w) { return w->kind == FLOAT16 ? BLOCK : INTEGERS; }

void pack_many(const Matrix *w, void *packed, int threads) {
    const Work work = make_work(w, panels_of(w), 1, 1, packed, NULL, 1);
    pack(&work, threads);
}

void multiply_packed(const Matrix *w, void *packed, int64_t m, const float *x, int64_t ld, const float *residual, float *y,
                     void *inputs, int threads) {
    const Work work = make_work(w, panels_of(w), m, most_inputs(w), packed, inputs, threads);
    multiply_panels(&work, m, x, ld, residual, y, threads);
}

/* y [m, n] = x [m, k] (`ld` between rows), quantised if the matrix says so, times the matrix transposed, plus bias. */
void multiply_many(const Matrix *w, int64_t m, const float *x, int64_t ld, float *y, void *scratch, int threads) {
    const Plan plan = plan_of(w);
    const int64_t panels = group_of(&plan);
    Work work = make_work(w, panels, m, most_inputs(w), scratch, (int8_t *)scratch + panels * panel_bytes(&plan), threads);
    for (; work.first < panels_of(w); work.first += work.panels) {
        pack(&work, threads);
        multiply_panels(&work, m, x, ld, NULL, y, threads);
    }
}

/* Negative log-likelihoods [m] of targets [m] where those products, without bias, are logits. */
void nll_many(const Matrix *w, int64_t m, const float *x, int64_t ld, const int64_t *targets, double *nll, void *scratch,
              int threads) {
    const int64_t most = w->kind == FLOAT16 ? BLOCK : SCORED_INTEGERS;
    const Work work = make_work(w, panels_of(w), m, most, scratch, (int8_t *)scratch + packed_bytes(w), threads);
    pack(&work, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t from = 0; from < m; from += work.block)
        nll_block(&work, x + from * ld, ld, m - from < work.block ? m - from : work.block, targets + from, nll + from);
}

/* The same, and the Kullback–Leibler divergence [m] of the logits that `w` makes of y from those that `expected` makes of
 * x, both [m, k]; neither has a bias. */
void divergence_many(const Matrix *w, const Matrix *expected, int64_t m, const float *y, int64_t ld_y, const float *x,
                     int64_t ld_x, const int64_t *targets, double *nll, double *kl, void *scratch, int threads) {
    const Matrix *of[2] = {w, expected};
    const int64_t ld[2] = {ld_y, ld_x};
    const int64_t most = w->kind == FLOAT16 || expected->kind == FLOAT16 ? BLOCK : SCORED_INTEGERS;
    int8_t *packed = scratch;
    Work work[2];
    for (int which = 0; which < 2; which++) {
        work[which] = make_work(of[which], panels_of(w), m, most, packed, packed + packed_bytes(of[which]), threads);
        packed += scored_scratch_bytes(of[which], threads);
        pack(&work[which], threads);
    }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t from = 0; from < m; from += work[0].block) {
        const float *const here[2] = {y + from * ld_y, x + from * ld_x};
        divergence_block(work, here, ld, m - from < work[0].block ? m - from : work[0].block, targets + from, nll + from,
                         kl + from);
    }
}

#else
int64_t packed_bytes(const Matrix *w) { (void)w; return 0; }
int64_t inputs_bytes(const Matrix *w, int threads) { (void)w, (void)threads; return 0; }
void pack_many(const Matrix *w, void *packed, int threads) { (void)w, (void)packed, (void)threads; }
void multiply_packed(const Matrix *w, void *packed, int64_t m, const float *x, int64_t ld, const float *residual, float *y,
                     int64_t ld_y, void *inputs, int threads) { (void)w, (void)packed, (void)m, (void)x, (void)ld, (void)residual, (void)y, (void)ld_y, (void)inputs, (void)threads; }
#endif
