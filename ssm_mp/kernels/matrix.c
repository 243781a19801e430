/* The products of matrix.h. A product of few inputs waits for memory, so what counts is to read stored weights once. */
#include "matrix.h"

#define PARALLEL_BYTES (1 << 18) /* smaller matrices are through before a second thread has woken up */

void quantize_static(int64_t m, int64_t k, const float *x, int64_t ld, float scale, int8_t *q, float *scales, int threads);
void quantize_dynamic(int64_t m, int64_t k, const float *x, int64_t ld, float smallest, int8_t *q, float *scales, int threads);


typedef int8_t q16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));

/* Sixteen float16 numbers as float32. */
INLINE v16 from_half(const uint16_t *p) {
#if defined(__AVX512F__)
    return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    const v16i bits = __builtin_convertvector(*(const h16 *)p, v16i);
    /* exponent and fraction in their new places, then the exponent's other bias by an exact product */
    const v16 size = (v16)((bits & 0x7fff) << 13) * splat(0x1p112f);
    return (v16)((v16i)size | ((bits & 0x8000) << 16));
#endif
}

/* The level of each of sixteen codes. */
INLINE v16 looked_up(v16 levels, v16i codes) {
#if defined(__AVX512F__)
    return (v16)_mm512_permutexvar_ps((__m512i)codes, (__m512)levels);
#else
    v16 found;
    for (int i = 0; i < LANES; i++) found[i] = levels[codes[i]];
    return found;
#endif
}

/* Sixteen int8 numbers as float32. */
INLINE v16 from_int8(const int8_t *p) {
#if defined(__AVX512F__)
    return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    return __builtin_convertvector(*(const q16 *)p, v16);
#endif
}

/* Sixteen stored values from place `at` on, without their scale. */
INLINE v16 stored16(int64_t kind, const void *values, int64_t at) {
    if (kind == FLOAT16) return from_half((const uint16_t *)values + at);
    if (kind == INT8) return from_int8((const int8_t *)values + at);
    return load((const float *)values + at);
}

/* The first `count` of them; the others are zero. */
INLINE v16 stored_part(int64_t kind, const void *values, int64_t at, int count) {
    static const int bytes[] = {4, 2, 1};
    if (count == LANES) return stored16(kind, values, at);
    float held[LANES] = {0};
    memcpy(held, (const char *)values + at * bytes[kind], (size_t)(count * bytes[kind]));
    return stored16(kind, held, 0);
}

/* A row's values from place `at` on, times inputs; with a constant kind the compiler leaves one loop. */
INLINE float dot_stored(int64_t kind, const void *values, int64_t at, const float *x, int64_t k) {
    v16 sum[4] = {splat(0), splat(0), splat(0), splat(0)};
    int64_t c = 0;
    for (; c + 4 * LANES <= k; c += 4 * LANES)
        for (int j = 0; j < 4; j++) sum[j] = sum[j] + stored16(kind, values, at + c + j * LANES) * load(x + c + j * LANES);
    for (; c < k; c += LANES) {
        const int count = k - c < LANES ? (int)(k - c) : LANES;
        sum[0] = sum[0] + stored_part(kind, values, at + c, count) * load_part(x + c, count);
    }
    return sum16((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* Integer product of a row and inputs. `row_sum` is the sum of the row's values. */
static int32_t dot_int8(const int8_t *w, const int8_t *x, int64_t k, int32_t row_sum) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    /* the instruction multiplies unsigned with signed: 128 is added to the inputs, and taken away again at the end */
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512i even = _mm512_setzero_si512(), odd = even;
    int64_t c = 0;
    for (; c + 128 <= k; c += 128) {
        even = _mm512_dpbusd_epi32(even, _mm512_xor_si512(_mm512_loadu_si512(x + c), flip), _mm512_loadu_si512(w + c));
        odd = _mm512_dpbusd_epi32(odd, _mm512_xor_si512(_mm512_loadu_si512(x + c + 64), flip),
                                  _mm512_loadu_si512(w + c + 64));
    }
    for (; c < k; c += 64) {
        const __mmask64 held = k - c < 64 ? ((__mmask64)1 << (k - c)) - 1 : ~(__mmask64)0;
        even = _mm512_dpbusd_epi32(even, _mm512_xor_si512(_mm512_maskz_loadu_epi8(held, x + c), flip),
                                   _mm512_maskz_loadu_epi8(held, w + c));
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(even, odd)) - 128 * row_sum;
#else
    (void)row_sum;
    int32_t sum = 0;
    for (int64_t c = 0; c < k; c++) sum += (int32_t)w[c] * x[c];
    return sum;
#endif
}

/* Sixteen codes of 4 bits: eight bytes, the first code in the lowest bits. */
INLINE v16i codes4(const uint8_t *p) {
    uint32_t low, high;
    memcpy(&low, p, 4);
    memcpy(&high, p + 4, 4);
    const v16i shift = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
    return (splat_words(low, high) >> shift) & 15;
}

/* Sixteen codes of 3 bits: six bytes. */
INLINE v16i codes3(const uint8_t *p) {
    const uint32_t low = p[0] | p[1] << 8 | p[2] << 16, high = p[3] | p[4] << 8 | p[5] << 16;
    const v16i words = splat_words(low, high);
    const v16i shift = {0, 3, 6, 9, 12, 15, 18, 21, 0, 3, 6, 9, 12, 15, 18, 21};
    return (words >> shift) & 7;
}

/* Sixteen codes of 2 bits: four bytes. */
INLINE v16i codes2(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    const v16i shift = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return (splat_words(word, word) >> shift) & 3;
}

INLINE v16i codes16(const uint8_t *p, int bits) { return bits == 4 ? codes4(p) : bits == 3 ? codes3(p) : codes2(p); }

/* A single code; it may reach into the next byte. */
INLINE uint32_t code_at(const uint8_t *packed, int64_t at, int bits) {
    const int64_t bit = at * bits;
    const uint32_t low = packed[bit / 8], high = bit % 8 + bits > 8 ? packed[bit / 8 + 1] : 0;
    return ((low | high << 8) >> (bit % 8)) & ((1u << bits) - 1);
}

/* Codes in groups that run on over the ends of rows: `first` is the place of the row's first code. */
INLINE float dot_codes(const Matrix *matrix, int bits, int64_t first, const float *x) {
    const uint8_t *packed = matrix->values;
    const int64_t group = matrix->group_bits;
    const v16 levels = load(matrix->levels);
    v16 total = splat(0);
    int64_t c = 0;
    while (c < matrix->k) {
        const int64_t at = first + c, left = matrix->k - c;
        const v16 scale = splat(matrix->scales[at >> group]);
        if (at % LANES == 0 && left >= LANES) {
            const uint8_t *p = packed + at * bits / 8;
            total = total + looked_up(levels, codes16(p, bits)) * scale * load(x + c);
            c += LANES;
            continue;
        }
        /* up to the next boundary of sixteen codes, or the row's end, one after another */
        const int64_t to_boundary = LANES - at % LANES, count = left < to_boundary ? left : to_boundary;
        for (int64_t i = 0; i < count; i++) {
            total[0] += matrix->levels[code_at(packed, at + i, bits)] * matrix->scales[at >> group] * x[c + i];
        }
        c += count;
    }
    return sum16(total);
}

/* One row of codes as float32. */
INLINE void unpack_codes(const Matrix *matrix, int bits, int64_t first, float *y) {
    const uint8_t *packed = matrix->values;
    const int64_t group = matrix->group_bits;
    const v16 levels = load(matrix->levels);
    for (int64_t c = 0; c < matrix->k;) {
        const int64_t at = first + c;
        if (at % LANES == 0 && matrix->k - c >= LANES) {
            const uint8_t *p = packed + at * bits / 8;
            store(y + c, looked_up(levels, codes16(p, bits)) * splat(matrix->scales[at >> group]));
            c += LANES;
        } else {
            y[c++] = matrix->levels[code_at(packed, at, bits)] * matrix->scales[at >> group];
        }
    }
}

/* The sum of each row of int8 values [n, k]. */
void row_sums(int64_t n, int64_t k, const int8_t *values, int32_t *sums) {
    for (int64_t row = 0; row < n; row++) {
        int32_t sum = 0;
        for (int64_t c = 0; c < k; c++) sum += values[row * k + c];
        sums[row] = sum;
    }
}

/* The whole matrix as float32, y [n, k]. */
void unpack(const Matrix *w, float *y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < w->n; row++) {
        const int64_t at = row * w->k;
        switch (w->kind) {
        case CODES4: unpack_codes(w, 4, at, y + at); continue;
        case CODES3: unpack_codes(w, 3, at, y + at); continue;
        case CODES2: unpack_codes(w, 2, at, y + at); continue;
        }
        const v16 scale = splat(w->kind == INT8 ? w->scales[row] : 1.0f);
        for (int64_t c = 0; c < w->k; c += LANES) {
            const int count = w->k - c < LANES ? (int)(w->k - c) : LANES;
            store_part(y + at + c, stored_part(w->kind, w->values, at + c, count) * scale, count);
        }
    }
}

INLINE float product(const Matrix *w, int64_t row, const float *x, const int8_t *q, float input_scale) {
    const int64_t at = row * w->k;
    switch (w->kind) {
    case FLOAT32: return dot_stored(FLOAT32, w->values, at, x, w->k);
    case FLOAT16: return dot_stored(FLOAT16, w->values, at, x, w->k);
    case INT8:
        if (w->inputs == INPUTS_AS_THEY_ARE)
            return dot_stored(INT8, w->values, at, x, w->k) * w->scales[row];
        return (float)dot_int8((const int8_t *)w->values + at, q, w->k, w->sums[row]) * w->scales[row] * input_scale;
    case CODES4: return dot_codes(w, 4, at, x);
    case CODES3: return dot_codes(w, 3, at, x);
    default: return dot_codes(w, 2, at, x);
    }
}

int64_t scratch_bytes(const Matrix *w, int64_t m) { return (m * w->k + 63) / 64 * 64 + m * (int64_t)sizeof(float); }

void multiply(const Matrix *w, int64_t m, const float *x, int64_t ld_x, float *y, int64_t ld_y, void *scratch, int threads) {
    int8_t *q = scratch;
    float *input_scales = (float *)(q + (m * w->k + 63) / 64 * 64);
    if (w->inputs == STATIC_INPUTS) quantize_static(m, w->k, x, ld_x, w->input_scale, q, input_scales, 1);
    if (w->inputs == DYNAMIC_INPUTS) quantize_dynamic(m, w->k, x, ld_x, w->input_scale, q, input_scales, 1);
    static const int bits[] = {32, 16, 8, 4, 3, 2};
    const int many = threads > 1 && w->n * w->k * bits[w->kind] / 8 > PARALLEL_BYTES;
#pragma omp parallel for num_threads(threads) if (many) schedule(static)
    for (int64_t row = 0; row < w->n; row++)
        for (int64_t i = 0; i < m; i++) {
            const float input_scale = w->inputs == INPUTS_AS_THEY_ARE ? 1.0f : input_scales[i];
            const float found = product(w, row, x + i * ld_x, q + i * w->k, input_scale);
            y[i * ld_y + row] = w->bias ? found + w->bias[row] : found;
        }
}

void multiply_once(const Matrix *w, int64_t m, const float *x, int64_t ld, float *y, void *scratch, int threads) {
    multiply(w, m, x, ld, y, w->n, scratch, threads);
}
