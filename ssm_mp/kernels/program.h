/* A branch of a model, or a whole one, as a list of calls that share memory: each reads rows and writes rows, one a token.
 *
 * Dimensions: b sequences, l tokens of each, m rows (b · l) of a pass, d model.
 */
#ifndef SSM_MP_PROGRAM_H
#define SSM_MP_PROGRAM_H

#include <time.h>

#include "matrix.h"

/* Where a value lies: from `column` on in rows of `ld` floats. `at`: floats that each row has before these in the shared
 * memory, where values lie one after another; or which of the two matrices that come from outside they are in. */
typedef struct {
    int64_t at, ld, column;
} Rows;
enum { STREAM = -1, RESULT = -2 };

/* Some sequences, or some tokens of one, on their way through all calls. */
typedef struct {
    int64_t sequences, length, rows; /* b, l, b · l */
    int64_t first;                   /* which of all sequences is the first */
    int64_t position, capacity;      /* tokens of each that were before, and that states have room for */
    int few;                         /* so few rows that weights are multiplied as they are stored */
    int threads;
    int64_t room;                    /* rows that the shared memory has room for */
    const int64_t *ids;              /* of the rows, where a program begins with them; or none */
    float *memory, *stream, *result;
    void *const *states;             /* by number, each of all sequences */
    int8_t *packed;                  /* weights that are laid out beforehand, if any */
    int8_t *scratch;                 /* of the call that runs, aligned to 64 */
    double *seconds;                 /* of each part, added up; or none */
} Pass;

INLINE float *rows_at(const Pass *pass, const Rows *rows) {
    float *from = rows->at == STREAM ? pass->stream : rows->at == RESULT ? pass->result : pass->memory + rows->at * pass->room;
    return from + rows->column;
}

/* A state of float32 numbers, `size` of each sequence: that of the first sequence here. */
INLINE float *state_at(const Pass *pass, int64_t number, int64_t size) {
    return (float *)pass->states[number] + pass->first * size;
}

/* Threads for work on so many numbers: few are done before a second thread has woken up. */
INLINE int threads_for(const Pass *pass, int64_t numbers) { return numbers > 1 << 14 ? pass->threads : 1; }

/* Seconds from some moment on, where anybody wants to know. */
INLINE double seconds_of(const Pass *pass) {
    struct timespec now = {0};
    if (pass->seconds) clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

typedef struct {
    void (*run)(const void *what, const Pass *pass);
    int64_t (*scratch)(const void *what, const Pass *pass); /* bytes that it needs, or none */
    const void *what;
    int64_t part; /* whose time this is; −1: nobody's, or it tells itself */
} Call;

#endif
