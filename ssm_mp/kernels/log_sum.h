/* A log-sum-exp that grows by 64 scores at a time, from a top that follows the largest of them.
 *
 * Scores are logits · log2 e; what is added is 2^(score − top). AVX-512 only.
 */
#ifndef SSM_MP_LOG_SUM_H
#define SSM_MP_LOG_SUM_H

#include <math.h>

#include "matrix.h"

#ifdef HAS_VNNI

/* One row's sum of 2^(score − top) over the panels so far; scores are logits · log2 e. */
typedef struct {
    float top;
    v16 recent; /* of the panels since it was last added to the others */
    __m512d total[2];
} LogSum;

enum { RECENT = 16 };  /* panels that float32 adds well */
#define HEADROOM 64.0f /* how far above `top` a score may be */

INLINE void add_recent(LogSum *sum) {
    sum->total[0] = _mm512_add_pd(sum->total[0], _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)sum->recent)));
    sum->total[1] = _mm512_add_pd(sum->total[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)sum->recent, 1)));
    sum->recent = splat(0.0f);
}

/* Measure from `higher` above the old top; what there is, none at the `first` panel, shrinks with it. */
static void raise_top(LogSum *sum, float higher, int first) {
    const __m512d factor = _mm512_set1_pd(first ? 0.0 : exp2(-(double)higher));
    add_recent(sum);
    for (int half = 0; half < 2; half++) sum->total[half] = _mm512_mul_pd(sum->total[half], factor);
    sum->top += higher;
}

/* Add a panel's scores, given above the row's top; what is added, 2^(score − top), takes their place. */
INLINE void add_scores(LogSum *sum, v16 above[4], int first) {
    const __m512 largest = _mm512_max_ps(_mm512_max_ps((__m512)above[0], (__m512)above[1]),
                                         _mm512_max_ps((__m512)above[2], (__m512)above[3]));
    if (__builtin_expect(first || _mm512_cmp_ps_mask(largest, (__m512)splat(HEADROOM), _CMP_GT_OQ), 0)) {
        const float higher = _mm512_reduce_max_ps(largest);
        raise_top(sum, higher, first);
        for (int v = 0; v < 4; v++) above[v] = above[v] - splat(higher);
    }
    for (int v = 0; v < 4; v++) above[v] = exp2_16(above[v]);
    sum->recent = sum->recent + ((above[0] + above[1]) + (above[2] + above[3]));
}

/* The whole sum, measured from its top, once nothing is recent; and its natural logarithm, top included. */
INLINE double whole_of(const __m512d total[2]) { return _mm512_reduce_add_pd(_mm512_add_pd(total[0], total[1])); }
INLINE double log_of(const LogSum *sum) { return log(whole_of(sum->total)) + sum->top * M_LN2; }

#endif
#endif
