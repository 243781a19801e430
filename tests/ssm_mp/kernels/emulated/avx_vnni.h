/* AVX-VNNI in plain C, beside the compiler's own header for everything else. */

/* Four products of unsigned with signed bytes are added to each sum, without saturation. */
EMULATED __m256i emulated_dpbusd(__m256i sum, __m256i a, __m256i b) {
    uint8_t x[32];
    int8_t y[32];
    int32_t sums[8];
    memcpy(x, &a, 32);
    memcpy(y, &b, 32);
    memcpy(sums, &sum, 32);
    EACH(32) sums[i / 4] = (int32_t)((uint32_t)sums[i / 4] + (uint32_t)(x[i] * y[i]));
    return _mm256_loadu_si256((const __m256i *)sums);
}
/* The same of two signed 16-bit numbers each. */
EMULATED __m256i emulated_dpwssd(__m256i sum, __m256i a, __m256i b) {
    int16_t x[16], y[16];
    int32_t sums[8];
    memcpy(x, &a, 32);
    memcpy(y, &b, 32);
    memcpy(sums, &sum, 32);
    EACH(16) sums[i / 2] = (int32_t)((uint32_t)sums[i / 2] + (uint32_t)(x[i] * y[i]));
    return _mm256_loadu_si256((const __m256i *)sums);
}
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd
#define _mm256_dpwssd_avx_epi32 emulated_dpwssd
