/* Likelihoods and divergences of many inputs of a head: its sums are scaled, and enter log-sum-exps, while they are near.
 *
 * Scores are logits · log2 e. Those of one head are the same numbers whether another is beside it or not: each pass below
 * is a function of its own that leaves them in memory, or a compiler would fuse products with sums where it can.
 *
 * Dimensions: m inputs of a head.
 */
#include "log_sum.h"
#include "work.h"

#define APART static __attribute__((noinline))

/* What is known of one input. */
typedef struct {
    LogSum y;          /* of the head whose likelihoods are asked for */
    double target;     /* its logit of the target */
} Scored;

/* The same beside another head's scores x: Σ 2^(x − top of x) (x − y). */
typedef struct {
    Scored own;
    LogSum x;
    Sum difference;
} Compared;

/* One head at work on a block. */
typedef struct {
    const Work *work;
    Inputs a;
    float scales[BLOCK];
    int32_t sums[BLOCK * PANEL] __attribute__((aligned(64))); /* afterwards scores, float32 */
} Side;

static void open_side(Side *side, const Work *work, const float *x, int64_t ld, int64_t rows) {
    side->work = work;
    side->a = lay_inputs(&work->plan, x, ld, rows, BLOCK, own_block(work), side->scales);
}

/* The logit of one of a panel's outputs, of a sum not yet scaled. */
INLINE double logit_of(const Side *side, int64_t panel, int64_t row, int64_t target) {
    const Matrix *w = side->work->plan.of;
    const int32_t *sum = side->sums + row * PANEL + target - panel * PANEL;
    float found;
    memcpy(&found, sum, sizeof found);
    const double product = side->work->plan.integers ? *sum : found;
    return w->kind == INT8 ? product * w->scales[target] * side->scales[row] : product;
}

/* A panel's sums of a block. */
APART void multiply_side(Side *side, int64_t panel, int64_t rows) {
    const Work *work = side->work;
    multiply_panel(&work->plan, panel, panel_at(work, panel), &side->a, rows, BLOCK, side->sums);
}

/* Sums become scores, zeros beyond the outputs. */
APART void scale_side(Side *side, int64_t panel, int64_t rows) {
    const Plan *plan = &side->work->plan;
    const Matrix *w = plan->of;
    for (int v = 0; v < VECTORS; v++) {
        const int64_t left = left_of(w, panel, v);
        Register scale = (Register){0} + 1.0f;
        if (w->kind == INT8 && left > 0) scale = get_part(w->scales + panel * PANEL + v * WIDTH, left);
        for (int64_t i = 0; i < rows; i++) {
            int32_t *at = side->sums + i * PANEL + v * WIDTH;
            Register score = {0};
            if (left > 0) score = as_floats(plan, at) * scale * (side->scales[i] * LOG2_E);
            put((float *)at, score);
        }
    }
}

/* A row's scores above its top; nothing of what lies beyond the outputs. Where one is not finite the sum becomes NaN. */
INLINE void above_top(const Side *side, int64_t panel, int64_t row, LogSum *sum, Register above[VECTORS]) {
    const float *score = (const float *)side->sums + row * PANEL;
    Register spoilt = {0};
    UNROLL
    for (int v = 0; v < VECTORS; v++) {
        above[v] = get(score + v * WIDTH) - sum->top;
        spoilt += above[v] * 0.0f;
    }
    sum->sum.recent[0] += spoilt;
    const int64_t left = left_of(side->work->plan.of, panel, 0);
    if (__builtin_expect(left < PANEL, 0)) {
        float held[PANEL];
        memcpy(held, above, sizeof held);
        for (int64_t i = left; i < PANEL; i++) held[i] = -INFINITY;
        memcpy(above, held, sizeof held);
    }
}

/* A panel's scores of one row enter its log-sum-exp; `term`: what each adds to it. */
INLINE void score_row(const Side *side, int64_t panel, int64_t row, LogSum *sum, Register term[VECTORS]) {
    above_top(side, panel, row, sum, term);
    add_scores(sum, term, panel == 0);
}

/* The same panels whatever is laid out at once, or sums would be others. */
INLINE int is_end(const Work *work, int64_t panel) {
    return panel % RECENT == RECENT - 1 || panel == panels_of(work->plan.of) - 1;
}

/* A panel's scores of a block. */
APART void score_block(const Side *side, int64_t panel, int64_t rows, Scored *of_row, int64_t stride) {
    for (int64_t i = 0; i < rows; i++) {
        Scored *own = (Scored *)((char *)of_row + i * stride);
        Register term[VECTORS];
        score_row(side, panel, i, &own->y, term);
        if (is_end(side->work, panel)) add_recent(&own->y.sum);
    }
}

/* The same, of the other head too. */
APART void compare_block(const Side *y, const Side *x, int64_t panel, int64_t rows, Compared *of_row) {
    for (int64_t i = 0; i < rows; i++) {
        Compared *own = &of_row[i];
        Register term[VECTORS];
        const float top = own->x.top;
        const float *score_x = (const float *)x->sums + i * PANEL, *score_y = (const float *)y->sums + i * PANEL;
        score_row(x, panel, i, &own->x, term);
        if (own->x.top != top) /* what is measured from the old top shrinks with it */
            shrink(&own->difference, panel ? exp2((double)top - (double)own->x.top) : 0.0);
        UNROLL
        for (int v = 0; v < VECTORS; v++) term[v] = term[v] * (get(score_x + v * WIDTH) - get(score_y + v * WIDTH));
        add_terms(&own->difference, term);
        if (is_end(x->work, panel)) {
            add_recent(&own->x.sum);
            add_recent(&own->difference);
        }
    }
}

/* The logits of a block's targets that are among a panel's outputs. */
APART void find_targets(const Side *side, int64_t panel, int64_t rows, const int64_t *targets, Scored *of_row, int64_t stride) {
    for (int64_t i = 0; i < rows; i++)
        if (targets[i] / PANEL == panel) ((Scored *)((char *)of_row + i * stride))->target = logit_of(side, panel, i, targets[i]);
}

static void nll_block(const Work *work, const float *x, int64_t ld, int64_t rows, const int64_t *targets, Scored *of_row) {
    Side side;
    TileConfig before;
    open_side(&side, work, x, ld, rows);
    open_tiles(&work->plan, &before);
    for (int64_t panel = work->first; panel < until(work); panel++) {
        multiply_side(&side, panel, rows);
        find_targets(&side, panel, rows, targets, of_row, sizeof *of_row);
        scale_side(&side, panel, rows);
        score_block(&side, panel, rows, of_row, sizeof *of_row);
    }
    close_tiles(&work->plan, &before);
}

/* `work`: of y, then of x. */
static void divergence_block(const Work work[2], const float *const inputs[2], const int64_t ld[2], int64_t rows,
                             const int64_t *targets, Compared *of_row) {
    Side y, x;
    TileConfig before;
    open_side(&y, &work[0], inputs[0], ld[0], rows);
    open_side(&x, &work[1], inputs[1], ld[1], rows);
    open_tiles(&work[0].plan, &before);
    for (int64_t panel = work[0].first; panel < until(&work[0]); panel++) {
        multiply_side(&y, panel, rows);
        find_targets(&y, panel, rows, targets, &of_row->own, sizeof *of_row);
        scale_side(&y, panel, rows);
        multiply_side(&x, panel, rows);
        scale_side(&x, panel, rows);
        score_block(&y, panel, rows, &of_row->own, sizeof *of_row);
        compare_block(&y, &x, panel, rows, of_row);
    }
    close_tiles(&work[0].plan, &before);
}

APART double nll_of(const Scored *row) { return log_of(&row->y) - row->target; }

/* In nats. */
static double kl_of(const Compared *row) {
    const double mean = whole_of(&row->difference) / whole_of(&row->x.sum) * M_LN2;
    return mean - log_of(&row->x) + log_of(&row->own.y);
}

/* Bytes of scratch, aligned to 64, of `nll_many`, and of `divergence_many` if there is another head; those that are laid
 * out beforehand need less. */
int64_t scored_scratch_bytes(const Matrix *w, const Matrix *other, int64_t m, int threads) {
    const int64_t own = group_bytes(w) + blocks_bytes(w, threads);
    if (!other) return own + m * (int64_t)sizeof(Scored);
    return own + group_bytes(other) + blocks_bytes(other, threads) + m * (int64_t)sizeof(Compared);
}

/* Negative log-likelihoods [m] of targets [m] where the products of x [m, k], without bias, are logits. `packed`: of
 * `pack_many`; NULL: panels are laid out on the way. */
void nll_many(const Matrix *w, void *packed, int64_t m, const float *x, int64_t ld, const int64_t *targets, double *nll,
              void *scratch, int threads) {
    if (m == 0) return;
    int8_t *rest = (int8_t *)scratch + m * sizeof(Scored);
    Scored *of_row = scratch;
    Work work = work_of(w, packed, m, SCORED_INTEGERS, rest, threads);
    memset(of_row, 0, m * sizeof(Scored));
    for (; work.first < panels_of(w); work.first += work.panels) {
        if (!packed) lay_panels(&work, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t from = 0; from < m; from += work.block)
            nll_block(&work, x + from * ld, ld, m - from < work.block ? m - from : work.block, targets + from, of_row + from);
    }
    for (int64_t i = 0; i < m; i++) nll[i] = nll_of(&of_row[i]);
}

/* The same, and the Kullback–Leibler divergence [m] of the logits that `w` makes of y from those that `expected` makes of
 * x, both [m, k]; neither has a bias. `packed`: of either, or NULL. */
void divergence_many(const Matrix *w, void *packed, const Matrix *expected, void *packed_expected, int64_t m, const float *y,
                     int64_t ld_y, const float *x, int64_t ld_x, const int64_t *targets, double *nll, double *kl,
                     void *scratch, int threads) {
    if (m == 0) return;
    const int64_t ld[2] = {ld_y, ld_x};
    Compared *of_row = scratch;
    int8_t *rest = (int8_t *)scratch + m * sizeof(Compared);
    Work work[2] = {work_of(w, packed, m, SCORED_INTEGERS, rest, threads)};
    rest += group_bytes(w) + blocks_bytes(w, threads);
    work[1] = work_of(expected, packed_expected, m, SCORED_INTEGERS, rest, threads);
    /* as many inputs of either, in whole tiles of both, and as many panels */
    const int64_t block = work[0].block > work[1].block ? work[0].block : work[1].block;
    const int64_t panels = work[0].panels < work[1].panels ? work[0].panels : work[1].panels;
    for (int which = 0; which < 2; which++) work[which].block = block, work[which].panels = panels;
    memset(of_row, 0, m * sizeof(Compared));
    for (int64_t first = 0; first < panels_of(w); first += panels) {
        for (int which = 0; which < 2; which++) {
            work[which].first = first;
            if (!work[which].whole) lay_panels(&work[which], threads);
        }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t from = 0; from < m; from += block) {
            const float *const here[2] = {y + from * ld_y, x + from * ld_x};
            divergence_block(work, here, ld, m - from < block ? m - from : block, targets + from, of_row + from);
        }
    }
    for (int64_t i = 0; i < m; i++) {
        nll[i] = nll_of(&of_row[i].own);
        kl[i] = kl_of(&of_row[i]);
    }
}
