/* Convolution and the passes around a product, each over memory once.
 *
 * Dimensions: b batch, l length, I inner, K kernel, m tokens, k inputs and n outputs of a product, V vocabulary.
 */
#include <math.h>

#include "quantize.h"
#include "register.h"

/* Causal depthwise convolution. x [b, l, I] with `ld` between tokens; weight [K, I], the newest tap last; before
 * [b, K − 1, I]: the inputs before the first; y [b, l, I]. */
INLINE void convolve_rows(int64_t batch, int64_t length, int64_t inner, int64_t K, const float *x, int64_t ld,
                          const float *weight, const float *bias, const float *before, float *y, int threads,
                          const int silu) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < batch * length; row++) {
        const int64_t b = row / length, t = row % length;
        for (int64_t c = 0; c < inner; c += WIDTH) {
            Register sum = {0};
            if (bias) sum = get_part(bias + c, inner - c);
            for (int64_t k = 0; k < K; k++) {
                const int64_t from = t - (K - 1) + k;
                const float *in = from >= 0 ? x + (b * length + from) * ld : before + (b * (K - 1) + K - 1 + from) * inner;
                sum = sum + get_part(in + c, inner - c) * get_part(weight + k * inner + c, inner - c);
            }
            put_part(y + row * inner + c, silu ? silu_of(sum) : sum, inner - c);
        }
    }
}

void convolve(int64_t batch, int64_t length, int64_t inner, int64_t K, const float *x, int64_t ld, const float *weight,
              const float *bias, const float *before, float *y, int threads) {
    convolve_rows(batch, length, inner, K, x, ld, weight, bias, before, y, threads, 0);
}

/* The same, then SiLU. */
void conv_silu(int64_t batch, int64_t length, int64_t inner, int64_t K, const float *x, int64_t ld,
               const float *weight, const float *bias, const float *before, float *y, int threads) {
    convolve_rows(batch, length, inner, K, x, ld, weight, bias, before, y, threads, 1);
}

/* Σ (x − mean)^power of x [d], power 1 or 2. */
INLINE float moment(const float *x, int64_t d, float mean, const int power) {
    Register sum[4] = {{0}};
    int64_t c = 0;
    for (; c + 4 * WIDTH <= d; c += 4 * WIDTH)
        UNROLL
        for (int i = 0; i < 4; i++) {
            const Register value = get(x + c + i * WIDTH) - mean;
            if (power == 2) sum[i] += value * value;
            else sum[i] += value;
        }
    float rest = 0;
    for (; c < d; c++) rest += power == 2 ? (x[c] - mean) * (x[c] - mean) : x[c] - mean;
    return total_of((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

/* LayerNorm of rows x [m, d], or RMSNorm where there is no bias. */
void normalise_rows(int64_t m, int64_t d, const float *x, const float *weight, const float *bias, float eps, float *y,
                    int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        const float *row = x + i * d;
        const float mean = bias ? moment(row, d, 0.0f, 1) / d : 0.0f;
        const float factor = 1.0f / sqrtf(moment(row, d, mean, 2) / d + eps);
        for (int64_t c = 0; c < d; c += WIDTH) {
            Register value = (get_part(row + c, d - c) - mean) * factor * get_part(weight + c, d - c);
            if (bias) value = value + get_part(bias + c, d - c);
            put_part(y + i * d + c, value, d - c);
        }
    }
}

/* Σ y² of a group of `size` channels, each times silu(z) where there is z; that product also goes to `out`. */
INLINE float gated_squares(int64_t size, const float *y, const float *z, float *out) {
    Register sum = {0};
    for (int64_t c = 0; c < size; c += WIDTH) {
        Register value = get_part(y + c, size - c);
        if (z) put_part(out + c, value = value * silu_of(get_part(z + c, size - c)), size - c);
        sum += value * value;
    }
    return total_of(sum);
}

/* y [m, I] gated by SiLU of z (`ld_z` between rows), before an RMSNorm of each of G groups of channels or after it;
 * no norm without a weight [I]. */
void gated_norm(int64_t m, int64_t inner, int64_t groups, const float *y, const float *z, int64_t ld_z,
                const float *weight, float eps, int norm_first, float *out, int threads) {
    const int64_t size = inner / groups;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < m * groups; row++) {
        const int64_t i = row / groups, from = row % groups * size, at = i * inner + from;
        const float *gate = z + i * ld_z + from;
        const float squares = gated_squares(size, y + at, norm_first ? NULL : gate, out + at);
        const float factor = 1.0f / sqrtf(squares / size + eps);
        for (int64_t c = 0; c < size && weight; c += WIDTH) {
            Register value = get_part((norm_first ? y : out) + at + c, size - c);
            value = value * factor * get_part(weight + from + c, size - c);
            if (norm_first) value = value * silu_of(get_part(gate + c, size - c));
            put_part(out + at + c, value, size - c);
        }
    }
}

/* x [m, k], `ld` between rows, with one scale → q [m, k]; scales [m] get it, or NaN where a value is not finite. */
void quantize_static(int64_t m, int64_t k, const float *x, int64_t ld, float scale, int8_t *q, float *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        v16 poison = splat(0.0f);
        quantize_row(x + i * ld, k, scale, 0, q + i * k, &poison);
        scales[i] = scale + sum16(poison);
    }
}

/* The same with each row's own scale: its largest magnitude / 127, at least `smallest`. */
void quantize_dynamic(int64_t m, int64_t k, const float *x, int64_t ld, float smallest, int8_t *q, float *scales,
                      int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        const float *row = x + i * ld;
        const float scale = scale_of_row(row, k, smallest);
        v16 poison = splat(0.0f);
        quantize_row(row, k, scale, 0, q + i * k, &poison);
        scales[i] = scale + sum16(poison);
    }
}

/* One row of int32 sums → float32 in their place: sum · column scale [n] · scale + bias [n] (or none). */
INLINE void rescale_row(int64_t n, int32_t *sums, const float *column, float scale, const float *bias) {
    for (int64_t c = 0; c < n; c += LANES) {
        const int count = n - c < LANES ? (int)(n - c) : LANES;
        float *at = (float *)(sums + c);
        const v16i sum = (v16i)load_part(at, count);
        v16 value = __builtin_convertvector(sum, v16) * load_part(column + c, count) * splat(scale);
        if (bias) value = value + load_part(bias + c, count);
        store_part(at, value, count);
    }
}

/* The same of sums [m, n], each row with its own scale [m]. */
void rescale(int64_t m, int64_t n, int32_t *sums, const float *column, const float *row, const float *bias, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) rescale_row(n, sums + i * n, column, row[i], bias);
}

#define FEW_TERMS (64 * LANES) /* so many that float32 adds them well; their sums are added in float64 */

/* The largest of x [V]; NaN or infinity anywhere makes `poison` NaN. */
INLINE float largest_of(const float *x, int64_t V, double *poison) {
    v16 largest = splat(-INFINITY), spoilt = splat(0.0f);
    for (int64_t c = 0; c < V; c += LANES) {
        const int count = V - c < LANES ? (int)(V - c) : LANES;
        v16 value = load_part(x + c, count);
        spoilt = spoilt + value * splat(0.0f);
        for (int j = count; j < LANES; j++) value[j] = -INFINITY;
        largest = select16(value > largest, value, largest);
    }
    *poison += sum16(spoilt);
    return max16(largest);
}

/* Σ e^(x − top), and Σ e^(x − top) (x − other) where there is another [V]. */
INLINE double exponential_sum(const float *x, float top, const float *other, int64_t V, double *weighted) {
    double total = 0, difference = 0;
    for (int64_t begin = 0; begin < V; begin += FEW_TERMS) {
        const int64_t end = begin + FEW_TERMS < V ? begin + FEW_TERMS : V;
        v16 sum = splat(0.0f), mixed = splat(0.0f);
        for (int64_t c = begin; c < end; c += LANES) {
            const int count = end - c < LANES ? (int)(end - c) : LANES;
            const v16 value = load_part(x + c, count);
            v16 term = exp2_16((value - splat(top)) * splat(LOG2_E));
            for (int j = count; j < LANES; j++) term[j] = 0;
            sum = sum + term;
            if (other) mixed = mixed + term * (value - load_part(other + c, count));
        }
        for (int j = 0; j < LANES; j++) total += sum[j];
        if (other)
            for (int j = 0; j < LANES; j++) difference += mixed[j];
    }
    if (other) *weighted = difference;
    return total;
}

/* Negative log-likelihood of one target under logits [V], summed in float64. */
INLINE double row_nll(int64_t V, const float *x, int64_t target) {
    double poison = 0;
    const float top = largest_of(x, V, &poison);
    return log(exponential_sum(x, top, NULL, V, NULL)) + (double)top - (double)x[target] + poison;
}

/* That of targets [m] under logits [m, V]. */
void negative_log_likelihood(int64_t m, int64_t V, const float *logits, const int64_t *targets, double *nll,
                             int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) nll[i] = row_nll(V, logits + i * V, targets[i]);
}

/* The same under logits that are int32 sums still to be scaled: done row by row, while a row is near. */
void scaled_nll(int64_t m, int64_t V, int32_t *sums, const float *column, const float *row, const int64_t *targets,
                double *nll, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        rescale_row(V, sums + i * V, column, row[i], NULL);
        nll[i] = row_nll(V, (const float *)(sums + i * V), targets[i]);
    }
}

/* Kullback–Leibler divergence of logits [m, V] from the expected ones:
 * Σ p (log p − log q) = Σ p (x − y) − log Σ e^x + log Σ e^y, with p and x expected. */
void divergence(int64_t m, int64_t V, const float *logits, const float *expected, double *kl, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        const float *y = logits + i * V, *x = expected + i * V;
        double poison = 0, weighted = 0;
        const float top_y = largest_of(y, V, &poison), top_x = largest_of(x, V, &poison);
        const double log_y = log(exponential_sum(y, top_y, NULL, V, NULL)) + (double)top_y;
        const double sum_x = exponential_sum(x, top_x, y, V, &weighted);
        kl[i] = weighted / sum_x - (log(sum_x) + (double)top_x) + log_y + poison;
    }
}
