/* Runs a program: a few sequences at a time, so that what one call leaves is still near the core when the next one takes
 * it.
 *
 * Dimensions: b sequences, l tokens of each, d model.
 */
#include "program.h"

enum { PASS_TOKENS = 256, PIECE = 64 }; /* of one thread; sequences are cut at multiples of PIECE */

/* A weight that is laid out once for all passes, so many bytes into the memory for that. */
typedef struct {
    const Matrix *matrix;
    int64_t at;
} Laid;

typedef struct {
    const Call *calls;
    const Laid *laid;
    int64_t count, laid_count;
    int64_t width, results; /* of a row of the stream, and of the results */
    int64_t floats;         /* of a row in the shared memory */
    int64_t packed;         /* bytes of all weights laid out */
} Program;

typedef struct {
    int64_t batch, length, position, capacity, few;
    const int64_t *ids;  /* [b, l], or none */
    float *stream;       /* [b, l, d], in and out */
    float *result;       /* [b, l, results] */
    void *const *states;
    int8_t *memory;      /* `program_bytes`, aligned to 64 */
    double *seconds;     /* of each part, added up; or none */
} Tokens;

INLINE int64_t lesser(int64_t x, int64_t bound) { return x < bound ? x : bound; }

/* The first pass, without memory: no other has more rows. */
static Pass first_pass(const Tokens *t, int threads) {
    const int64_t most = PASS_TOKENS * threads, fit = most / t->length;
    const int64_t sequences = lesser(fit > 1 ? fit : 1, t->batch), length = fit > 0 ? t->length : most;
    return (Pass){.sequences = sequences, .length = length, .rows = sequences * length, .position = t->position,
                  .capacity = t->capacity, .few = t->few != 0, .threads = threads, .room = sequences * length,
                  .states = t->states};
}

static int64_t scratch_of(const Program *program, const Pass *pass) {
    int64_t most = 0;
    for (int64_t i = 0; i < program->count; i++) {
        const Call *call = &program->calls[i];
        const int64_t bytes = call->scratch ? call->scratch(call->what, pass) : 0;
        most = bytes > most ? bytes : most;
    }
    return most;
}

INLINE int64_t memory_of(const Program *program, const Pass *pass) {
    return whole_lines(program->floats * pass->room * (int64_t)sizeof(float));
}

/* Weights are laid out beforehand where several passes take them; for a single one, on the way: memory that is written
 * once and read once costs more than it saves. */
INLINE int64_t packed_of(const Program *program, const Tokens *t, const Pass *pass) {
    const int single = pass->sequences >= t->batch && pass->length >= t->length;
    return pass->few || single ? 0 : whole_lines(program->packed);
}

int64_t program_bytes(const Program *program, const Tokens *t, int threads) {
    const Pass pass = first_pass(t, threads);
    return memory_of(program, &pass) + packed_of(program, t, &pass) + scratch_of(program, &pass);
}

static void run_calls(const Program *program, const Pass *pass) {
    double since = seconds_of(pass);
    for (int64_t i = 0; i < program->count; i++) {
        const Call *call = &program->calls[i];
        call->run(call->what, pass);
        const double now = seconds_of(pass);
        if (pass->seconds && call->part >= 0) pass->seconds[call->part] += now - since;
        since = now;
    }
}

/* How many of the `left` tokens of a sequence go on. Calls add up in another order for a single token: none is left alone,
 * or results would depend on where sequences are cut. */
INLINE int64_t tokens_of(const Pass *whole, int64_t left) {
    return left == whole->length + 1 ? whole->length - PIECE : lesser(whole->length, left);
}

void run_program(const Program *program, const Tokens *t, int threads) {
    const Pass whole = first_pass(t, threads);
    Pass pass = whole;
    pass.seconds = t->seconds;
    pass.memory = (float *)t->memory;
    const int64_t packed = packed_of(program, t, &whole);
    int8_t *behind = t->memory + memory_of(program, &whole);
    pass.packed = packed ? behind : NULL;
    pass.scratch = behind + packed;
    for (int64_t i = 0; i < program->laid_count && packed; i++)
        pack_many(program->laid[i].matrix, pass.packed + program->laid[i].at, threads);
    for (pass.first = 0; pass.first < t->batch; pass.first += whole.sequences) {
        pass.sequences = lesser(whole.sequences, t->batch - pass.first);
        for (int64_t from = 0; from < t->length; from += pass.length) {
            const int64_t row = pass.first * t->length + from;
            pass.length = tokens_of(&whole, t->length - from);
            pass.rows = pass.sequences * pass.length;
            pass.position = t->position + from;
            pass.ids = t->ids ? t->ids + row : NULL;
            pass.stream = t->stream + row * program->width;
            pass.result = t->result + row * program->results;
            run_calls(program, &pass);
        }
    }
}
