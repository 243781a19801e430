/* The scan of Mamba-2 (Dao & Gu 2024), forward only: chunk after chunk out of products of matrices (section 6, listing
 * 1), two multiplications a token and number of the state, where the recurrence takes three; a few tokens go by that.
 *
 * Dimensions: b batch, l length, H heads, P channels of a head, N state, G groups of heads. Arrays are float32,
 * row-major; `ld`: floats between neighbouring tokens of an array that is part of a wider one.
 */
#include "ssd.h"

enum {
    CHUNK = 64, /* tokens of a chunk, a multiple of LANES */
    FEW = 8,    /* so many tokens go one after another */
#if defined(__AVX512F__)
    ROWS = 12, /* of a tile: as many sums as registers hold */
#else
    ROWS = 6,
#endif
    LD_SCORES = CHUNK + LANES,
};

/* What the heads of a group share of a chunk. */
typedef struct {
    float *Bt;     /* [N, CHUNK], zeros behind the last token */
    float *scores; /* [CHUNK, CHUNK]: C_t · B_s, where s ≤ t */
} Shared;

int64_t ssd_scratch(int64_t states) { return CHUNK * (states + CHUNK); }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* sums[r] += Σ_j a[r·row + j] · b[j], of `depth` vectors, `ld` apart. */
INLINE void tile(float *sums, int rows, int64_t depth, const float *a, int64_t row, const float *b, int64_t ld) {
    Register held[ROWS][PIECES];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < PIECES; i++) held[r][i] = get(sums + r * LANES + i * WIDTH);
    for (int64_t j = 0; j < depth; j++) {
        Register value[PIECES];
        UNROLL
        for (int i = 0; i < PIECES; i++) value[i] = get(b + j * ld + i * WIDTH);
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int i = 0; i < PIECES; i++) held[r][i] += a[r * row + j] * value[i];
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < PIECES; i++) put(sums + r * LANES + i * WIDTH, held[r][i]);
}

/* The same where the compiler knows how many rows there are, and of vectors of `count` numbers. */
__attribute__((noinline)) static void product(float *sums, int rows, int64_t depth, const float *a, int64_t row,
                                              const float *b, int64_t ld, int count) {
    if (count < LANES) {
        for (int64_t j = 0; j < depth; j++) {
            const float *value = b + j * ld;
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < count; i++) sums[r * LANES + i] += a[r * row + j] * value[i];
        }
        return;
    }
    for (; rows >= ROWS; rows -= ROWS, sums += ROWS * LANES, a += ROWS * row) tile(sums, ROWS, depth, a, row, b, ld);
    for (; rows >= 4; rows -= 4, sums += 4 * LANES, a += 4 * row) tile(sums, 4, depth, a, row, b, ld);
    for (; rows > 0; rows--, sums += LANES, a += row) tile(sums, 1, depth, a, row, b, ld);
}

INLINE void scale(float *x, float factor) {
    UNROLL
    for (int i = 0; i < LANES; i += WIDTH) put(x + i, get(x + i) * factor);
}

/* The steps [b, l, H] of one token: softplus of dt + bias, within the limits. */
static void steps_of_token(const Ssd *s, int64_t token) {
    for (int64_t h = 0; h < s->heads; h += LANES) {
        const int count = (int)least(s->heads - h, LANES);
        const v16 dt = load_part(s->dt + token * s->ld_dt + h, count) + load_part(s->dt_bias + h, count);
        store_part(s->steps + token * s->heads + h, at_most(at_least(softplus16(dt), s->low), s->high), count);
    }
}

/* Where one head's part of each array begins, for a piece of its tokens. */
typedef struct {
    int64_t tokens, N, P;
    const float *x, *B, *C; /* of the first token */
    const float *before;    /* [N, P], or none */
    float *state, *y;
    float steps[CHUNK], logs[CHUNK]; /* of each token; log2 of its decay */
    float D;
} Head;

static Head head_of(const Ssd *s, int64_t b, int64_t h, int64_t from, int64_t tokens) {
    const int64_t N = s->states, P = s->width, g = h / (s->heads / s->groups), token = b * s->length + from;
    const int64_t at = (b * s->heads + h) * N * P;
    Head head = {
        tokens, N, P, s->x + token * s->ld_x + h * P, s->B + token * s->ld_B + g * N, s->C + token * s->ld_C + g * N,
        from > 0 ? s->state + at : s->before ? s->before + at : NULL, s->state + at, s->y + (token * s->heads + h) * P,
        .D = s->D[h],
    };
    for (int64_t t = 0; t < tokens; t++) {
        head.steps[t] = s->steps[(token + t) * s->heads + h];
        head.logs[t] = head.steps[t] * s->A2[h];
    }
    return head;
}

/* The recurrence of some rows of the state, in registers, and what they add to y [tokens, LANES]; of whole vectors. */
INLINE void advance(const Ssd *s, const Head *head, const float *decays, const float *driven, float *y, int64_t n,
                    int64_t p, int rows) {
    Register h[ROWS][PIECES];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < PIECES; i++)
            h[r][i] = head->before ? get(head->before + (n + r) * head->P + p + i * WIDTH) : (Register){0};
    for (int64_t t = 0; t < head->tokens; t++) {
        const float *B = head->B + t * s->ld_B + n, *C = head->C + t * s->ld_C + n;
        UNROLL
        for (int i = 0; i < PIECES; i++) {
            const Register in = get(driven + t * LANES + i * WIDTH);
            Register even = get(y + t * LANES + i * WIDTH), odd = {0};
            UNROLL
            for (int r = 0; r < rows; r++) {
                h[r][i] = h[r][i] * decays[t] + in * B[r];
                if (r % 2) odd += h[r][i] * C[r];
                else even += h[r][i] * C[r];
            }
            put(y + t * LANES + i * WIDTH, even + odd);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < PIECES; i++) put(head->state + (n + r) * head->P + p + i * WIDTH, h[r][i]);
}

/* The same of one row and of vectors of `count` numbers. */
static void advance_part(const Ssd *s, const Head *head, const float *decays, const float *driven, float *y, int64_t n,
                         int64_t p, int count) {
    float h[LANES] = {0};
    if (head->before) copy_part(h, head->before + n * head->P + p, count);
    for (int64_t t = 0; t < head->tokens; t++)
        for (int i = 0; i < count; i++) {
            h[i] = h[i] * decays[t] + driven[t * LANES + i] * head->B[t * s->ld_B + n];
            y[t * LANES + i] += h[i] * head->C[t * s->ld_C + n];
        }
    copy_part(head->state + n * head->P + p, h, count);
}

/* Some rows of the state of one head, a token further, and what they add to y: in the order of memory. */
INLINE void advance_rows(const Head *head, float decay, int64_t n, int rows) {
    const int64_t P = head->P;
    float *state = head->state + n * P;
    for (int64_t p = 0; p < P; p += WIDTH) {
        const int64_t left = P - p;
        const Register in = get_part(head->x + p, left) * head->steps[0];
        Register sum = get_part(head->y + p, left);
        UNROLL
        for (int r = 0; r < rows; r++) {
            Register h = in * head->B[n + r];
            if (head->before) h += get_part(head->before + (n + r) * P + p, left) * decay;
            sum += h * head->C[n + r];
            put_part(state + r * P + p, h, left);
        }
        put_part(head->y + p, sum, left);
    }
}

/* One token of one head: all that counts is to read and write the state as fast as memory can. */
static void step_of_head(const Ssd *s, int64_t b, int64_t h, int64_t from) {
    const Head head = head_of(s, b, h, from, 1);
    const float decay = vanishing_of(get(head.logs))[0];
    for (int64_t p = 0; p < head.P; p++) head.y[p] = head.x[p] * head.D;
    int64_t n = 0;
    for (; n + 4 <= head.N; n += 4) advance_rows(&head, decay, n, 4);
    for (; n < head.N; n++) advance_rows(&head, decay, n, 1);
}

/* A few tokens of one head, one after another. */
static void steps_of_head(const Ssd *s, int64_t b, int64_t h, int64_t from, int64_t tokens) {
    if (tokens == 1) {
        step_of_head(s, b, h, from);
        return;
    }
    const Head head = head_of(s, b, h, from, tokens);
    float decays[CHUNK];
    for (int64_t t = 0; t < tokens; t += WIDTH) put(decays + t, vanishing_of(get(head.logs + t)));
    for (int64_t p = 0; p < head.P; p += LANES) {
        const int count = (int)least(head.P - p, LANES);
        float driven[CHUNK * LANES], y[CHUNK * LANES];
        for (int64_t t = 0; t < tokens; t++) {
            const float *x = head.x + t * s->ld_x + p;
            for (int i = 0; i < LANES; i++) {
                driven[t * LANES + i] = i < count ? x[i] * head.steps[t] : 0;
                y[t * LANES + i] = i < count ? x[i] * head.D : 0;
            }
        }
        int64_t n = 0;
        for (; count == LANES && n + ROWS <= head.N; n += ROWS) advance(s, &head, decays, driven, y, n, p, ROWS);
        for (; n < head.N; n++) advance_part(s, &head, decays, driven, y, n, p, count);
        for (int64_t t = 0; t < tokens; t++) copy_part(head.y + t * s->heads * head.P + p, y + t * LANES, count);
    }
}

/* B transposed and the products of C and B of one group, for all of its heads. */
static void share(const Ssd *s, const Shared *shared, int64_t b, int64_t g, int64_t from, int64_t tokens) {
    const int64_t N = s->states, token = b * s->length + from;
    const float *B = s->B + token * s->ld_B + g * N, *C = s->C + token * s->ld_C + g * N;
    memset(shared->Bt, 0, N * CHUNK * sizeof(float));
    for (int64_t n = 0; n < N; n += LANES) /* in blocks, or every number written would be in a line of its own */
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t i = n; i < least(n + LANES, N); i++) shared->Bt[i * CHUNK + t] = B[t * s->ld_B + i];
    for (int64_t t = 0; t < tokens; t += ROWS) {
        const int rows = (int)least(tokens - t, ROWS);
        for (int64_t j = 0; j < t + rows; j += LANES) {
            float sums[ROWS * LANES] = {0};
            product(sums, rows, N, C + t * s->ld_C, s->ld_C, shared->Bt + j, CHUNK, LANES);
            for (int r = 0; r < rows; r++) copy_part(shared->scores + (t + r) * CHUNK + j, sums + r * LANES, LANES);
        }
    }
}

/* What one head makes of the scores: scores [CHUNK, LD_SCORES], times decays and steps, D on the diagonal and zeros
 * above; what is left of the state before at each token; and what each token brings to the end. */
static void decayed(const Head *head, const Shared *shared, float *scores, float *from_start, float *to_end) {
    const int64_t tokens = head->tokens;
    /* of logarithms from each token on; differences of sums from the beginning are spoilt by large ones */
    float sums[CHUNK] = {0}, sum = 0;
    for (int64_t t = 0; t < tokens; t++) {
        from_start[t] = sum = sum + head->logs[t];
        float *row = scores + t * LD_SCORES;
        for (int64_t j = 0; j <= t; j += WIDTH) {
            put(sums + j, get(sums + j) + head->logs[t]);
            if (t < j + WIDTH) sums[t] = 0;
            const Register left = vanishing_of(get(sums + j)) * get(head->steps + j);
            put(row + j, left * get(shared->scores + t * CHUNK + j));
            if (t == tokens - 1) put(to_end + j, left);
        }
        memset(row + t + 1, 0, ROWS * sizeof(float));
        row[t] += head->D;
    }
    for (int64_t t = 0; t < tokens; t += WIDTH) put(from_start + t, vanishing_of(get(from_start + t)));
}

/* A chunk of one head. */
static void chunk_of_head(const Ssd *s, const Shared *shared, int64_t b, int64_t h, int64_t from, int64_t tokens) {
    const Head head = head_of(s, b, h, from, tokens);
    const int64_t N = head.N, P = head.P;
    float scores[CHUNK * LD_SCORES], from_start[CHUNK] = {0}, to_end[CHUNK], x[CHUNK * LANES];
    decayed(&head, shared, scores, from_start, to_end);
    for (int64_t p = 0; p < P; p += LANES) {
        const int count = (int)least(P - p, LANES);
        if (count < LANES) memset(x, 0, sizeof(x));
        for (int64_t t = 0; t < tokens; t++) copy_part(x + t * LANES, head.x + t * s->ld_x + p, count);
        for (int64_t t = 0; t < tokens; t += ROWS) {
            const int rows = (int)least(tokens - t, ROWS);
            float sums[ROWS * LANES] = {0};
            if (head.before) {
                product(sums, rows, N, head.C + t * s->ld_C, s->ld_C, head.before + p, P, count);
                for (int r = 0; r < rows; r++) scale(sums + r * LANES, from_start[t + r]);
            }
            product(sums, rows, t + rows, scores + t * LD_SCORES, LD_SCORES, x, LANES, LANES);
            for (int r = 0; r < rows; r++) copy_part(head.y + (t + r) * s->heads * P + p, sums + r * LANES, count);
        }
        for (int64_t t = 0; t < tokens; t++) scale(x + t * LANES, to_end[t]);
        for (int64_t n = 0; n < N; n += ROWS) {
            const int rows = (int)least(N - n, ROWS);
            float sums[ROWS * LANES] = {0};
            for (int r = 0; r < rows && head.before; r++) {
                copy_part(sums + r * LANES, head.before + (n + r) * P + p, count);
                scale(sums + r * LANES, from_start[tokens - 1]);
            }
            product(sums, rows, tokens, shared->Bt + n * CHUNK, CHUNK, x, LANES, LANES);
            for (int r = 0; r < rows; r++) copy_part(head.state + (n + r) * P + p, sums + r * LANES, count);
        }
    }
}

/* A chunk of one sequence, all heads; a few tokens one after another, wherever a sequence is cut into passes. */
static void chunk_of_sequence(const Ssd *s, int64_t b, int64_t from, int64_t tokens, int threads) {
    const int64_t size = ssd_scratch(s->states);
    if (tokens > FEW) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && s->groups > 1) schedule(static)
        for (int64_t g = 0; g < s->groups; g++) {
            const Shared shared = {s->scratch + g * size, s->scratch + g * size + CHUNK * s->states};
            share(s, &shared, b, g, from, tokens);
        }
    }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t h = 0; h < s->heads; h++) {
        const int64_t g = h / (s->heads / s->groups);
        const Shared shared = {s->scratch + g * size, s->scratch + g * size + CHUNK * s->states};
        if (tokens > FEW) chunk_of_head(s, &shared, b, h, from, tokens);
        else steps_of_head(s, b, h, from, tokens);
    }
}

void ssd_scan(const Ssd *s, int threads) {
    const int64_t all = s->batch * s->length, heads = s->heads;
#pragma omp parallel for num_threads(threads) if (threads > 1 && s->length > FEW) schedule(static)
    for (int64_t token = 0; token < all; token++) steps_of_token(s, token);
    if (s->length <= FEW) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t w = 0; w < s->batch * heads; w++) steps_of_head(s, w / heads, w % heads, 0, s->length);
        return;
    }
    for (int64_t b = 0; b < s->batch; b++)
        for (int64_t from = 0; from < s->length; from += CHUNK)
            chunk_of_sequence(s, b, from, least(s->length - from, CHUNK), threads);
}
