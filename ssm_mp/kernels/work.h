/* A product of many inputs at work: some panels of a weight laid out, shared by all threads, and for each thread a block
 * of inputs.
 *
 * Dimensions: m inputs, k inner and n outputs of a product; a panel is 64 outputs, a block some dozens of inputs.
 */
#ifndef SSM_MP_WORK_H
#define SSM_MP_WORK_H

#include "threads.h"
#include "tiles.h"

/* Inputs of a block at most: with floats as many as weights are worth fetching for; with integers, whose products are soon
 * done, as few as leave their sums near the core. And bytes of panels that are laid out on the way. */
enum { BLOCK = 192, INTEGERS = 96, GROUP_BYTES = 1 << 22 };
#ifdef HAS_VNNI
enum { SCORED_INTEGERS = 32 };
#else
enum { SCORED_INTEGERS = INTEGERS };
#endif

typedef struct {
    Plan plan;
    int64_t first, panels; /* those that are multiplied at a time */
    int8_t *packed, *inputs;
    int whole;             /* all panels were laid out beforehand */
    int64_t block;         /* inputs that a thread takes at a time */
} Work;

INLINE int64_t panels_of(const Matrix *w) { return (w->n + PANEL - 1) / PANEL; }

/* Of each thread. */
INLINE int64_t block_bytes(const Plan *plan) {
    return is_laid(plan) ? whole_lines(BLOCK * plan->input_pieces * input_bytes(plan)) : 0;
}

/* Panels that are laid out at once on the way. */
INLINE int64_t group_of(const Plan *plan) {
    const int64_t all = panels_of(plan->of), some = GROUP_BYTES / (panel_bytes(plan) + 1);
    return all <= some ? all : some > 0 ? some : 1;
}

/* Bytes of those. */
INLINE int64_t group_bytes(const Matrix *w) {
    const Plan plan = plan_of(w);
    return group_of(&plan) * panel_bytes(&plan);
}

/* Bytes of all threads' blocks. */
INLINE int64_t blocks_bytes(const Matrix *w, int threads) {
    const Plan plan = plan_of(w);
    return threads * block_bytes(&plan);
}

/* `m` inputs, up to BLOCK of them in a block, or `integers`; it is filled up to whole tiles, and each has as many. Panels
 * laid out beforehand, or NULL: they have place in `scratch` before the blocks. */
INLINE Work work_of(const Matrix *w, int8_t *packed, int64_t m, int64_t integers, int8_t *scratch, int threads) {
    const Plan plan = plan_of(w);
    const int64_t most = plan.integers ? integers : BLOCK;
    const int64_t share = (m + threads - 1) / threads, blocks = (share + most - 1) / most, even = (share + blocks - 1) / blocks;
    const int64_t block = (even + plan.tall - 1) / plan.tall * plan.tall;
    if (packed) return (Work){plan, 0, panels_of(w), packed, scratch, 1, block};
    const int64_t panels = group_of(&plan);
    return (Work){plan, 0, panels, scratch, scratch + panels * panel_bytes(&plan), 0, block};
}

/* Panels from `first` on that are there. */
INLINE int64_t until(const Work *work) {
    const int64_t all = panels_of(work->plan.of), end = work->first + work->panels;
    return end < all ? end : all;
}

/* Where a panel lies. */
INLINE int8_t *panel_at(const Work *work, int64_t panel) {
    return work->packed + (work->whole ? panel : panel - work->first) * panel_bytes(&work->plan);
}

INLINE int8_t *own_block(const Work *work) { return work->inputs + thread_number() * block_bytes(&work->plan); }

/* The panels that come next. */
static void lay_panels(const Work *work, int threads) {
    const int64_t end = until(work);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t panel = work->first; panel < end; panel++) lay_panel(&work->plan, panel, panel_at(work, panel));
}

/* Outputs from register `v` of a panel on. */
INLINE int64_t left_of(const Matrix *w, int64_t panel, int v) { return w->n - panel * PANEL - v * WIDTH; }

/* Sums as float32, without their scales. */
INLINE Register as_floats(const Plan *plan, const int32_t *sums) {
    const Register found = get((const float *)sums);
    return plan->integers ? __builtin_convertvector((Integers)found, Register) : found;
}

#endif
