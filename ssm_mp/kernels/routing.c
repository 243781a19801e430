/* Routers; see routing.h. */
#include "routing.h"

#include <math.h>

#include "hidden.h"

/* x [n] → e^x / Σ e^x, in place. */
static void softmax(float *x, int64_t n) {
    float top = x[0], sum = 0;
    for (int64_t i = 1; i < n; i++)
        if (!(x[i] <= top)) top = x[i]; /* NaN wins, and spoils all */
    for (int64_t c = 0; c < n; c += WIDTH) put_part(x + c, exp_of(get_part(x + c, n - c) - top), n - c);
    for (int64_t i = 0; i < n; i++) sum += x[i];
    for (int64_t i = 0; i < n; i++) x[i] /= sum;
}

/* The place of the next value [n] after `last`, where larger ones come first, and of equal ones the lower place; the
 * first one after −1. */
static int64_t next_best(const float *value, int64_t n, int64_t last) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++) {
        const int after = last < 0 || value[i] < value[last] || (value[i] == value[last] && i > last);
        if (after && (best < 0 || value[i] > value[best])) best = i;
    }
    return best;
}

/* The two best of n values together, or the only one. */
static float two_best(const float *value, int64_t n) {
    const int64_t best = next_best(value, n, -1);
    const float sum = n > 1 ? value[best] + value[next_best(value, n, best)] : value[best];
    return isnan(sum) ? INFINITY : sum;
}

/* Merits [X], and −∞ in place of those of all groups but the best; worth: room for one of each group. */
static void keep_best_groups(const Routing *r, float *merit, float *worth) {
    const int64_t size = r->experts / r->groups;
    for (int64_t g = 0; g < r->groups; g++) worth[g] = two_best(merit + g * size, size);
    int64_t group = -1;
    for (int64_t i = 0; i < r->groups; i++) {
        group = next_best(worth, r->groups, group);
        for (int64_t e = group * size; i >= r->chosen_groups && e < (group + 1) * size; e++) merit[e] = -INFINITY;
    }
}

static void weigh(const Routing *r, float *weights) {
    float sum = 0;
    if (r->scores == CHOSEN_SOFTMAX) softmax(weights, r->chosen);
    for (int64_t i = 0; i < r->chosen; i++) sum += weights[i];
    for (int64_t i = 0; i < r->chosen; i++) {
        if (r->normalised) weights[i] /= sum + r->eps;
        weights[i] *= r->scaling;
    }
}

void route(const Routing *r, float *logits, float *merit, int32_t *chosen, float *weights) {
    const int64_t n = r->experts;
    if (r->scores == SOFTMAX) softmax(logits, n);
    for (int64_t c = 0; c < n && r->scores == SIGMOID; c += WIDTH)
        put_part(logits + c, sigmoid_of(get_part(logits + c, n - c)), n - c);
    for (int64_t e = 0; e < n; e++) {
        merit[e] = r->correction ? logits[e] + r->correction[e] : logits[e];
        if (isnan(merit[e])) merit[e] = INFINITY;
    }
    if (r->chosen_groups < r->groups) keep_best_groups(r, merit, merit + n);
    int64_t expert = -1;
    for (int64_t i = 0; i < r->chosen; i++) {
        expert = next_best(merit, n, expert);
        chosen[i] = (int32_t)expert;
        weights[i] = logits[expert];
    }
    weigh(r, weights);
}
