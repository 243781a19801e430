/* Products of many inputs with a weight, the passes before and after them inside: inputs are quantised or split block by
 * block, and sums are scaled while they are near. */
#include "work.h"

/* Whether these functions take this matrix. */
int takes_many(const Matrix *w) {
    (void)w;
    return 1;
}

/* Whether floats are multiplied by AMX. */
int multiplies_by_amx(void) { return amx_allowed(); }

/* Whether integers are multiplied by AVX-512, four products at a time, or by AMX. */
int has_vnni(void) {
#ifdef HAS_VNNI
    return 1;
#else
    return 0;
#endif
}

int64_t packed_bytes(const Matrix *w) {
    const Plan plan = plan_of(w);
    return panels_of(w) * panel_bytes(&plan);
}

int64_t inputs_bytes(const Matrix *w, int threads) { return group_bytes(w) + blocks_bytes(w, threads); }

void pack_many(const Matrix *w, void *packed, int threads) {
    const Work work = work_of(w, packed, 1, 1, NULL, 1);
    lay_panels(&work, threads);
}

/* Some rows of y and of the residual. */
typedef struct {
    const float *residual;
    float *y;
    int64_t ld;
} Outputs;

/* A panel's sums of a block of inputs, scaled, and all that is added to them. */
static void finish_panel(const Plan *plan, int64_t panel, const int32_t *sums, const float *scales, int64_t rows,
                         const Outputs *to) {
    const Matrix *w = plan->of;
    for (int v = 0; v < VECTORS && left_of(w, panel, v) > 0; v++) {
        const int64_t column = panel * PANEL + v * WIDTH, left = left_of(w, panel, v);
        Register scale = {0}, bias = {0};
        if (w->kind == INT8) scale = get_part(w->scales + column, left);
        if (w->bias) bias = get_part(w->bias + column, left);
        for (int64_t i = 0; i < rows; i++) {
            Register value = as_floats(plan, sums + i * PANEL + v * WIDTH);
            if (w->kind == INT8) value = value * scale * scales[i];
            if (to->residual) value += get_part(to->residual + i * to->ld + column, left);
            put_part(to->y + i * to->ld + column, value + bias, left);
        }
    }
}

static void multiply_block(const Work *work, const float *x, int64_t ld, int64_t rows, const Outputs *to) {
    const Plan *plan = &work->plan;
    float scales[BLOCK];
    int32_t sums[BLOCK * PANEL] __attribute__((aligned(64)));
    TileConfig before;
    const Inputs a = lay_inputs(plan, x, ld, rows, BLOCK, own_block(work), scales);
    open_tiles(plan, &before);
    for (int64_t panel = work->first; panel < until(work); panel++) {
        multiply_panel(plan, panel, panel_at(work, panel), &a, rows, BLOCK, sums);
        finish_panel(plan, panel, sums, scales, rows, to);
    }
    close_tiles(plan, &before);
}

/* y [m, n] (`ld_y` between rows) = x [m, k] (`ld_x`), quantised if the matrix says so, times the matrix transposed, plus
 * bias, plus `residual`, or none. `packed`: of `pack_many`; NULL: panels are laid out on the way. */
void multiply_packed(const Matrix *w, void *packed, int64_t m, const float *x, int64_t ld_x, const float *residual,
                     float *y, int64_t ld_y, void *inputs, int threads) {
    if (m == 0) return;
    Work work = work_of(w, packed, m, INTEGERS, inputs, threads);
    for (; work.first < panels_of(w); work.first += work.panels) {
        if (!packed) lay_panels(&work, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t from = 0; from < m; from += work.block) {
            const Outputs to = {residual ? residual + from * ld_y : NULL, y + from * ld_y, ld_y};
            multiply_block(&work, x + from * ld_x, ld_x, m - from < work.block ? m - from : work.block, &to);
        }
    }
}

void multiply_many(const Matrix *w, int64_t m, const float *x, int64_t ld, float *y, void *scratch, int threads) {
    multiply_packed(w, NULL, m, x, ld, NULL, y, w->n, scratch, threads);
}
