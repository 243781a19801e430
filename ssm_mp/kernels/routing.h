/* Which experts a token goes to, and with what weights.
 *
 * Dimensions: X experts, c chosen ones.
 */
#ifndef SSM_MP_ROUTING_H
#define SSM_MP_ROUTING_H

#include <stdint.h>

enum { CHOSEN_SOFTMAX, SOFTMAX, SIGMOID }; /* in the order of kernels/experts.py */

/* As in blocks/routing.py. */
typedef struct {
    int64_t experts, chosen; /* X, c */
    int64_t scores, normalised;
    int64_t groups, chosen_groups;
    const float *correction; /* [X], or none */
    float eps, scaling;
} Routing;

/* One token's logits [X], whose place its scores take → chosen experts [c] and their weights [c]. Of equal ones those of
 * lower numbers are chosen; NaN is above all numbers. merit: room for X + groups. */
void route(const Routing *routing, float *logits, float *merit, int32_t *chosen, float *weights);

#endif
