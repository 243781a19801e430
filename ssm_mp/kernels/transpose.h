/* A square of registers, rows to columns. */
#ifndef SSM_MP_TRANSPOSE_H
#define SSM_MP_TRANSPOSE_H

#include "register.h"

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Integers){__VA_ARGS__})
#endif

/* Lanes of a and b in turn: of their first halves, or of their last ones. */
INLINE Register zip(Register a, Register b, const int last) {
#if defined(__AVX512F__)
    return last ? SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                : SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX__)
    return last ? SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15) : SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return last ? SHUFFLE(a, b, 2, 6, 3, 7) : SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

/* Each turn moves one bit of a row's number to the end of the column's, and one of the column's to the row's. */
INLINE void transpose(Register x[WIDTH]) {
    UNROLL
    for (int turn = 1; turn < WIDTH; turn *= 2) {
        Register y[WIDTH];
        UNROLL
        for (int i = 0; i < WIDTH / 2; i++) {
            y[2 * i] = zip(x[i], x[i + WIDTH / 2], 0);
            y[2 * i + 1] = zip(x[i], x[i + WIDTH / 2], 1);
        }
        UNROLL
        for (int i = 0; i < WIDTH; i++) x[i] = y[i];
    }
}

#endif
