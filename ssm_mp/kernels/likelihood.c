/* Likelihoods of tokens under logits that come in blocks of columns, a row being one token's; and divergences.
 *
 * Dimensions: m tokens, n columns of a block. Sums are float64 and grow from block to block.
 */
#include <math.h>

#include "register.h"
#include "rescale.h"

enum { FEW_TERMS = 1024 }; /* so many that float32 adds them well and that stay near; their sums are added in float64 */

/* Of a row's logits so far: the largest, Σ e^(x − largest), and Σ e^(x − largest) (x − other) beside other ones. */
typedef struct {
    double top, total, weighted;
} Sums;

/* The largest of x [n]; NaN or infinity anywhere makes `poison` NaN. */
INLINE float largest_of(const float *x, int64_t n, double *poison) {
    Register largest = (Register){0} - INFINITY, spoilt = {0};
    int64_t c = 0;
    for (; c + WIDTH <= n; c += WIDTH) {
        const Register value = get(x + c);
        spoilt += value * 0.0f;
        largest = choose(value > largest, value, largest);
    }
    float top = -INFINITY, rest = total_of(spoilt);
    for (int i = 0; i < WIDTH; i++) top = largest[i] > top ? largest[i] : top;
    for (; c < n; c++) rest += x[c] * 0.0f, top = x[c] > top ? x[c] : top;
    *poison += rest;
    return top;
}

/* Add up to FEW_TERMS logits x [n], beside `other` [n] or none. */
INLINE void add_few(Sums *sums, const float *x, const float *other, int64_t n) {
    double poison = 0;
    const float largest = largest_of(x, n, &poison);
    if (largest > sums->top) {
        const double factor = exp(sums->top - largest);
        sums->top = largest, sums->total *= factor, sums->weighted *= factor;
    }
    const float top = (float)sums->top;
    Register total = {0}, weighted = {0};
    int64_t c = 0;
    for (; c + WIDTH <= n; c += WIDTH) {
        const Register value = get(x + c), term = exp2_of((value - top) * LOG2_E);
        total += term;
        if (other) weighted += term * (value - get(other + c));
    }
    sums->total += total_of(total) + poison;
    sums->weighted += total_of(weighted);
    if (c < n) {
        float term[WIDTH];
        put(term, exp2_of((get_part(x + c, n - c) - top) * LOG2_E));
        for (int i = 0; c < n; c++, i++) {
            sums->total += term[i];
            if (other) sums->weighted += term[i] * (x[c] - other[c]);
        }
    }
}

INLINE void add_row(Sums *sums, const float *x, const float *other, int64_t n) {
    for (int64_t c = 0; c < n; c += FEW_TERMS)
        add_few(sums, x + c, other ? other + c : NULL, n - c < FEW_TERMS ? n - c : FEW_TERMS);
}

INLINE double log_sum(const Sums *sums) { return log(sums->total) + sums->top; }

/* The columns from `first` on: logits [m, n], or int32 sums still to be scaled, which is done row by row, while a row is
 * near. sums [m, 3]: top and total as above, and the logit of the target; −∞, 0 and 0 before the first block. */
INLINE void add_block(int64_t m, int64_t n, int64_t first, float *logits, const float *column, const float *row,
                      const int64_t *targets, double *sums, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        float *x = logits + i * n;
        double *own = sums + 3 * i;
        if (column) rescale_row(n, (int32_t *)x, column, row[i], NULL);
        Sums so_far = {own[0], own[1], 0};
        add_row(&so_far, x, NULL, n);
        own[0] = so_far.top, own[1] = so_far.total;
        if (targets[i] >= first && targets[i] < first + n) own[2] = x[targets[i] - first];
    }
}

void add_logits(int64_t m, int64_t n, int64_t first, float *logits, const int64_t *targets, double *sums, int threads) {
    add_block(m, n, first, logits, NULL, NULL, targets, sums, threads);
}

void add_scaled_logits(int64_t m, int64_t n, int64_t first, float *logits, const float *column, const float *row,
                       const int64_t *targets, double *sums, int threads) {
    add_block(m, n, first, logits, column, row, targets, sums, threads);
}

/* sums [m, 3] → negative log-likelihoods [m]. */
void likelihoods(int64_t m, const double *sums, double *nll) {
    for (int64_t i = 0; i < m; i++) {
        const Sums all = {sums[3 * i], sums[3 * i + 1], 0};
        nll[i] = log_sum(&all) - sums[3 * i + 2];
    }
}

/* Kullback–Leibler divergence of logits [m, n] from the expected ones:
 * Σ p (log p − log q) = Σ p (x − y) − log Σ e^x + log Σ e^y, with p and x expected. */
void divergence(int64_t m, int64_t n, const float *logits, const float *expected, double *kl, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        Sums x = {-INFINITY, 0, 0}, y = {-INFINITY, 0, 0};
        add_row(&x, expected + i * n, logits + i * n, n);
        add_row(&y, logits + i * n, NULL, n);
        kl[i] = x.weighted / x.total - log_sum(&x) + log_sum(&y);
    }
}
