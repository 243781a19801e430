/* Convolution and the passes around a product, each over memory once.
 *
 * Dimensions: b batch, l length, I inner, K kernel, m tokens, k inputs and n outputs of a product.
 */
#include <math.h>

#include "quantize.h"
#include "register.h"
#include "rescale.h"

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

/* LayerNorm of rows x [m, d], or RMSNorm where there is no bias; `ld_x` and `ld_y` between rows. */
void normalise_rows(int64_t m, int64_t d, const float *x, int64_t ld_x, const float *weight, const float *bias, float eps,
                    float *y, int64_t ld_y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        const float *row = x + i * ld_x;
        const float mean = bias ? moment(row, d, 0.0f, 1) / d : 0.0f;
        const float factor = 1.0f / sqrtf(moment(row, d, mean, 2) / d + eps);
        for (int64_t c = 0; c < d; c += WIDTH) {
            Register value = (get_part(row + c, d - c) - mean) * factor * get_part(weight + c, d - c);
            if (bias) value = value + get_part(bias + c, d - c);
            put_part(y + i * ld_y + c, value, d - c);
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
        float poison = 0;
        quantize_row(x + i * ld, k, scale, 0, q + i * k, &poison);
        scales[i] = scale + poison;
    }
}

/* The same with each row's own scale: its largest magnitude / 127, at least `smallest`. */
void quantize_dynamic(int64_t m, int64_t k, const float *x, int64_t ld, float smallest, int8_t *q, float *scales,
                      int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        const float *row = x + i * ld;
        const float scale = scale_of_row(row, k, smallest);
        float poison = 0;
        quantize_row(row, k, scale, 0, q + i * k, &poison);
        scales[i] = scale + poison;
    }
}

/* The same of sums [m, n], each row with its own scale [m]. */
void rescale(int64_t m, int64_t n, int32_t *sums, const float *column, const float *row, const float *bias, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < m; i++) rescale_row(n, sums + i * n, column, row[i], bias);
}
