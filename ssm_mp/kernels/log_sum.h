/* A log-sum-exp that grows by 64 scores at a time, from a top that follows the largest of them.
 *
 * Scores are logits · log2 e; what is added is 2^(score − top).
 */
#ifndef SSM_MP_LOG_SUM_H
#define SSM_MP_LOG_SUM_H

#include <math.h>

#include "plan.h"

/* Sixteen sums, of numbers each of which is added to one of them. */
typedef struct {
    Register recent[PIECES]; /* what was added since it was last moved to the others */
    double total[LANES];
} Sum;

/* One row's sum of 2^(score − top) over the panels so far. */
typedef struct {
    float top;
    Sum sum;
} LogSum;

enum { RECENT = 16 };  /* panels that float32 adds well */
#define HEADROOM 64.0f /* how far above `top` a score may be */

INLINE void add_recent(Sum *sum) {
    for (int p = 0; p < PIECES; p++) {
        for (int i = 0; i < WIDTH; i++) sum->total[p * WIDTH + i] += (double)sum->recent[p][i];
        sum->recent[p] = (Register){0};
    }
}

/* What there is shrinks. */
static __attribute__((noinline)) void shrink(Sum *sum, double factor) {
    add_recent(sum);
    for (int i = 0; i < LANES; i++) sum->total[i] *= factor;
}

/* Add 64 numbers. */
INLINE void add_terms(Sum *sum, const Register term[VECTORS]) {
    UNROLL
    for (int p = 0; p < PIECES; p++)
        sum->recent[p] += (term[p] + term[PIECES + p]) + (term[2 * PIECES + p] + term[3 * PIECES + p]);
}

/* The largest of 64 numbers; NaN may be passed over. */
INLINE float largest_of(const Register x[VECTORS]) {
    Register largest = x[0];
    UNROLL
    for (int v = 1; v < VECTORS; v++) largest = larger(largest, x[v]);
    float top = largest[0];
    for (int i = 1; i < WIDTH; i++) top = largest[i] > top ? largest[i] : top;
    return top;
}

/* Whether one of 64 numbers is above a bound. */
INLINE int is_above(const Register x[VECTORS], float bound) {
    Register largest = x[0];
    UNROLL
    for (int v = 1; v < VECTORS; v++) largest = larger(largest, x[v]);
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)largest, (__m512)splat(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)((Integers)(largest > (Register){0} + bound))) != 0;
#else
    const Integers above = largest > (Register){0} + bound;
    int any = 0;
    for (int i = 0; i < WIDTH; i++) any |= above[i];
    return any;
#endif
}

/* Add a panel's scores, given above the row's top; what is added, 2^(score − top), takes their place. */
INLINE void add_scores(LogSum *row, Register above[VECTORS], int first) {
    if (__builtin_expect(first || is_above(above, HEADROOM), 0)) { /* measure from a higher top */
        const float higher = largest_of(above);
        shrink(&row->sum, first ? 0.0 : exp2(-(double)higher));
        row->top += higher;
        for (int v = 0; v < VECTORS; v++) above[v] = above[v] - higher;
    }
    UNROLL
    for (int v = 0; v < VECTORS; v++) above[v] = decay_of(above[v]);
    add_terms(&row->sum, above);
}

/* The whole sum once nothing is recent. */
INLINE double whole_of(const Sum *sum) {
    double total[LANES];
    memcpy(total, sum->total, sizeof total);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) total[i] += total[half + i];
    return total[0];
}

/* The natural logarithm of a row's sum, top included. */
INLINE double log_of(const LogSum *row) { return log(whole_of(&row->sum)) + row->top * M_LN2; }

#endif
