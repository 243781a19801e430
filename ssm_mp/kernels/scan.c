/* Selective scan of Mamba-1 (Gu & Dao 2023, algorithm 2) and the shared-step scan, forward only, states in registers.
 *
 * Dimensions: b batch, l length, I inner, N state. Arrays are float32, row-major; `ld` arguments are the distance
 * between neighbouring tokens of an array that is part of a wider one.
 */
#include "register.h"
#include "scan.h"

#define AHEAD 8 /* tokens that are asked of memory before their turn: rows are further apart than hardware looks */

#define NAME scan_sixteen
#define STATES 16
#include "scan_block.h"
#undef NAME
#undef STATES
#define NAME scan_any
#define STATES (s->states)
#include "scan_block.h"

void selective_scan(const Scan *s, int threads) {
    const int64_t blocks = (s->inner + WIDTH - 1) / WIDTH, work = s->batch * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t w = 0; w < work; w++) {
        const int64_t b = w / blocks, from = w % blocks * WIDTH;
        const int count = s->inner - from < WIDTH ? (int)(s->inner - from) : WIDTH;
        if (s->states == 16) scan_sixteen(s, b, from, count);
        else scan_any(s, b, from, count);
    }
}

/* states [b, l, N] holds what drives them and gets the states; decay [b, l, N]; state [b, N], in and out. */
void shared_step_recurrence(int64_t batch, int64_t length, int64_t N, const float *decay, float *states, float *state) {
    for (int64_t b = 0; b < batch; b++) {
        float *h = state + b * N;
        for (int64_t t = 0; t < length; t++) {
            const int64_t at = (b * length + t) * N;
            for (int64_t n = 0; n < N; n++) {
                h[n] = h[n] * decay[at + n] + states[at + n];
                states[at + n] = h[n];
            }
        }
    }
}
