/* AMX in plain C: a thread's eight tiles of sixteen rows of 64 bytes. Like the instructions, these stop the program where
 * tiles are used that are not configured; others than whole ones are not emulated.
 */
#ifndef EMULATED_AMX_H
#define EMULATED_AMX_H

#include <sys/syscall.h>
#include <unistd.h>

/* The system grants a process that asks for them the tiles, and nothing else. */
EMULATED long emulated_syscall(long number, long code, long feature) {
    return number == SYS_arch_prctl && code == 0x1023 && feature == 18 ? 0 : -1;
}
#define syscall(...) emulated_syscall(__VA_ARGS__)

enum { EMULATED_TILES = 8, EMULATED_ROWS = 16, EMULATED_ROW = 64 };

static _Thread_local struct {
    uint8_t config[64]; /* palette; from byte 16 on bytes of a row; from byte 48 on rows */
    int8_t rows[EMULATED_TILES][EMULATED_ROWS][EMULATED_ROW];
} emulated_amx;

EMULATED void _tile_loadconfig(const void *from) {
    memset(&emulated_amx, 0, sizeof emulated_amx);
    memcpy(emulated_amx.config, from, 64);
    if (emulated_amx.config[0] == 0) memset(emulated_amx.config, 0, 64);
}
EMULATED void _tile_storeconfig(void *to) { memcpy(to, emulated_amx.config, 64); }

/* A tile as configured. */
EMULATED int8_t (*emulated_tile(int tile))[EMULATED_ROW] {
    uint16_t bytes;
    memcpy(&bytes, emulated_amx.config + 16 + 2 * tile, 2);
    if (emulated_amx.config[0] != 1 || bytes != EMULATED_ROW || emulated_amx.config[48 + tile] != EMULATED_ROWS)
        __builtin_trap();
    return emulated_amx.rows[tile];
}

EMULATED void _tile_zero(int tile) { memset(emulated_tile(tile), 0, sizeof emulated_amx.rows[0]); }
EMULATED void _tile_loadd(int tile, const void *from, int64_t stride) {
    int8_t(*to)[EMULATED_ROW] = emulated_tile(tile);
    EACH(EMULATED_ROWS) memcpy(to[i], (const int8_t *)from + i * stride, EMULATED_ROW);
}
EMULATED void _tile_stored(int tile, void *to, int64_t stride) {
    int8_t(*from)[EMULATED_ROW] = emulated_tile(tile);
    EACH(EMULATED_ROWS) memcpy((int8_t *)to + i * stride, from[i], EMULATED_ROW);
}

/* sum [16, 16] += a [16, 16 · 4] times b, four values of one column side by side. */
static __attribute__((noinline, unused)) void _tile_dpbssd(int sum, int a, int b) {
    int8_t(*s)[EMULATED_ROW] = emulated_tile(sum), (*x)[EMULATED_ROW] = emulated_tile(a), (*y)[EMULATED_ROW] = emulated_tile(b);
    EACH(EMULATED_ROWS) {
        int32_t row[16];
        memcpy(row, s[i], 64);
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) {
                int32_t four = 0;
                for (int j = 0; j < 4; j++) four += x[i][4 * k + j] * y[k][4 * n + j];
                row[n] = (int32_t)((uint32_t)row[n] + (uint32_t)four);
            }
        memcpy(s[i], row, 64);
    }
}

/* Numbers below the smallest normal one count as zero. */
EMULATED float emulated_flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
EMULATED float emulated_bfloat16(const int8_t *at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return emulated_flushed(x);
}

/* The same with pairs of bfloat16 values: the first ones' products and the second ones' are summed apart, each with one
 * rounding, and then added. */
static __attribute__((noinline, unused)) void _tile_dpbf16ps(int sum, int a, int b) {
    int8_t(*s)[EMULATED_ROW] = emulated_tile(sum), (*x)[EMULATED_ROW] = emulated_tile(a), (*y)[EMULATED_ROW] = emulated_tile(b);
    float weights[2][16][16];
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 16; n++)
            for (int j = 0; j < 2; j++) weights[j][k][n] = emulated_bfloat16(y[k] + 4 * n + 2 * j);
    EACH(EMULATED_ROWS) {
        float row[16], apart[2][16] = {{0}};
        memcpy(row, s[i], 64);
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 2; j++) {
                const float input = emulated_bfloat16(x[i] + 4 * k + 2 * j);
                for (int n = 0; n < 16; n++)
                    apart[j][n] = emulated_flushed(fmaf(input, weights[j][k][n], apart[j][n]));
            }
        for (int n = 0; n < 16; n++)
            row[n] = emulated_flushed(emulated_flushed(row[n]) + emulated_flushed(apart[0][n] + apart[1][n]));
        memcpy(s[i], row, 64);
    }
}

#endif
